"""LoRA layers that add the adapter to the base layer's output inside of its matrix products.

peft computes `result + lora_B(lora_A(x.float())) * scaling`: under mixed precision the input is cast to float32 and
back, and five passes go over the output, forward and backward. Here the low-rank update accumulates into the output
of the base layer (and, in the backward pass, into the gradient of the input): the same numbers, fewer passes, and no
float32 copy of the input kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F


class FusedLoraLinear(LoraLinear):
    """peft's LoRA on a linear layer; whatever `_fusable` does not name goes peft's own way."""

    base_was_frozen: bool | None = None  # before FSDP1 gave it views of a tensor that all trains; None: there is none

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W x + b + scaling · B A x."""
        dtype = _compute_dtype(x)
        if args or kwargs or not self._fusable(dtype):
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        base = self.base_layer
        rows = x.reshape(-1, x.shape[-1])
        output = _LoraProduct.apply(rows, base.weight, base.bias, A, B, self.scaling[name], dtype)
        return output.view(*x.shape[:-1], -1)

    def _fusable(self, dtype: torch.dtype) -> bool:
        """One plain adapter in use, without dropout or bias, on a frozen linear layer, all computed in one dtype."""
        names = self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
            return False
        (name,) = names
        plain = name not in self.lora_variant and self.lora_B[name].bias is None
        without_dropout = not self.training or isinstance(self.lora_dropout[name], nn.Identity)
        base = self.base_layer
        frozen = self.base_was_frozen
        if frozen is None:
            frozen = not any(parameter.requires_grad for parameter in base.parameters())
        casts = torch.is_autocast_enabled(base.weight.device.type)
        one_dtype = casts or {base.weight.dtype, self.lora_A[name].weight.dtype} == {dtype}
        return type(base) is nn.Linear and plain and without_dropout and frozen and one_dtype


def fuse_lora(model: PeftModel) -> None:
    """Make peft's LoRA layers on linear layers compute in fused form; weights, names and merging stay peft's."""
    for layer in model.modules():
        if type(layer) is LoraLinear:
            layer.__class__ = FusedLoraLinear


class _LoraProduct(torch.autograd.Function):
    """x Wᵀ + b + scaling · (x Aᵀ) Bᵀ for rows x [T, D], with gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Accumulate the low-rank product into the base layer's output, [T, out]."""
        rows = x.to(dtype)
        inner = rows @ A.to(dtype).T
        output = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
        output.addmm_(inner, B.to(dtype).T, alpha=scaling)
        ctx.save_for_backward(rows, weight, A, B, inner)
        ctx.scaling, ctx.x_dtype = scaling, x.dtype
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Accumulate the adapter's part into the gradient of the input; the base's weights get none."""
        rows, weight, A, B, inner = ctx.saved_tensors
        through_b = gradient @ B.to(gradient.dtype)
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = gradient @ weight.to(gradient.dtype)
            for_x.addmm_(through_b, A.to(gradient.dtype), alpha=ctx.scaling)
            for_x = for_x.to(ctx.x_dtype)
        for_a = (through_b.T @ rows).to(A.dtype) * ctx.scaling
        for_b = (gradient.T @ inner).to(B.dtype) * ctx.scaling
        return for_x, None, None, for_a, for_b, None, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
