"""Token ids must be the model's: a tokenizer of another model is found before its ids index beyond the embedding."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from gamma_po.data.mixtures import Split
from gamma_po.errors import ConfigError

ALLOWED = "allowed: the tokenizer that belongs to the model, or a model whose embedding was enlarged for it"


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to fill rows with; it is masked, so the end-of-sequence token or 0 will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def check_padding(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Refuse a padding token that the model cannot read, though it is masked.

    Raises:
        ConfigError: naming token, id and size of the embedding.
    """
    padding = pad_id(tokenizer)
    if padding >= num_embeddings:
        raise ConfigError(
            f"the tokenizer's padding token {tokenizer.convert_ids_to_tokens(padding)!r} has the id {padding}, and the "
            f"model reads ids below {num_embeddings}; {ALLOWED}"
        )


def check_vocabulary(split: Split, tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Refuse pairs with a token that the model has no embedding for.

    Args:
        split: of the data, as tokenised.
        tokenizer: that tokenised it.
        num_embeddings: rows of the model's embedding.

    Raises:
        ConfigError: naming the first such pair, its token and the size of the embedding.
    """
    if split.pairs.highest_id() < num_embeddings:
        return
    for place, pair in enumerate(split.pairs):
        highest = max(int(part.max()) for part in pair[:3])
        if highest >= num_embeddings:
            token = tokenizer.convert_ids_to_tokens(highest)
            raise ConfigError(
                f"{split.preferences[place].location}: token {token!r} has the id {highest}, and the model reads ids "
                f"below {num_embeddings}; {ALLOWED}"
            )
