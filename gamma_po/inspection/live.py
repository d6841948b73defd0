"""What a step makes and drops again: tensors counted from their making to their end, on real micro-batches."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside of it, from their making to their end.

    Tensors that were there before do not count, whatever is done with them. Memory that a kernel takes and gives back
    within one call is not seen.

    >>> import torch
    >>> with LiveBytes() as live:
    ...     kept = torch.ones(256) + (torch.ones(256) + 1)
    >>> live.now, live.mark()  # float32: one is kept; the most were three
    (1024, 3072)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self._most = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def mark(self) -> int:
        """Return the most that was alive at one time since the last mark."""
        most, self._most = self._most, self.now
        return most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; count the storages that it returns and was not given."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._count(storage)
        return result

    def _count(self, storage: Any) -> None:
        address, size = storage._cdata, storage.nbytes()

        def ended(_: object) -> None:
            del self._alive[address]
            self.now -= size

        self._alive[address] = weakref.ref(storage, ended)
        self.now += size
        self._most = max(self._most, self.now)


class Counted(NamedTuple):
    """Bytes of one micro-batch, stretch by stretch: the forward pass, the backward pass up to each gradient's arrival
    and behind the last."""

    tokens: int
    most: tuple[int, ...]  # alive at one time, gradients among it that came in the stretches before
    arrived: tuple[int, ...]  # gradients before the stretch, as far as they came in this backward pass

    def at(self, tokens: int, other: Counted) -> Counted:
        """Extend what was counted to a micro-batch of `tokens`: in each stretch, a part that stays and one per token.

        Args:
            tokens: of the micro-batch.
            other: counted with more tokens.

        >>> Counted(2, (10, 7), (0, 4)).at(12, Counted(4, (14, 7), (0, 4)))
        Counted(tokens=12, most=(30, 7), arrived=(0, 4))
        """
        span = max(1, other.tokens - self.tokens)
        per_token = [max(0, b - a) / span for a, b in zip(self.most, other.most, strict=True)]
        more = tokens - other.tokens
        most = (int(b + more * slope) for b, slope in zip(other.most, per_token, strict=True))
        return Counted(tokens, tuple(most), self.arrived)


def count_step(loss: Callable[[], Tensor], trainable: Sequence[nn.Parameter], tokens: int) -> Counted:
    """Run a forward and a backward pass and count what is alive; gradients that are there already do not count.

    Args:
        loss: runs the forward pass.
        trainable: what gets gradients; those that had none have none afterwards.
        tokens: of the micro-batch.
    """
    without = {id(parameter) for parameter in trainable if parameter.grad is None}
    live, most, arrived = LiveBytes(), [], [0, 0]

    def on_gradient(parameter: Tensor) -> None:
        most.append(live.mark())
        arrived.append(arrived[-1] + (parameter.nbytes if id(parameter) in without else 0))

    hooks = [parameter.register_post_accumulate_grad_hook(on_gradient) for parameter in trainable]
    with live:
        value = loss()
        most.append(live.mark())
        value.backward()
        most.append(live.mark())
    for hook in hooks:
        hook.remove()
    for parameter in trainable:
        if id(parameter) in without:
            parameter.grad = None
    return Counted(tokens, tuple(most), tuple(arrived))


def _storages(values: Any) -> Iterator[Any]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            yield value.untyped_storage()
