"""From hidden states to log-probabilities of given tokens, without ever holding [tokens, vocabulary] at once."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = {"cpu": 2**23, "other": 2**26}  # of [tokens, vocabulary] at once: fits a CPU's cache; fills a GPU


class TokenLogps(NamedTuple):
    """What one pass over the vocabulary tells about N tokens."""

    logps: Tensor  # [N] log p(token), float32, nats
    log_collision: Tensor | None  # [N] log Σ_v p(v)², without gradient; None unless asked for


class Logits(NamedTuple):
    """How logits come from the head's output x: softcap · tanh(scale · x / softcap), or scale · x without a cap; in
    either case they are then divided by the temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


def completion_token_logps(
    hidden: Tensor,
    targets: Tensor,
    *,
    head: nn.Module,
    logits: Logits = Logits(),  # noqa: B008 - immutable
    with_collision: bool = False,
    chunk_tokens: int | None = None,
) -> TokenLogps:
    """Return log p(target) at each position.

    `log softmax(logits(head(hidden)))[target]`, a chunk of positions at a time, so that memory is
    [chunk_tokens, vocabulary]; the log-softmax is float32 under any autocast. A head that is trained is applied
    again to each chunk in the backward pass. One that is frozen is not: the gradient of log p with respect to the
    hidden state, `W[target] - Σ_v p(v) W[v]`, is taken along in the forward pass.

    Args:
        hidden: [N, D], any float dtype.
        targets: [N], token ids.
        head: maps [n, D] to [n, vocabulary].
        logits: scale and soft-capping of the architecture, and the temperature.
        with_collision: also return log Σ_v p(v)².
        chunk_tokens: positions per chunk; None chooses by vocabulary and device.

    Returns:
        [N] each.

    >>> head = nn.Linear(2, 3, bias=False)
    >>> _ = nn.init.zeros_(head.weight)
    >>> completion_token_logps(torch.ones(1, 2), torch.tensor([1]), head=head).logps.exp()
    tensor([0.3333], grad_fn=<ExpBackward0>)
    """
    if chunk_tokens is None:
        chunk_tokens = chunk_length(cast(nn.Linear, head).out_features, hidden.device)
    if torch.is_grad_enabled() and hidden.requires_grad and _is_frozen_linear(head):
        values = _FrozenHead.apply(hidden, targets, head.weight, head.bias, logits, with_collision, chunk_tokens)
        return TokenLogps(*values)
    pieces = [
        checkpoint(_chunk, part, target, head, logits, with_collision, use_reentrant=False)
        for part, target in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    return _joined(pieces)


def chunk_length(vocab_size: int, device: torch.device) -> int:
    """Return how many positions meet a vocabulary at once.

    >>> chunk_length(2**16, torch.device("cpu"))
    128
    """
    return max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["other"]) // vocab_size)


def _is_frozen_linear(head: nn.Module) -> bool:
    # Exactly: subclasses (adapters, quantised layers) compute something else. A weight sharded outside of its own
    # module's forward (not a plain tensor) cannot be read from here.
    plain = type(head) is nn.Linear and type(head.weight.data) is Tensor
    return plain and not any(parameter.requires_grad for parameter in head.parameters())


def _chunk(hidden: Tensor, targets: Tensor, head: nn.Module, logits: Logits, with_collision: bool) -> TokenLogps:
    values = head(hidden).float() * logits.scale
    if logits.softcap is not None:
        values = logits.softcap * torch.tanh(values / logits.softcap)
    if logits.temperature != 1:
        values = values / logits.temperature
    total = values.logsumexp(1)
    collision = None
    if with_collision:
        with torch.no_grad():
            collision = (2 * (values - total[:, None])).logsumexp(1)
    return TokenLogps(values.gather(1, targets[:, None]).squeeze(1) - total, collision)


class _FrozenHead(torch.autograd.Function):
    """`_chunk` over all chunks for a linear head without gradient; keeps [N, D] for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logits: Logits,
        with_collision: bool,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities [N] and, if asked for, log collision probabilities [N]."""
        pieces, slopes = [], []
        for part, target in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
            piece, slope = _with_slope(F.linear(part, weight, bias), target, weight, logits, with_collision)
            pieces.append(piece)
            slopes.append(slope.to(hidden.dtype))
        joined = _joined(pieces)
        ctx.save_for_backward(torch.cat(slopes))
        if joined.log_collision is not None:
            ctx.mark_non_differentiable(joined.log_collision)
        return joined.logps, joined.log_collision

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (gradient[:, None] * slopes).to(slopes.dtype), None, None, None, None, None, None


def _with_slope(
    values: Tensor, targets: Tensor, weight: Tensor, logits: Logits, with_collision: bool
) -> tuple[TokenLogps, Tensor]:
    """Log-probabilities from the head's output, and their gradient by the hidden state.

    Each pass over [n, vocabulary] counts here: probabilities stay unnormalised, exp(x - max x), to the end.
    """
    slope = None  # of the logits by the head's output, where it is not the constant scale / temperature
    if logits.softcap is not None:
        values = values.float().mul(logits.scale / logits.softcap).tanh_()
        slope = 1 - values.square()
        values.mul_(logits.softcap / logits.temperature)
    elif logits != Logits():
        values = values.float() * (logits.scale / logits.temperature)
    highest = values.amax(1, keepdim=True).float()
    asked = values.gather(1, targets[:, None]).float() - highest
    weights = torch.sub(values, highest).exp_()
    total = weights.sum(1, keepdim=True)
    logps = (asked - total.log()).squeeze(1)
    collision = weights.square().sum(1).log() - 2 * total.log().squeeze(1) if with_collision else None
    at_target = weight[targets]
    if slope is not None:
        weights.mul_(slope)
        at_target = at_target * slope.gather(1, targets[:, None])
    mean = weights.to(weight.dtype) @ weight / total
    return TokenLogps(logps, collision), logits.scale / logits.temperature * (at_target - mean)


def _joined(pieces: list[TokenLogps]) -> TokenLogps:
    logps, collisions = zip(*pieces, strict=True)
    return TokenLogps(torch.cat(logps), None if collisions[0] is None else torch.cat(collisions))
