"""One optimizer step of CoRSA (Algorithm 1), and those of its parts that depend on phi and the batch.

Plain LoRA and the ablations of Table 9 are settings of this step (`corsa.config.STEPS`), not other code. K adapters
trained together (`corsa.algorithm.row_settings`) are K independent rows of phi: a number of one adapter becomes a
column (K, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from corsa.algorithm.logprobs import Model, answer_logprobs
from corsa.algorithm.losses import dpo_loss, sft_loss
from corsa.algorithm.packing import NO_OLD_ANSWER, Rows
from corsa.algorithm.pcgrad import cosine, merge, norm
from corsa.algorithm.row_settings import Together
from corsa.algorithm.sam import LookSam, perturbation, perturbed
from corsa.config import StepConfig

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all workers, in place."""

Setting = StepConfig | Together
"""The step's settings, for one adapter or for K trained together."""


class Optimizer(Protocol):
    """Updates phi by `phi.grad`. With several rows, a row with a non-finite gradient is not changed."""

    def step(self) -> Any: ...


@dataclass(frozen=True)
class MicroBatch:
    """Edits of one forward pass: their rows, reference log-probabilities in nats, and number of new tokens.

    For one adapter `reference` is (2, E) and `tokens` a number. For K adapters with E edits each, they are (2, K, E)
    and (K, 1). `bound`: log p in nats that a new answer must exceed to count as learnt, one for all or (K, E); it
    has no effect on the update.
    """

    rows: Sequence[Rows]
    reference: Tensor
    tokens: int | Tensor
    bound: float | Tensor = -math.inf

    @property
    def edits(self) -> int:
        """Edits per adapter, E."""
        return self.reference.shape[-1]

    @property
    def unpaired(self) -> Tensor:
        """Edits without an old answer, per adapter: L_DPO is a mean over the others."""
        return (self.reference[1] == NO_OLD_ANSWER).sum(-1, keepdim=True)


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch, with the counts of the whole batch (all workers) per adapter."""

    parts: Sequence[MicroBatch]
    edits: int
    tokens: int | Tensor
    unpaired: int | Tensor = 0

    @property
    def pairs(self) -> Tensor:
        """Edits with an old answer, per adapter. At least 1: without such edits the sum over them is 0."""
        return torch.as_tensor(self.edits - self.unpaired).clamp(min=1)


@dataclass
class Gradients:
    """Gradients g (1 or 2, K, P) of L_SFT and, where lambda > 0, of L_DPO, with sums over the batch for the log.

    `sums` (5, K, 1) holds L_SFT, L_DPO, sum of logp_new, sum of logp_old (nats), and the number of edits whose new
    answer is not above the bound.
    """

    g: Tensor
    sums: Tensor


@dataclass(frozen=True)
class Measured:
    """What the log shows of a step: sums as in `Gradients` at phi and, if the step was perturbed, at phi + e. With two
    objectives also the cosine of their gradients at phi, (K, 1), and whether they conflict.
    """

    at_phi: Tensor
    at_peak: Tensor | None = None
    cosine: Tensor | None = None
    conflict: Tensor | None = None

    @classmethod
    def of(cls, found: Gradients, eps: float) -> Measured:
        """Measurements of the gradients at phi."""
        if len(found.g) == 1:
            return cls(found.sums)
        angle = cosine(found.g[0], found.g[1], eps)
        return cls(found.sums, cosine=angle, conflict=angle < 0)

    def sharpness(self, lam: float | Tensor) -> Tensor | None:
        """L_Update(phi + e) - L_Update(phi), (K, 1); L_Update = L_SFT + lambda * L_DPO (Eq. 4)."""
        if self.at_peak is None:
            return None
        rise = self.at_peak - self.at_phi
        return rise[0] + lam * rise[1]


def corsa_step(
    model: Model,
    phi: Tensor,
    batch: Batch,
    config: Setting,
    optimizer: Optimizer,
    clip: float,
    reduce: Reduce,
    look: LookSam | None = None,
) -> list[dict[str, Any]]:
    """Algorithm 1: one update of phi from one batch. Returns one row of the learning curves per row of phi.

    Args:
        model: the frozen base with phi applied by forward hooks.
        phi: (K, P) float32 leaf.
        batch: this worker's part of the global batch.
        config: lambda, beta, rho, and how the gradients are reconciled.
        optimizer: updates phi only. Its learning rate, or that of each row, is already set.
        clip: the merged gradient is clipped to this norm.
        reduce: sums over workers.
        look: perturbs only every `config.perturb_every` steps. Needs scope `step` and one adapter.
    """
    if config.scope == "step":  # e comes from the whole effective batch, over all workers and micro-batches
        g, measured = sharp_gradient(phi, lambda: gradients(model, phi, batch, config, reduce), config, look)
    else:  # e comes from each micro-batch, as in the authors' trainer; only the result is summed
        g, measured = _microbatch_sharp_gradient(model, phi, batch, config, reduce)
    length = norm(g)  # (K, 1)
    # The gradients were summed over workers: one bad worker makes all of them skip.
    finite: list[bool] = length.isfinite()[:, 0].tolist()
    if any(finite):
        phi.grad = g.mul_(torch.where(length.isfinite(), clip / length.clamp(min=clip), torch.nan).to(g.dtype))
        optimizer.step()  # from phi, with the gradient at phi + e
        phi.grad = None
    return _log(measured, length, finite, batch, config)


def sharp_gradient(
    phi: Tensor, gradients: Callable[[], Gradients], config: Setting, look: LookSam | None = None
) -> tuple[Tensor, Measured]:
    """g_PC (K, P) at phi + e (lines 3 to 9 of Algorithm 1), or at phi with rho = 0; and the measurements."""
    at_phi = gradients()
    g, measured = reconcile(at_phi.g, config), Measured.of(at_phi, config.eps)
    if not config.sam:
        return g, measured
    if look is not None and not look.due:
        return look.sharpened(g), measured
    with perturbed(phi, perturbation(g, config.rho, config.eps)):
        at_peak = gradients()
    sharp = reconcile(at_peak.g, config)
    if look is not None:
        look.keep(g, sharp)
    return sharp, replace(measured, at_peak=at_peak.sums)


def reconcile(g: Tensor, config: Setting) -> Tensor:
    """g_PC (K, P) from the gradients of the objectives (1 or 2, K, P)."""
    if len(g) == 1:
        return g[0]
    merged = merge(g[0], g[1], config.lambda_, config.pcgrad, config.eps)
    if isinstance(config, Together):  # rows without DPO take the plain step
        return torch.where(config.lambda_ > 0, merged, g[0])
    return merged


def gradients(model: Model, phi: Tensor, batch: Batch, config: Setting, reduce: Reduce) -> Gradients:
    """g_SFT and g_DPO of the global batch at the current phi, both from one forward pass of each micro-batch."""
    objectives, adapters = 2 if config.dpo else 1, len(phi)
    g: Tensor | None = None
    sums = phi.new_zeros(5, adapters, 1)
    # Row k of phi affects only the losses of adapter k, so the gradient of the sum holds each adapter's gradient.
    directions = torch.eye(objectives, device=phi.device)[:, :, None, None].expand(-1, -1, adapters, 1)
    per_token = batch.tokens if config.reduction == "token" else batch.edits
    for part in batch.parts:
        logp = answer_logprobs(model, part.rows, adapters * part.edits).view(2, adapters, part.edits)
        reference = part.reference.view_as(logp)
        if isinstance(config, Together):
            reference = config.known(reference, logp)
        losses = torch.stack([sft_loss(logp, per_token), dpo_loss(logp, reference, config.beta, batch.pairs)])
        # One exact backward for both (a batch of two vector-Jacobian products) walks the graph once instead of twice.
        # It is also the only way with a sharded base: a kept graph fails under ZeRO-3.
        chosen = losses[:objectives]
        (found,) = torch.autograd.grad([chosen], [phi], grad_outputs=[directions], is_grads_batched=True)
        g = found.contiguous() if g is None else g.add_(found)
        del found  # otherwise it stays in memory during the next forward pass
        below = (logp[0] <= part.bound).sum(-1, keepdim=True)[None]
        sums += torch.cat([losses, logp.sum(-1, keepdim=True), below]).detach()
    if g is None:  # a worker without edits in this batch
        g = phi.new_zeros(objectives, *phi.shape)
    reduce(g)
    reduce(sums)
    return Gradients(g, sums)


def _microbatch_sharp_gradient(
    model: Model, phi: Tensor, batch: Batch, config: Setting, reduce: Reduce
) -> tuple[Tensor, Measured]:
    """As `sharp_gradient`, but e comes from each micro-batch alone. Micro-batches are weighted by their edits.

    The cosine is the mean over micro-batches with these weights. There is a conflict if any micro-batch has one.
    """
    g, sums, angles = torch.zeros_like(phi), phi.new_zeros(2, 5, len(phi), 1), phi.new_zeros(2, len(phi), 1)
    for part in batch.parts:
        tokens = torch.as_tensor(part.tokens).clamp(min=1)  # it may be empty
        alone = Batch([part], max(1, part.edits), tokens, part.unpaired)
        share = part.edits / batch.edits
        own, found = sharp_gradient(phi, lambda alone=alone: gradients(model, phi, alone, config, lambda t: t), config)
        g += share * own
        for row, of in zip(sums, (found.at_phi, found.at_phi if found.at_peak is None else found.at_peak), strict=True):
            row[:2] += share * of[:2]
            row[2:] += of[2:]
        if found.cosine is not None and found.conflict is not None:
            angles += torch.stack([share * found.cosine, found.conflict])
    reduce(g)
    reduce(sums)
    reduce(angles)
    at_peak = sums[1] if config.sam else None
    return g, Measured(sums[0], at_peak, *((angles[0], angles[1] > 0) if config.dpo else ()))


def _log(measured: Measured, norm: Tensor, finite: list[bool], batch: Batch, config: Setting) -> list[dict[str, Any]]:
    """One row of the curves table per adapter. Here the step waits for the device."""
    sft, dpo, new, old, below = measured.at_phi.double()
    columns = {"loss_sft": sft, "loss_dpo": dpo, "logp_new": new / batch.edits, "logp_old": old / batch.pairs}
    columns |= {"below": below}
    columns |= {"cosine": measured.cosine, "conflict": measured.conflict}
    columns |= {"sharpness": measured.sharpness(config.lambda_), "grad_norm": norm}
    shown = {name: column for name, column in columns.items() if column is not None}
    table = torch.cat([column.double() for column in shown.values()], 1).tolist()
    logs = []
    for own, good, values in zip(config.each(len(norm)), finite, table, strict=True):
        log: dict[str, Any] = dict.fromkeys(columns) | dict(zip(shown, values, strict=True)) | {"skipped": not good}
        log["below"] = int(log["below"])
        if not own.dpo:
            log |= dict.fromkeys(("loss_dpo", "cosine", "conflict"))
        elif log["conflict"] is not None:
            log["conflict"] = bool(log["conflict"])
        if not own.sam:
            log["sharpness"] = None
        logs.append(log)
    return logs
