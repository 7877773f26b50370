"""One optimizer step of CoRSA (Algorithm 1), and everything it is made of that needs to know phi and the batch.

Plain LoRA and the ablations of Table 9 are settings of this step (`corsa.config.STEPS`); there is no second one. K
adapters trained together (`corsa.algorithm.row_settings`) take it row by row of phi: every quantity below has a column
(K, 1) where one adapter has a number, and no row sees another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from corsa.algorithm.logprobs import Model, answer_logprobs
from corsa.algorithm.losses import dpo_loss, sft_loss
from corsa.algorithm.packing import NO_OLD_ANSWER, Rows
from corsa.algorithm.pcgrad import dot, merge
from corsa.algorithm.row_settings import Together
from corsa.algorithm.sam import LookSam, perturbation, perturbed
from corsa.config import StepConfig

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all workers, in place."""

Setting = StepConfig | Together
"""The step's settings: one adapter's, or those of K that are trained together."""


class Optimizer(Protocol):
    """Updates phi by `phi.grad`. Of several rows, one whose gradient is not finite stays as it is."""

    def step(self) -> Any: ...


@dataclass(frozen=True)
class MicroBatch:
    """Edits of one forward pass: their rows, reference log-probabilities in nats, and number of new tokens.

    For one adapter `reference` is (2, E) and `tokens` a number; for K, each with E edits of its own, (2, K, E) and
    (K, 1).
    """

    rows: Sequence[Rows]
    reference: Tensor
    tokens: int | Tensor

    @property
    def edits(self) -> int:
        """How many edits an adapter has, E."""
        return self.reference.shape[-1]

    @property
    def unpaired(self) -> Tensor:
        """How many of them have no old answer, of each adapter: L_DPO is a mean over the others."""
        return (self.reference[1] == NO_OLD_ANSWER).sum(-1, keepdim=True)


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch, with the counts of the whole of it (all workers), of each adapter."""

    parts: Sequence[MicroBatch]
    edits: int
    tokens: int | Tensor
    unpaired: int | Tensor = 0

    @property
    def pairs(self) -> Tensor:
        """Edits with an old answer, of each adapter (1 where there is none: then the sum over them is 0)."""
        return torch.as_tensor(self.edits - self.unpaired).clamp(min=1)


@dataclass
class Gradients:
    """g = (1 or 2, K, P): of L_SFT and, where lambda > 0, of L_DPO; with sums over the batch for the log.

    `sums` (4, K, 1) holds L_SFT, L_DPO, sum of logp_new, sum of logp_old (nats).
    """

    g: Tensor
    sums: Tensor

    def loss(self, lam: float | Tensor) -> Tensor:
        """L_Update = L_SFT + lambda * L_DPO (Eq. 4): (K, 1)."""
        return self.sums[0] + lam * self.sums[1]


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
    """Algorithm 1: one update of phi from one batch. Returns what the learning curves show, for each row of phi.

    Args:
        model: the frozen base with phi applied by forward hooks.
        phi: (K, P) float32 leaf.
        batch: this worker's part of the global batch.
        config: lambda, beta, rho, and how the gradients are reconciled.
        optimizer: over phi alone; its learning rate, or that of each row, is already set.
        clip: the merged gradient is clipped to this norm.
        reduce: sums over workers.
        look: perturb in some of the steps alone (`config.perturb_every`), with scope `step` and one adapter.
    """
    if config.scope == "step":  # e is made from the whole effective batch, over all workers and micro-batches
        at_phi, at_peak, g = sharp_gradient(phi, lambda: gradients(model, phi, batch, config, reduce), config, look)
    else:  # e is made from each micro-batch, as the authors' trainer does; only the result is summed
        at_phi, at_peak, g = _microbatch_sharp_gradient(model, phi, batch, config, reduce)
    norm = torch.linalg.vector_norm(g, dim=-1, keepdim=True)  # (K, 1)
    # The gradients were summed over workers: one bad worker makes all of them skip.
    finite: list[bool] = norm.isfinite()[:, 0].tolist()
    if any(finite):
        phi.grad = g.mul_(torch.where(norm.isfinite(), clip / norm.clamp(min=clip), torch.nan))
        optimizer.step()  # from phi, with the gradient at phi + e
        phi.grad = None
    return _log(at_phi, at_peak, norm, finite, batch, config)


def sharp_gradient(
    phi: Tensor, gradients: Callable[[], Gradients], config: Setting, look: LookSam | None = None
) -> tuple[Gradients, Gradients | None, Tensor]:
    """g_PC at phi + e (lines 3 to 9 of Algorithm 1); with rho = 0, g_PC at phi. Returns (at phi, at phi + e, g_PC)."""
    at_phi = gradients()
    g = reconcile(at_phi.g, config)
    if not config.sam:
        return at_phi, None, g
    if look is not None and not look.due:
        return at_phi, None, look.sharpened(g)
    with perturbed(phi, perturbation(g, config.rho, config.eps)):
        at_peak = gradients()
    sharp = reconcile(at_peak.g, config)
    if look is not None:
        look.keep(g, sharp)
    return at_phi, at_peak, sharp


def reconcile(g: Tensor, config: Setting) -> Tensor:
    """g_PC (K, P) from the gradients of the objectives (1 or 2, K, P)."""
    if len(g) == 1:
        return g[0]
    merged = merge(g[0], g[1], config.lambda_, config.pcgrad, config.eps)
    if isinstance(config, Together):  # a row without DPO beside others takes the plain step
        return torch.where(config.lambda_ > 0, merged, g[0])
    return merged


def gradients(model: Model, phi: Tensor, batch: Batch, config: Setting, reduce: Reduce) -> Gradients:
    """g_SFT and g_DPO of the global batch at the present phi: both from one forward pass of each micro-batch."""
    objectives, adapters = 2 if config.dpo else 1, len(phi)
    g: Tensor | None = None
    sums = phi.new_zeros(4, adapters, 1)
    # Row k of phi is in the losses of adapter k alone, so the gradient of their sum holds each one's own.
    directions = torch.eye(objectives, device=phi.device)[:, :, None, None].expand(-1, -1, adapters, 1)
    per_token = batch.tokens if config.reduction == "token" else batch.edits
    for part in batch.parts:
        logp = answer_logprobs(model, part.rows, adapters * part.edits).view(2, adapters, part.edits)
        reference = part.reference.view_as(logp)
        if isinstance(config, Together):
            reference = config.known(reference, logp)
        losses = torch.stack([sft_loss(logp, per_token), dpo_loss(logp, reference, config.beta, batch.pairs)])
        # One backward for both, exact (a batch of two vector-Jacobian products): half the walks of two calls
        # through the graph, and the only way that works where the base is sharded (a kept graph fails under ZeRO-3).
        chosen = losses[:objectives]
        (found,) = torch.autograd.grad([chosen], [phi], grad_outputs=[directions], is_grads_batched=True)
        g = found.contiguous() if g is None else g.add_(found)
        del found  # or it would be held through the next forward pass
        sums += torch.cat([losses, logp.sum(-1, keepdim=True)]).detach()
    if g is None:  # a worker without edits in this batch
        g = phi.new_zeros(objectives, *phi.shape)
    reduce(g)
    reduce(sums)
    return Gradients(g, sums)


def _microbatch_sharp_gradient(
    model: Model, phi: Tensor, batch: Batch, config: Setting, reduce: Reduce
) -> tuple[Gradients, Gradients | None, Tensor]:
    """As `sharp_gradient`, with e made from each micro-batch alone; parts weigh as many edits as they hold."""
    g, sums = torch.zeros_like(phi), phi.new_zeros(2, 4, len(phi), 1)
    for part in batch.parts:
        tokens = torch.as_tensor(part.tokens).clamp(min=1)  # it may be empty
        alone = Batch([part], max(1, part.edits), tokens, part.unpaired)
        share = part.edits / batch.edits
        low, high, own = sharp_gradient(
            phi, lambda alone=alone: gradients(model, phi, alone, config, lambda t: t), config
        )
        g += share * own
        for row, found in zip(sums, (low, high or low), strict=True):
            row[:2] += share * found.sums[:2]
            row[2:] += found.sums[2:]
    reduce(g)
    reduce(sums)
    both = phi.new_zeros(1, *phi.shape)
    return Gradients(both, sums[0]), Gradients(both, sums[1]) if config.sam else None, g


def _log(
    at_phi: Gradients, at_peak: Gradients | None, norm: Tensor, finite: list[bool], batch: Batch, config: Setting
) -> list[dict[str, Any]]:
    """A row of the curves table for each adapter (here the step waits for the device)."""
    columns = [*at_phi.sums, norm]
    if len(at_phi.g) == 2:
        a, b = at_phi.g
        columns.append(dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().clamp(min=config.eps))
    if at_peak is not None:
        columns.append(at_peak.loss(config.lambda_) - at_phi.loss(config.lambda_))
    logs = []
    pairs_of = batch.pairs.reshape(-1, 1).expand(len(norm), 1)[:, 0].tolist()
    rows = zip(config.each(len(norm)), finite, torch.cat(columns, 1).tolist(), pairs_of, strict=True)
    for own, good, values, pairs in rows:
        sft, dpo, new, old, length, *more = values
        cosine = more[0] if own.dpo and len(at_phi.g) == 2 else None
        logs.append(
            {
                "loss_sft": sft,
                "loss_dpo": dpo if own.dpo else None,
                "logp_new": new / batch.edits,
                "logp_old": old / pairs,
                "cosine": cosine,
                "conflict": None if cosine is None else cosine < 0,
                "sharpness": more[-1] if own.sam and at_peak is not None else None,
                "grad_norm": length,
                "skipped": not good,
            }
        )
    return logs
