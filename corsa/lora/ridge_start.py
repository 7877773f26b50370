"""Initial values of LoRA's A that read little of given inputs, so that training B changes little of what they give.

A <- A (C + r c I)^-1 at every site, with C the second moment of the site's inputs, c the mean of its diagonal, and r
the ridge: a direction that the inputs use with energy w is damped by 1 / (w + r c). LoRA-Null (Tang et al. 2025, arXiv
2503.02659) takes A from the null space of such inputs and fixes it. This is its smooth form, with the regularised
inverse of MEMIT (Meng et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corsa.config import RIDGE_GAIN
from corsa.lora.flat import Lora, target_layers


@torch.no_grad()
def read_little(model: Any, lora: Lora, rows: Sequence[Sequence[int]], ridge: float) -> None:
    """Change A of every site and adapter in place, from one forward pass of the base model.

    Args:
        model: the base model, with `lora` attached.
        lora: at its initial values.
        rows: token ids, padded here on the right: in a causal model a token does not attend to later ones.
        ridge: r. The larger, the closer A stays to the usual values.
    """
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows])
    chosen = (torch.arange(width) < lengths[:, None]).to(lora.phi.device)
    last: list[Any] = [None, None]  # q, k and v read one tensor, and so do gate and up

    def hook(a: Tensor) -> Any:
        def read(module: nn.Module, args: Any) -> None:
            if last[0] is not args[0]:
                last[:] = args[0], _factor(args[0][chosen].float(), ridge)
            a.copy_(damped(a, last[1]))

        return read

    layers = target_layers(model, lora.config)
    handles = [
        layer.register_forward_pre_hook(hook(a)) for (_, layer), a in zip(layers, lora.factors()[0::2], strict=True)
    ]
    try:
        with lora.off():
            model(input_ids=ids.to(lora.phi.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()


def _factor(x: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of C + r c I, float64, from inputs (T, d)."""
    c = (x.T @ x / len(x)).double()
    c.diagonal().add_(ridge * c.diagonal().mean())
    return torch.linalg.cholesky(c)


def damped(a: Tensor, factor: Tensor) -> Tensor:
    """A (C + r c I)^-1 for A (K, rank, d), each adapter's with `RIDGE_GAIN` times its former norm."""
    rows = a.double().flatten(0, 1)
    found = torch.cholesky_solve(rows.T.contiguous(), factor).T.view_as(a)
    norms = [torch.linalg.matrix_norm(each, keepdim=True) for each in (a.double(), found)]
    return (RIDGE_GAIN * norms[0] / norms[1] * found).to(a.dtype)
