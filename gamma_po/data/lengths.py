"""Pairs that are too long, for a forward or for the positions of a model: found before anything is computed."""

from __future__ import annotations

from gamma_po.data.batching import TokenCosts
from gamma_po.data.mixtures import Split
from gamma_po.errors import ConfigError, DataError


def check_forwards(split: Split, layout: str, limit: int) -> None:
    """Refuse a pair that alone holds more tokens than a forward may.

    Args:
        split: at least one pair.
        layout: of the batches.
        limit: `data.max_tokens_per_forward`.

    Raises:
        DataError: naming the longest pair.
    """
    costs = TokenCosts.of(split.pairs, layout)
    row = costs.too_long(limit)
    if row is not None:
        raise DataError(
            f"{split.preferences[row].location}: the pair alone takes {costs.total([row])} tokens in the "
            f"{layout} layout, data.max_tokens_per_forward={limit} is less; raise it, or lower "
            "data.tokenization.max_prompt_length, max_completion_length or max_length"
        )


def check_positions(split: Split, limit: int) -> None:
    """Refuse pairs beyond the position from which on a model's numbers depend on the longest row of a forward.

    Args:
        split: at least one pair.
        limit: see `scorer.steady_positions`.

    Raises:
        ConfigError: naming the longest pair and the limit.
    """
    widths = TokenCosts.of(split.pairs, "padded").widths
    row = max(range(len(widths)), key=widths.__getitem__)
    if widths[row] > limit:
        raise ConfigError(
            f"{split.preferences[row].location}: the pair takes {widths[row]} positions; beyond {limit} "
            "the model's rotary embedding changes with the longest sequence of a forward, and a pair's "
            "log-probabilities with what stands beside it; allowed: data.tokenization.max_length of at most "
            f"{limit}"
        )
