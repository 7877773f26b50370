"""The product that LoRA adds to a linear layer's output, with its derivative written out.

Autograd alone would keep a float32 copy of the layer's input for every site. These functions keep the input as the base
made it: sites with the same input (q, k and v; gate and up) share one tensor in the base's data type, and one product
with their A factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ApplyA(torch.autograd.Function):
    """`scale * x A^T` of all sites with the input x, for K adapters that take equal parts of the rows of x; float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *a: Tensor) -> tuple[Tensor, ...]:
        """Shapes: x (..., inputs), each A (K, rank, inputs). Returns one tensor (K, rows, rank) for each site."""
        narrow = scale * torch.bmm(_rows(x, len(a[0])), _joined(a, 1).mT)  # scale the smallest tensor
        ctx.save_for_backward(x, *a)  # not the joined A: it would be a second copy of them
        ctx.scale, ctx.ranks = scale, [factor.shape[1] for factor in a]
        return narrow.split(ctx.ranks, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        """In a batched backward pass, g holds one cotangent for each objective and x is cast once for all."""
        x, *a = ctx.saved_tensors
        g_narrow = ctx.scale * _joined(g, 2)
        g_x = g_a = None
        if ctx.needs_input_grad[0]:
            g_x = torch.bmm(g_narrow, _joined(a, 1)).view(x.shape).to(x.dtype)
        if ctx.needs_input_grad[2]:
            g_a = torch.bmm(_rows(x, len(a[0])).mT, g_narrow).mT.split(ctx.ranks, 1)
        return g_x, None, *(g_a or [None] * len(a))


class ApplyB(torch.autograd.Function):
    """`output + narrow B^T`.

    The product and the sum are float32 for every data type of the base. In bfloat16, rounding loses nine tenths of a
    perturbation of rho 0.05 at 8B. The sum is rounded once, to the data type of `output`.
    """

    @staticmethod
    def forward(ctx: Any, narrow: Tensor, output: Tensor, b: Tensor) -> Tensor:
        """Shapes: narrow (K, rows, rank), output (..., outputs), b (K, outputs, rank)."""
        ctx.save_for_backward(narrow, b)
        return (output + torch.bmm(narrow, b.mT).view(output.shape)).to(output.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        narrow, b = ctx.saved_tensors
        rows = _rows(g, len(b))
        return torch.bmm(rows, b), g, torch.bmm(narrow.mT, rows).mT


def _rows(x: Tensor, adapters: int) -> Tensor:
    """Float32 rows of each adapter, (K, rows, n), from x (..., n)."""
    return x.float().reshape(adapters, -1, x.shape[-1])


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
