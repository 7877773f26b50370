"""A literal implementation of Algorithm 1: the reference for the packed step, in time and in result.

Each loss has its own forward passes and backward pass, every position gets logits, and both phases recompute the
reference: 16 forward-equivalents, where plain LoRA has 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from corsa.algorithm.packing import Triplet
from corsa.config import StepConfig
from corsa.lora.flat import Lora


def literal_step(
    model: Any,
    lora: Lora,
    batch: Sequence[Triplet],
    config: StepConfig,
    optimizer: torch.optim.Optimizer,
    clip: float,
) -> None:
    """One update of `lora.phi` (one adapter) from a batch: one worker, the whole batch at once, `scope = "step"`, and
    `perturbation = "gradient"`.
    """
    phi = lora.phi
    g = _merged_gradient(model, lora, batch, config)
    if config.rho > 0:
        kept = phi.detach().clone()
        with torch.no_grad():
            phi.add_(_perturbation(phi, g, config))  # line 7: phi + e
        g = _merged_gradient(model, lora, batch, config)
        with torch.no_grad():
            phi.copy_(kept)
    g = g * min(1.0, clip / float(g.double().norm()))
    for group in optimizer.param_groups:
        group["params"][0].grad = g
    optimizer.step()
    optimizer.zero_grad()


def _perturbation(phi: Tensor, g: Tensor, config: StepConfig) -> Tensor:
    """The point e that maximises g . e within |e| <= rho, |e| <= rho |phi|, or |e / |phi_i|| <= rho (ASAM)."""
    if config.radius == "adaptive":
        squared = phi.square()
        return config.rho * squared * g / (float((phi * g).double().norm()) + config.eps)
    most = config.rho * (float(phi.double().norm()) if config.radius == "relative" else 1.0)
    return most * g / (float(g.double().norm()) + config.eps)


def _merged_gradient(model: Any, lora: Lora, batch: Sequence[Triplet], config: StepConfig) -> Tensor:
    """g_PC at the current phi (lines 3 to 6)."""
    tokens = sum(len(t.new) for t in batch) if config.reduction == "token" else len(batch)
    sft = -_logp(model, batch, "new").sum() / tokens
    (g_sft,) = torch.autograd.grad(sft, lora.phi)
    if config.lambda_ == 0:
        return g_sft
    with torch.no_grad(), lora.off():
        reference_new, reference_old = _logp(model, batch, "new"), _logp(model, batch, "old")
    gain_new = _logp(model, batch, "new") - reference_new
    gain_old = _logp(model, batch, "old") - reference_old
    dpo = -F.logsigmoid(config.beta * (gain_new - gain_old)).mean()
    (g_dpo,) = torch.autograd.grad(dpo, lora.phi)
    if config.pcgrad == "off":
        return g_sft + config.lambda_ * g_dpo
    if config.pcgrad == "authors":
        return (g_sft + config.lambda_ * _project(g_dpo, g_sft, config.eps)) / 2
    first = _project(g_sft, g_dpo, config.eps)
    if config.pcgrad == "algorithm1":  # line 6 read literally: the inner product is that of the original gradients
        return first + config.lambda_ * _project(g_dpo, first, config.eps, inner=_dot(g_sft, g_dpo))
    return first + config.lambda_ * _project(g_dpo, g_sft, config.eps)


def _project(g: Tensor, other: Tensor, eps: float, inner: Tensor | None = None) -> Tensor:
    inner = _dot(g, other) if inner is None else inner
    return g - (inner / (_dot(other, other) + eps)).to(g.dtype) * other if inner < 0 else g


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product in float64: a float32 sum over the size of phi is wrong in the fourth digit."""
    return (a.double() * b.double()).sum()


def _logp(model: Any, batch: Sequence[Triplet], side: str) -> Tensor:
    """Log p(y|x) of one answer per edit, shape (E,). Each edit is a padded row `[x | y]`, with all logits."""
    rows = [[*t.prompt, *getattr(t, side)] for t in batch]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    seen = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    answer = torch.tensor(
        [
            [0] * len(t.prompt) + [1] * (len(row) - len(t.prompt)) + [0] * (width - len(row))
            for t, row in zip(batch, rows, strict=True)
        ],
        device=model.device,
    )
    logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits.float()  # (E, T, V)
    logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (logp * answer[:, 1:]).sum(-1)
