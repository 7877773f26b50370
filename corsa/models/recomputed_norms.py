"""Normalisation layers that keep their input alone for the backward pass, and compute the rest again there.

The norms of transformers compute in float32. With a bfloat16 base, autograd keeps that float32 copy of the input: a
sixth of all activations of an 8B model. Here a norm keeps the input as the base made it, and the backward pass runs the
layer's own forward again. Results are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def recompute_norms(model: nn.Module) -> None:
    """Keep only the inputs of the model's norms from now on, where they are smaller than float32.

    torch's own `LayerNorm` keeps its input in any case. The norms' weights must be frozen.
    """
    for module in model.modules():
        if "Norm" in type(module).__name__ and not isinstance(module, nn.LayerNorm):
            module.forward = _recomputed(module.forward)


def _recomputed(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(x: Tensor, *rest: Any, **named: Any) -> Tensor:
        if rest or named or not x.requires_grad or x.dtype == torch.float32:
            return plain(x, *rest, **named)
        return _Recomputed.apply(x, plain)

    return forward


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.plain = plain
        return plain(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.plain(x)
        (g_x,) = torch.autograd.grad(y, x, g)
        return g_x, None
