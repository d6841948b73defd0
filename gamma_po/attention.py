"""Attention over rows that hold many sequences, without padding and without a mask over the whole row.

A row is a chain of groups. A group of one part is a sequence of its own. In a group of several parts, the first
(a prompt) is seen by all, and each of the others (its completions) sees the first and itself, as if each stood in
a row of its own. Transformers' models call `segment_attention` in place of their own once `attend_in_segments` has
been called; it needs nothing else from them but position ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

SEGMENTS = "gamma_po_segments"
Groups = Sequence[Sequence[int]]


class Segments(NamedTuple):
    """How the tokens of one row attend to each other; made once per forward and used by every layer."""

    parts: list[int]  # lengths of all parts, in row order
    groups: list[int]  # number of parts of each group
    keys: Tensor  # [K] place in the row of each sequence's keys, one sequence after another
    query_ends: Tensor  # [sequences + 1] int32, cumulative
    key_ends: Tensor  # [sequences + 1] int32, cumulative
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, groups: Groups, device: torch.device | str = "cpu") -> Segments:
        """Prepare a row.

        Args:
            groups: lengths of the parts of each group, every length >= 1.
            device: of the row.

        >>> row = Segments.of([(2, 1, 1), (3,)])
        >>> row.parts, row.keys.tolist(), row.query_ends.tolist(), row.key_ends.tolist()
        ([2, 1, 1, 3], [0, 1, 2, 0, 1, 3, 4, 5, 6], [0, 3, 4, 7], [0, 3, 6, 9])
        """
        keys: list[Tensor] = []
        queries: list[int] = []
        start = 0
        for first, *others in groups:
            shared, here = torch.arange(start, start + first), start + first
            for number, length in enumerate(others or [0]):
                keys.append(torch.cat([shared, torch.arange(here, here + length)]))
                queries.append(length if number else first + length)  # the first part asks with the second
                here += length
            start = here
        key_lengths = [len(key) for key in keys]
        return cls(
            parts=[length for group in groups for length in group],
            groups=[len(group) for group in groups],
            keys=torch.cat(keys).to(device),
            query_ends=_ends(queries).to(device),
            key_ends=_ends(key_lengths).to(device),
            longest_query=max(queries),
            longest_key=max(key_lengths),
        )


def attend_in_segments(model: PreTrainedModel) -> None:
    """Make a transformers model attend in segments where it is given `segments`, and as with sdpa elsewhere."""
    AttentionInterface.register(SEGMENTS, segment_attention)
    AttentionMaskInterface.register(SEGMENTS, sdpa_mask)
    model.set_attn_implementation(SEGMENTS)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend, as transformers' attention functions do.

    Args:
        module: the attention layer.
        query: [1, H, T, D].
        key, value: [1, H_kv, T, D], H a multiple of H_kv.
        attention_mask: not read where there are segments.
        segments: of the row; None for an ordinary batch.
        dropout: of the attention weights.
        scaling: of the scores; by default 1/sqrt(D).
        sliding_window: how many tokens back a token looks, itself included.
        softcap: scores become softcap · tanh(score / softcap).

        s_aux: attention sinks, which are not supported.

    Returns:
        [1, T, H, D], and no weights.
    """
    if s_aux is not None:
        raise ValueError("attention in segments knows no attention sinks")
    if segments is None:
        if softcap is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        if attention_mask is None:
            attention_mask = _causal(query.shape[2], key.shape[2], sliding_window, query.device)
        return _soft_capped(query, key, value, attention_mask, scaling, dropout, softcap).transpose(1, 2), None
    kind, dtype = query.device.type, value.dtype  # rotary embeddings may have widened query and key
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    if kind == "cpu" and dtype == torch.bfloat16:
        dtype = torch.float32  # on a CPU, half precision halves the speed of attention's backward pass
    query, key, wide = (tensor.to(dtype) for tensor in (query, key, value))
    with torch.autocast(kind, enabled=False):
        if kind == "cuda" and dtype != torch.float32 and softcap is None and dropout == 0.0:
            output = _in_one_kernel(query, key, wide, segments, scaling, sliding_window)[None]
        else:
            output = _one_by_one(query, key, wide, segments, scaling, dropout, sliding_window, softcap)
            output = output.transpose(1, 2).contiguous()
    return output.to(value.dtype), None


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """A call per sequence: no mask, nothing computed that is not needed."""
    rows = zip(*(tensor.split(segments.parts, dim=2) for tensor in (query, key, value)), strict=True)
    outputs: list[Tensor] = []
    for size in segments.groups:
        parts = [next(rows) for _ in range(size)]
        first = parts[0]
        if size > 1:
            first = tuple(torch.cat(pair, dim=2) for pair in zip(parts[0], parts[1], strict=True))
        outputs.append(_sequence(*first, scaling, dropout, window, softcap))
        for q, k, v in parts[2:]:
            own = torch.cat([parts[0][1], k], dim=2), torch.cat([parts[0][2], v], dim=2)
            outputs.append(_sequence(q, *own, scaling, dropout, window, softcap))
    return torch.cat(outputs, dim=2)


def _sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of one sequence; the queries are the last of its tokens."""
    asked, seen = query.shape[2], key.shape[2]
    windowed = window is not None and window < seen
    mask = None
    if asked != seen or windowed or softcap is not None:
        mask = _causal(asked, seen, window if windowed else None, query.device)
    if softcap is not None:
        return _soft_capped(query, key, value, mask, scaling, dropout, softcap)
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=True
    )


def _soft_capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (
        (softcap * torch.tanh(scores / softcap)).float().masked_fill(~mask, torch.finfo(torch.float32).min)
    )  # padding sees nothing: uniform, not NaN
    weights = F.dropout(scores.softmax(-1), dropout).to(value.dtype)
    return weights @ value


def _in_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """All sequences in one call of variable-length FlashAttention, causal to the end of each: [T, H, D]."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if len(segments.keys) != len(k):
        k, v = k.index_select(0, segments.keys), v.index_select(0, segments.keys)
    windowed = window is not None and window < segments.longest_key
    return varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        segments.query_ends,
        segments.key_ends,
        segments.longest_query,
        segments.longest_key,
        scale=scaling,
        window_size=(window - 1 if windowed else -1, 0),
        enable_gqa=True,
    )


def _causal(asked: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query may look, [asked, seen]; the last query stands at the last key."""
    distance = torch.arange(seen - asked, seen, device=device)[:, None] - torch.arange(seen, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
