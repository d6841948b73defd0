"""From hidden states to log-probabilities of given tokens, without ever holding [tokens, vocabulary] at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 1024


def completion_token_logps(
    hidden: Tensor,
    targets: Tensor,
    *,
    head: nn.Module,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Return log p(target) at each position.

    `log softmax(cap(scale · head(hidden)))[target]`, with cap(x) = softcap · tanh(x / softcap) where the
    architecture has one. Chunks of positions are recomputed in the backward pass, so that memory is
    [chunk_tokens, vocabulary]; the log-softmax is float32 under any autocast.

    Args:
        hidden: [N, D], any float dtype.
        targets: [N], token ids.
        head: maps [n, D] to logits [n, vocabulary].
        scale: multiplies the logits.
        softcap: Gemma-2's final soft-capping; None for none.
        chunk_tokens: positions per chunk.

    Returns:
        [N], float32, nats.

    >>> head = nn.Linear(2, 3, bias=False)
    >>> _ = nn.init.zeros_(head.weight)
    >>> completion_token_logps(torch.ones(1, 2), torch.tensor([1]), head=head).exp()
    tensor([0.3333], grad_fn=<ExpBackward0>)
    """
    pieces = [
        checkpoint(_chunk_logps, part, target, head, scale, softcap, use_reentrant=False)
        for part, target in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    return torch.cat(pieces)


def _chunk_logps(hidden: Tensor, targets: Tensor, head: nn.Module, scale: float, softcap: float | None) -> Tensor:
    logits = head(hidden).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)
