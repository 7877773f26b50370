"""The objectives of an update: L_Update = L_SFT + lambda * L_DPO (paper, Section 3, Eq. 4), and any further ones.

`OBJECTIVES` lists them. A step runs L_SFT, with weight 1, and the objectives whose weight is above 0 in its settings.
All read the same forward pass. PCGrad reconciles their gradients (`corsa.algorithm.pcgrad.merge`). Each has a column
`loss_NAME` in the learning curves.

To add an objective, write its loss here, add an `Objective` to the list, and add the field of its weight to
`corsa.config.StepConfig` and to `StepConfig.weights`.

- A loss is a function of `Answers`: log-probabilities of both answers under the model and under the base, and counts.
  It returns `answers.sum(values of the edits) / a count of the whole batch`. So the losses of the parts of a batch
  (workers, micro-batches) add up to the loss of the batch.
- A loss that needs more of the logits than log p of the answers has a `per_token`: a function from the logits of a
  forward pass to one number for each answer token. `Answers.own` holds the sums of these numbers over each answer. A
  divergence from the base is such a function. The base's stored values (such as its top-k log-probabilities) are then
  a field of `corsa.algorithm.packing.Rows`, in the order of `target`, and no step runs a second model.
- A loss over other edits than those that the round teaches (facts of earlier rounds, questions whose answers must
  stay) has a `role`. Such edits are further triplets of the batch with this role
  (`corsa.algorithm.packing.Triplet.role`). They are packed into the same rows. An objective reads the edits of its own
  role: its sums and counts leave out the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from corsa.algorithm.batch import Batch, Counts, MicroBatch
from corsa.algorithm.logprobs import Model, PerToken, answer_sums, log_p
from corsa.algorithm.packing import ANCHOR, EARLIER, NO_OLD_ANSWER, TAUGHT
from corsa.algorithm.row_settings import RowSettings
from corsa.config import StepConfig


@dataclass(frozen=True)
class Answers:
    """What one objective reads of a forward pass over E edits of each of K adapters.

    Attributes:
        logp, reference: log p(y|x) in nats under the model and under the base, (2, K, E), new answers first.
        own: the sums of the objective's `per_token` over the answers, (2, K, E), if it has one.
        lengths: tokens of the answers, (2, K, E).
        counts: of the edits of the objective's role in the whole batch.
        mask: which edits the objective reads, broadcast to (K, E); None: all.
    """

    logp: Tensor
    own: Tensor | None
    part: MicroBatch
    counts: Counts
    mask: Tensor | None

    @property
    def reference(self) -> Tensor:
        return self.part.reference.view_as(self.logp)

    @property
    def lengths(self) -> Tensor:
        return self.part.lengths.view_as(self.logp)

    @property
    def paired(self) -> Tensor:
        """Which edits have an old answer, (K, E)."""
        return self.reference[1] != NO_OLD_ANSWER

    def sum(self, values: Tensor) -> Tensor:
        """Sums of values (K, E) over the edits that the objective reads: (K, 1)."""
        if self.mask is not None:
            values = torch.where(self.mask, values, 0.0)
        return values.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Objective:
    """One objective.

    Attributes:
        name: names its column of the learning curves, `loss_NAME`.
        loss: its loss, (K, 1). Row k of phi affects only entry k.
        weight: the field of `StepConfig` with its weight, 0 for a step that does not run it. None: always 1.
        role: the edits that it reads.
        per_token: what it reads of the logits, besides log p.
    """

    name: str
    loss: Callable[[Answers, RowSettings], Tensor]
    weight: str | None = None
    role: int = TAUGHT
    per_token: PerToken | None = None

    @property
    def column(self) -> str:
        """Its column of the learning curves."""
        return f"loss_{self.name}"

    def mask(self, part: MicroBatch, settings: RowSettings) -> Tensor | None:
        """Which edits it reads, broadcast to (K, E): those of its role, in the rows that run it. None: all."""
        role, runs = part.of_role(self.role), settings.runs(self.weight)
        return role if runs is None else runs if role is None else role & runs


def sft(answers: Answers, settings: RowSettings) -> Tensor:
    """L_SFT = - sum_i logp(y_new_i|x_i) / answer tokens (`reduction="token"`) or edits (`"sequence"`)."""
    count = answers.counts.tokens if settings.shared.reduction == "token" else answers.counts.edits
    return answers.sum(-answers.logp[0]) / count


def dpo(answers: Answers, settings: RowSettings) -> Tensor:
    """L_DPO = - sum_i log sigmoid(beta [(logp - logp_ref)(y_new_i) - (logp - logp_ref)(y_old_i)]) / pairs."""
    gain = answers.logp - answers.reference
    return answers.sum(-F.logsigmoid(settings.column("beta") * (gain[0] - gain[1]))) / answers.counts.pairs


OBJECTIVES = (
    Objective("sft", sft),
    Objective("dpo", dpo, weight="lambda_"),
    Objective("replay", sft, weight="replay", role=EARLIER),
    Objective("anchor", sft, weight="anchor", role=ANCHOR),
)
"""All objectives. The first has weight 1."""


def running(settings: RowSettings) -> list[Objective]:
    """The objectives that at least one row runs, L_SFT first."""
    return [objective for objective in OBJECTIVES if settings.any(objective.weight)]


def weights(settings: RowSettings) -> list[float | Tensor]:
    """The weights of the objectives that run, without that of L_SFT, which is 1: numbers, or columns (K, 1)."""
    return [settings.column(objective.weight) for objective in running(settings) if objective.weight]


def losses(model: Model, part: MicroBatch, batch: Batch, settings: RowSettings) -> tuple[Tensor, Tensor]:
    """One forward pass over a part of a batch.

    Returns the part's share of each loss that runs (n, K, 1), and sums (3, K, 1): log p of the new and of the old
    answers over the edits that the round teaches, and the number of new answers of any role not above their bound.
    """
    objectives, shape = running(settings), (2, len(settings.rows), part.edits)
    readers = {objective: objective.per_token for objective in objectives if objective.per_token}
    sums = answer_sums(model, part.rows, shape[1] * shape[2], [log_p, *readers.values()])
    logp, *own = (total.view(shape) for total in sums)
    read = dict(zip(readers, own, strict=True))
    found = []
    for objective in objectives:
        mask, counts = objective.mask(part, settings), batch.counts.get(objective.role, Counts())
        values = _cut(read[objective], mask) if objective in read else None
        answers = Answers(_cut(logp, mask), values, part, counts, mask)
        found.append(objective.loss(answers, settings))
    taught = part.of_role(TAUGHT)
    below = logp[:1] <= part.bound
    logp = logp if taught is None else torch.where(taught, logp, 0.0)
    return torch.stack(found), torch.cat([logp, below]).sum(-1, keepdim=True)


def update_loss(config: StepConfig, log: Mapping[str, Any]) -> float:
    """L_Update of one row of the curves table: the weighted sum of its losses."""
    weights = {o.column: 1.0 if o.weight is None else getattr(config, o.weight) for o in OBJECTIVES}
    return sum(weight * log[column] for column, weight in weights.items() if log.get(column) is not None)


def _cut(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values, without gradient where the mask is False: a non-finite gradient there, times 0, would spoil those of
    the other objectives too.
    """
    return values if mask is None else torch.where(mask, values, values.detach())
