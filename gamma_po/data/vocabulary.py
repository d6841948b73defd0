"""Token ids must be the model's: a tokenizer of another model is found before its ids index beyond the embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from transformers import PreTrainedTokenizerBase

from gamma_po.data.tokenization import TokenizedPair
from gamma_po.errors import ConfigError

ALLOWED = "allowed: the tokenizer that belongs to the model, or a model whose embedding was enlarged for it"


def check_padding(tokenizer: PreTrainedTokenizerBase, pad_id: int, num_embeddings: int) -> None:
    """Refuse a padding token that the model cannot read, though it is masked.

    Raises:
        ConfigError: naming token, id and size of the embedding.
    """
    if pad_id >= num_embeddings:
        raise ConfigError(
            f"the tokenizer's padding token {tokenizer.convert_ids_to_tokens(pad_id)!r} has the id {pad_id}, and the "
            f"model reads ids below {num_embeddings}; {ALLOWED}"
        )


def check_vocabulary(
    pairs: Iterable[TokenizedPair],
    tokenizer: PreTrainedTokenizerBase,
    num_embeddings: int,
    location: Callable[[int], str],
) -> None:
    """Refuse pairs with a token that the model has no embedding for.

    Args:
        pairs: as tokenised.
        tokenizer: that made them.
        num_embeddings: rows of the model's embedding.
        location: of the pair in a place, for the error.

    Raises:
        ConfigError: naming the first such pair, its token and the size of the embedding.
    """
    for place, pair in enumerate(pairs):
        highest = max(int(part.max()) for part in pair[:3])
        if highest >= num_embeddings:
            token = tokenizer.convert_ids_to_tokens(highest)
            raise ConfigError(
                f"{location(place)}: token {token!r} has the id {highest}, and the model reads ids below "
                f"{num_embeddings}; {ALLOWED}"
            )
