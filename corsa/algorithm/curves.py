"""What a step measures, and its row of the learning curves."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from corsa.algorithm.batch import Batch
from corsa.algorithm.objectives import running, weights
from corsa.algorithm.packing import TAUGHT
from corsa.algorithm.pcgrad import Products, cosine
from corsa.algorithm.row_settings import RowSettings

COLUMNS = (
    "loss_sft",
    "loss_dpo",
    "logp_new",
    "logp_old",
    "cosine",
    "conflict",
    "sharpness",
    "gradient_change",
    "grad_norm",
    "below",
    "skipped",
)
"""Columns of every row, None where a step has no value. Rows that run another objective have its column too."""


@dataclass(frozen=True)
class Measured:
    """What the log shows of a step.

    Attributes:
        at_phi: sums over the batch (n + 3, K, 1): the n losses, log p of the new and of the old answers in nats, and
            the number of new answers that are not above their bound.
        at_peak: the same at phi + e, if the step was perturbed.
        cosine: the smallest cosine between two objectives' gradients at phi, (K, 1); None with one objective.
        conflict: whether it is below 0.
        change: |g_PC(phi + e) - g_PC(phi)| / |g_PC(phi)|, (K, 1), if the step was perturbed. In a base that is not
            float32, the rounding of both gradients is part of it.
    """

    at_phi: Tensor
    at_peak: Tensor | None = None
    cosine: Tensor | None = None
    conflict: Tensor | None = None
    change: Tensor | None = None

    @classmethod
    def of(cls, sums: Tensor, inner: Products | None, settings: RowSettings) -> Measured:
        """The measurements at phi; `inner` holds the products of the gradients, if there are several."""
        if inner is None:
            return cls(sums)
        runs = [settings.runs(objective.weight) for objective in running(settings)]
        angles = []
        for i, j in combinations(range(len(runs)), 2):
            angle = cosine(inner, i, j, settings.shared.eps)
            for own in (runs[i], runs[j]):
                angle = angle if own is None else torch.where(own, angle, torch.inf)  # the row does not run it
            angles.append(angle)
        smallest = torch.stack(angles).amin(0)
        return cls(sums, cosine=smallest, conflict=smallest < 0)

    def sharpness(self, settings: RowSettings) -> Tensor | None:
        """L_Update(phi + e) - L_Update(phi), (K, 1)."""
        if self.at_peak is None:
            return None
        rise = self.at_peak - self.at_phi
        return sum((weight * loss for weight, loss in zip(weights(settings), rise[1:-3], strict=True)), start=rise[0])


def rows(
    measured: Measured, norm: Tensor, finite: list[bool], batch: Batch, settings: RowSettings
) -> list[dict[str, Any]]:
    """One row of the curves table per adapter. Here the step waits for the device."""
    objectives, taught = running(settings), batch.counts[TAUGHT]
    *losses, new, old, below = measured.at_phi.double()
    found = {objective.column: loss for objective, loss in zip(objectives, losses, strict=True)}
    found |= {"logp_new": new / taught.edits, "logp_old": old / taught.pairs, "grad_norm": norm, "below": below}
    found |= {"cosine": measured.cosine, "conflict": measured.conflict}
    found |= {"sharpness": measured.sharpness(settings), "gradient_change": measured.change}
    found = {name: column for name, column in found.items() if column is not None}
    table = torch.cat([column.double() for column in found.values()], 1).tolist()
    logs = []
    for config, good, values in zip(settings.rows, finite, table, strict=True):
        own = {o.column for o in objectives if o.weight is None or getattr(config, o.weight) > 0}
        idle = {o.column for o in objectives} - own
        idle |= {"cosine", "conflict"} if len(own) < 2 else set()
        idle |= {"sharpness", "gradient_change"} if not config.sam else set()
        log = dict.fromkeys(COLUMNS) | {n: v for n, v in zip(found, values, strict=True) if n not in idle}
        log["conflict"] = None if log["conflict"] is None else bool(log["conflict"])
        logs.append(log | {"below": int(log["below"] or 0), "skipped": not good})
    return logs
