"""What the batches of a round hold: its own edits, each once an epoch, and beside them what is taught again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from corsa.algorithm.packing import NO_OLD_ANSWER, Triplet
from corsa.config.steps import RoundConfig
from corsa.models.encoding import Encoder
from corsa.training.tokens import batch_order


@dataclass(frozen=True)
class Material:
    """The edits of a round: its own; then the facts of earlier rounds that still hold (`training.replay`); then
    everyday questions with the base model's answers (`training.anchor`).
    """

    own: Sequence[Triplet]
    earlier: Sequence[Triplet] = ()
    anchors: Sequence[Triplet] = ()

    @property
    def all(self) -> list[Triplet]:
        """Everything that a batch may hold; batches are positions in it."""
        return [*self.own, *self.earlier, *self.anchors]

    def batches(self, config: RoundConfig, epoch: int) -> list[np.ndarray]:
        """The global batches of an epoch (from 0), as positions in `all`. They follow from seed, round and epoch alone.

        Every own edit occurs once an epoch. Earlier facts come in passes over all of them, each in an order of its own,
        from step to step and from epoch to epoch, so none is drawn twice before each was drawn once. So do the anchors.
        """
        training, seed = config.training, {"seed": config.seed, "round_": config.round}
        own = batch_order(len(self.own), training.own, **seed, epoch=epoch)
        first, before = epoch * len(own), len(self.own) + len(self.earlier)
        return [
            np.concatenate(
                [
                    chosen,
                    len(self.own) + drawn(len(self.earlier), training.replayed, step, **seed),
                    before + drawn(len(self.anchors), training.anchored, step, **seed),
                ]
            )
            for step, chosen in enumerate(own, start=first)
        ]


def drawn(pool: int, count: int, step: int, *, seed: int, round_: int) -> np.ndarray:
    """Positions in a pool for the batch of step `step` (from 0): the next `count`, or all of a smaller pool.

    The pool is passed through again and again, each time in another order, which depends only on (seed, round, pass).
    """
    count = min(count, pool)
    if count == 0:
        return np.empty(0, dtype=np.int64)
    places = [divmod(place, pool) for place in range(step * count, (step + 1) * count)]
    return np.array([_pass(seed, round_, i, pool)[at] for i, at in places])


@lru_cache(maxsize=8)
def _pass(seed: int, round_: int, number: int, pool: int) -> np.ndarray:
    """The order of a pass over a pool. Many steps share one."""
    return np.random.default_rng([seed, round_, number, pool]).permutation(pool)


def in_role(triplets: Sequence[Triplet], role: int) -> list[Triplet]:
    """The edits in a role (`corsa.algorithm.packing.Triplet.role`)."""
    return [replace(triplet, role=role) for triplet in triplets]


def anchored(encoder: Encoder, rows: Sequence[Mapping[str, str]], most: int) -> list[Triplet]:
    """Questions with the base model's answers as token ids, taught by L_SFT alone.

    Args:
        encoder: of the model.
        rows: {question, output}. A question without an answer is left out.
        most: tokens that an answer had room for. A longer one was cut off, so its end is not taught.
    """
    given = [row for row in rows if row["output"]]
    prompts = encoder.prompts([row["question"] for row in given])
    answers = encoder.answers([row["output"] for row in given])
    end = len(encoder.end)
    cut = [ids[:-end] if len(ids) - end >= most else ids for ids in answers]
    return [Triplet(x, y, (), (0.0, NO_OLD_ANSWER), kept=True) for x, y in zip(prompts, cut, strict=True)]
