"""A batch of edits: its micro-batches, and the counts that means over it are taken over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from corsa.algorithm.packing import TAUGHT, Rows, Triplet


@dataclass(frozen=True)
class Counts:
    """Edits of one role, tokens of their new answers, and edits without an old answer: numbers, or columns (K, 1).

    Means divide by `edits`, `tokens` or `pairs`, so none of these is 0. A sum over no edits stays 0.
    """

    edits: int | Tensor = 1
    tokens: int | Tensor = 1
    unpaired: int | Tensor = 0

    @property
    def pairs(self) -> Tensor:
        """Edits with an old answer."""
        return torch.as_tensor(self.edits - self.unpaired).clamp(min=1)


def counts(adapters: Sequence[Sequence[Triplet]], device: torch.device | str) -> dict[int, Counts]:
    """The counts of each role among the edits of K adapters."""
    found = {}
    for role in {t.role: None for own in adapters for t in own}:
        edits = [[t for t in own if t.role == role] for own in adapters]
        table = [[sum(len(t.new) for t in own), sum(not t.old for t in own)] for own in edits]
        tokens, unpaired = torch.tensor(table, dtype=torch.float32, device=device).split(1, dim=1)
        lengths = list(map(len, edits))
        alike = lengths[0] if len(set(lengths)) == 1 else torch.tensor(lengths, device=device)[:, None].clamp(min=1)
        found[role] = Counts(alike, tokens.clamp(min=1), unpaired)
    return found


@dataclass(frozen=True)
class MicroBatch:
    """The edits of one forward pass: E per adapter, for K adapters.

    Attributes:
        rows: their packed rows.
        reference: log-probabilities under the base model in nats, (2, K, E), new answers first; (2, E) for one adapter.
        counts: the counts of these edits by role, as used with scope `microbatch`.
        role: (K, E); None: all edits are `TAUGHT`.
        bound: log p in nats that a new answer must exceed to count as learnt, one for all or (K, E). It has no effect
            on the update.
    """

    rows: Sequence[Rows]
    reference: Tensor
    counts: Mapping[int, Counts] = field(default_factory=dict)
    role: Tensor | None = None
    bound: float | Tensor = -math.inf

    @property
    def edits(self) -> int:
        """Edits per adapter, of all roles."""
        return self.reference.shape[-1]

    @property
    def lengths(self) -> Tensor:
        """Tokens of the answers, as `reference`."""
        total = torch.zeros_like(self.reference).flatten()
        for rows in self.rows:
            total.index_add_(0, rows.answer, torch.ones_like(rows.answer, dtype=total.dtype))
        return total.view_as(self.reference)

    def of_role(self, role: int) -> Tensor | None:
        """Which edits have this role, (K, E); None if all have it."""
        if self.role is not None:
            return self.role == role
        return None if role == TAUGHT else torch.zeros_like(self.reference[0], dtype=torch.bool)


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch.

    `edits` (per adapter, of all roles) and `counts` (by role) are those of the whole batch, over all workers.
    """

    parts: Sequence[MicroBatch]
    edits: int
    counts: Mapping[int, Counts]
