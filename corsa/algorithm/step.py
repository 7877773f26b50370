"""One optimizer step of CoRSA (Algorithm 1), and those of its parts that depend on phi and the batch.

Plain LoRA and the ablations of Table 9 are settings of this step (`corsa.config.STEPS`), not other code. Its objectives
are a list (`corsa.algorithm.objectives`). K adapters trained together (`corsa.algorithm.row_settings`) are K rows of
phi, independent of each other: a number of one adapter becomes a column (K, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from corsa.algorithm import curves
from corsa.algorithm.batch import Batch
from corsa.algorithm.curves import Measured
from corsa.algorithm.logprobs import Model
from corsa.algorithm.objectives import losses, running, weights
from corsa.algorithm.pcgrad import Products, merge, norm, products
from corsa.algorithm.row_settings import RowSettings
from corsa.algorithm.sam import LookSam, perturbation_at, perturbed

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all workers, in place."""


class Optimizer(Protocol):
    """Updates phi by `phi.grad`. With several rows, a row with a non-finite gradient is not changed."""

    def step(self) -> Any: ...


@dataclass
class Gradients:
    """Gradients g (n, K, P) of the n objectives that run, and sums over the batch for the log (`curves.Measured`)."""

    g: Tensor
    sums: Tensor

    @cached_property
    def products(self) -> Products:
        """The inner products of the gradients."""
        return products(self.g)

    def merged(self, settings: RowSettings) -> Tensor:
        """g_PC, (K, P)."""
        how, eps = settings.shared.pcgrad, settings.shared.eps
        return merge(self.g, {} if how == "off" else self.products, weights(settings), how, eps)

    def measured(self, settings: RowSettings) -> Measured:
        """What the log shows of them."""
        return Measured.of(self.sums, self.products if len(self.g) > 1 else None, settings)


def corsa_step(
    model: Model,
    phi: Tensor,
    batch: Batch,
    settings: RowSettings,
    optimizer: Optimizer,
    clip: float,
    reduce: Reduce,
    look: LookSam | None = None,
    direction: Tensor | None = None,
) -> list[dict[str, Any]]:
    """Algorithm 1: one update of phi from one batch. Returns one row of the learning curves per row of phi.

    Args:
        model: the frozen base with phi applied by forward hooks.
        phi: (K, P) float32 leaf.
        batch: this worker's part of the global batch.
        settings: of the K rows: the weights of the objectives, rho, and how the gradients are reconciled.
        optimizer: updates phi only. Its learning rate, or that of each row, is already set.
        clip: the merged gradient is clipped to this norm.
        reduce: sums over workers.
        look: perturbs only every `perturb_every` steps. Needs scope `step` and one adapter.
        direction: (K, P), of e if `perturbation` is random: then one gradient is computed, at phi + e. Needs scope
            `step`.
    """
    if settings.shared.scope == "step":  # e comes from the whole effective batch, over all workers and micro-batches
        g, measured = sharp_gradient(
            phi, lambda: gradients(model, phi, batch, settings, reduce), settings, look, direction
        )
    else:  # e comes from each micro-batch, as in the authors' trainer; only the result is summed
        g, measured = _microbatch_sharp_gradient(model, phi, batch, settings, reduce)
    length = norm(g)  # (K, 1)
    # The gradients were summed over workers: one bad worker makes all of them skip.
    finite: list[bool] = length.isfinite()[:, 0].tolist()
    if any(finite):
        phi.grad = g.mul_(torch.where(length.isfinite(), clip / length.clamp(min=clip), torch.nan).to(g.dtype))
        optimizer.step()  # from phi, with the gradient at phi + e
        phi.grad = None
    return curves.rows(measured, length, finite, batch, settings)


def sharp_gradient(
    phi: Tensor,
    gradients: Callable[[], Gradients],
    settings: RowSettings,
    look: LookSam | None = None,
    direction: Tensor | None = None,
) -> tuple[Tensor, Measured]:
    """g_PC (K, P) at phi + e (lines 3 to 9 of Algorithm 1), or at phi with rho = 0; and the measurements.

    With a `direction` given, e does not depend on the gradient, and the measurements are those at phi + e.
    """
    if direction is not None:
        with perturbed(phi, _e(phi, direction, settings)):
            there = gradients()
        return there.merged(settings), there.measured(settings)
    at_phi = gradients()
    g, measured = at_phi.merged(settings), at_phi.measured(settings)
    if not settings.any("rho"):
        return g, measured
    if look is not None and not look.due:
        return look.sharpened(g), measured
    with perturbed(phi, _e(phi, g, settings)):
        at_peak = gradients()
    sharp = at_peak.merged(settings)
    if look is not None:
        look.keep(g, sharp)
    length = norm(g).clamp(min=settings.shared.eps)
    change = norm(g.sub_(sharp)) / length  # in place: g is not used any more
    return sharp, replace(measured, at_peak=at_peak.sums, change=change)


def _e(phi: Tensor, direction: Tensor, settings: RowSettings) -> Tensor:
    shared = settings.shared
    return perturbation_at(phi.detach(), direction, settings.column("rho"), shared.eps, shared.radius)


def gradients(model: Model, phi: Tensor, batch: Batch, settings: RowSettings, reduce: Reduce) -> Gradients:
    """The objectives' gradients over the global batch at the current phi, from one forward pass of each micro-batch."""
    objectives, adapters = len(running(settings)), len(settings.rows)
    g: Tensor | None = None
    sums = phi.new_zeros(objectives + 3, adapters, 1)
    # Row k of phi affects only the losses of adapter k, so the gradient of the sum holds each adapter's gradient.
    directions = torch.eye(objectives, device=phi.device)[:, :, None, None].expand(-1, -1, adapters, 1)
    for part in batch.parts:
        found, counted = losses(model, part, batch, settings)
        # One exact backward for all (a batch of vector-Jacobian products) walks the graph once.
        # It is also the only way with a sharded base: a kept graph fails under ZeRO-3.
        (own,) = torch.autograd.grad([found], [phi], grad_outputs=[directions], is_grads_batched=True)
        g = own.contiguous() if g is None else g.add_(own)
        del own  # otherwise it stays in memory during the next forward pass
        sums += torch.cat([found, counted]).detach()
    if g is None:  # a worker without edits in this batch
        g = phi.new_zeros(objectives, *phi.shape)
    reduce(g)
    reduce(sums)
    return Gradients(g, sums)


def _microbatch_sharp_gradient(
    model: Model, phi: Tensor, batch: Batch, settings: RowSettings, reduce: Reduce
) -> tuple[Tensor, Measured]:
    """As `sharp_gradient`, but e comes from each micro-batch alone. Micro-batches are weighted by their edits.

    The cosine and the change are means over micro-batches with these weights. There is a conflict if any micro-batch
    has one.
    """
    objectives, adapters = len(running(settings)), len(settings.rows)
    g, angles, change = torch.zeros_like(phi), phi.new_zeros(2, adapters, 1), phi.new_zeros(adapters, 1)
    sums = phi.new_zeros(2, objectives + 3, adapters, 1)
    for part in batch.parts:
        alone, share = Batch([part], part.edits, part.counts), part.edits / batch.edits
        own, found = sharp_gradient(
            phi, lambda alone=alone: gradients(model, phi, alone, settings, lambda t: t), settings
        )
        g += share * own
        for row, of in zip(sums, (found.at_phi, found.at_phi if found.at_peak is None else found.at_peak), strict=True):
            row[:objectives] += share * of[:objectives]
            row[objectives:] += of[objectives:]
        if found.cosine is not None and found.conflict is not None:
            angles += torch.stack([share * found.cosine, found.conflict])
        if found.change is not None:
            change += share * found.change
    for tensor in (g, sums, angles, change):
        reduce(tensor)
    measured = Measured(sums[0], *((None, angles[0], angles[1] > 0) if objectives > 1 else ()))
    return g, replace(measured, at_peak=sums[1], change=change) if settings.any("rho") else measured
