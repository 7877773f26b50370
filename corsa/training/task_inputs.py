"""What a step on the workers reads: edits, schedule, model, and the change made by an earlier step."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from corsa.algorithm.packing import ANCHOR, EARLIER, TAUGHT, Triplet
from corsa.config.evaluation import SHALLOW
from corsa.config.steps import AnchorsConfig, PredictionConfig, RoundConfig
from corsa.data.edit import Edit, EditTable
from corsa.data.schedule import held_before, rechecked, taught_in, valid_after
from corsa.evaluation.predict import Taught
from corsa.evaluation.retrieval import FACTS, Memory
from corsa.evaluation.shallow_edit_probes import with_shallow_edit_probes
from corsa.flow.task import Task
from corsa.lora.attached import Change, attached
from corsa.lora.peft_format import read_factors
from corsa.lora.weight_deltas import load_delta
from corsa.training.mixing import Material, anchored, in_role
from corsa.training.worker_context import Loaded, WorkerContext
from corsa.training.worker_group import WorkerGroup


@dataclass(frozen=True)
class StepFacts:
    """What a step teaches (`taught_now`, and as `triplets`) and asks (`asked`). `earlier`: the facts that earlier
    rounds taught and that still hold, so without those that this one revises. `anchors`: everyday questions.
    """

    taught_now: Sequence[Edit]
    triplets: list[Triplet]
    earlier: list[Triplet]
    asked: AskedFacts
    anchors: list[Triplet]

    def material(self, config: RoundConfig) -> Material:
        """What the batches of the round are drawn from, with the roles that its objectives read."""
        earlier = in_role(self.earlier, EARLIER if config.step.replay else TAUGHT)
        anchors = in_role(self.anchors, ANCHOR if config.step.anchor else TAUGHT)
        return Material(self.triplets, earlier if config.training.replay else (), anchors)


PART = 8192
"""Chains whose answers a group holds as Python objects at a time."""


@dataclass(frozen=True)
class AskedFacts:
    """The facts that a step asks. An edit is made when it is asked.

    edits: one a fact; learnt, parts, weights: of the same facts (`corsa.evaluation.predict.Taught`). numbers: of their
    chains, in order of first appearance.
    """

    edits: Sequence[Edit]
    learnt: Sequence[int]
    parts: Sequence[str]
    weights: Sequence[float]
    numbers: np.ndarray

    @classmethod
    def of(cls, edits: Sequence[Edit], facts: Sequence[tuple[int, str, int, str, float]]) -> AskedFacts:
        """Facts given as (position in `edits`, chain, learnt, part, weight)."""
        places, chains, learnt, parts, weights = zip(*facts, strict=True) if facts else ((), (), (), (), ())
        number = {chain: i for i, chain in enumerate(dict.fromkeys(chains))}
        numbers = np.array([number[chain] for chain in chains], dtype=np.int64)
        return cls(at(edits, places), learnt, parts, weights, numbers)

    @property
    def pieces(self) -> int:
        """How many times `PART` chains or fewer these are; the same on every worker."""
        return -(-(int(self.numbers.max(initial=-1)) + 1) // PART)

    def own(self, group: WorkerGroup, piece: int | None = None) -> list[Taught]:
        """This worker's share of the facts, or of one piece of them. A chain is not split."""
        return self.share(group.rank, group.size, piece)

    def share(self, rank: int, size: int, piece: int | None = None) -> list[Taught]:
        """The share of one of `size` workers, as `own`."""
        mine = self.numbers % size == rank
        if piece is not None:
            mine &= self.numbers // PART == piece
        places = np.flatnonzero(mine).tolist()
        return [
            Taught(edit, self.learnt[i], self.parts[i], self.weights[i])
            for edit, i in zip(at(self.edits, places), places, strict=True)
        ]


def at(edits: Sequence[Edit], places: Sequence[int]) -> Sequence[Edit]:
    """The edits at these positions."""
    return edits.only(places) if isinstance(edits, EditTable) else [edits[place] for place in places]


@dataclass(frozen=True)
class ProbedEdits:
    """The edits that the reference table knows, with the probes that are asked. `places`: {id: position in `edits`}."""

    edits: Sequence[Edit]
    places: dict[str, int]
    rounds: Sequence[int]
    chains: Sequence[str]

    @classmethod
    def of(cls, table: pa.Table, known: Container[str], config: PredictionConfig) -> ProbedEdits:
        """The edits of an `Edit` table of which `known` has a reference."""
        edits = EditTable(table)
        places = {id_: i for i, id_ in enumerate(edits.column("id")) if id_ in known}
        kinds = config.evaluation.kinds
        probed = with_shallow_edit_probes(edits, kinds) if set(kinds) & set(SHALLOW) else edits
        return cls(probed, places, edits.column("round"), edits.column("chain"))


def asked_facts(probed: ProbedEdits, schedule: pa.Table | None, config: PredictionConfig) -> AskedFacts:
    """The facts that a step asks. Without a schedule the scenario decides which round teaches an edit."""
    places = probed.places
    if schedule is None:
        every = [(at, probed.chains[at], probed.rounds[at], "", 1.0) for at in places.values()]
        return AskedFacts.of(probed.edits, every)
    facts = [fact for fact in valid_after(schedule, config.round) if fact["edit"] in places]
    drawn = rechecked(facts, config.round, config.recheck)
    return AskedFacts.of(probed.edits, [(places[f["edit"]], f["chain"], f["learnt"], f["part"], w) for f, w in drawn])


def open_step(task: Task, context: WorkerContext, adapters: int = 1) -> tuple[StepFacts, Loaded]:
    """The edits and the model of the step."""
    config: PredictionConfig = task.config
    with context.timed("data"):
        table = context.tables[task.step.inputs["reference"].fingerprint]
        probed = ProbedEdits.of(shared_table(task, "edits", context.group), table, config)
        places = probed.places
        sample = [table.triplet(id_) for id_ in table.longest(list(places), 4)]  # sliding windows matter in long rows
    loaded = context.open(config, sample, adapters)
    if "schedule" not in task.step.inputs:
        return StepFacts([], [], [], asked_facts(probed, None, config), []), loaded
    schedule = shared_table(task, "schedule", context.group)
    now = [id_ for id_ in taught_in(schedule, config.round) if id_ in places]
    before = [table.triplet(fact["edit"]) for fact in held_before(schedule, config.round) if fact["edit"] in places]
    if "known_schedule" in task.step.inputs:  # the chain began with facts of another table
        known = context.tables[task.step.inputs["known_reference"].fingerprint]
        first = held_before(shared_table(task, "known_schedule", context.group, "schedule"), config.round)
        before = [known.triplet(fact["edit"]) for fact in first if fact["edit"] in known] + before
    own = [table.triplet(id_) for id_ in now]
    taught_now = at(probed.edits, [places[id_] for id_ in now])
    asked = asked_facts(probed, schedule, config)
    return StepFacts(taught_now, own, before, asked, _anchors(task, loaded, context.group)), loaded


def _anchors(task: Task, loaded: Loaded, group: WorkerGroup) -> list[Triplet]:
    """The everyday questions of a round that is taught some."""
    if "anchors" not in task.step.inputs:
        return []
    settings, config = task.step.inputs["anchors"].config, task.config
    assert isinstance(settings, AnchorsConfig)
    assert isinstance(config, RoundConfig)
    encoder = replace(loaded.encoder, answer_end=config.training.answer_end)
    return anchored(encoder, shared_table(task, "anchors", group, "answers").to_pylist(), settings.new_tokens)


@contextmanager
def edited(task: Task, loaded: Loaded, group: WorkerGroup) -> Iterator[None]:
    """The base model, with the change of the step's input `adapter` if there is one."""
    changes = [change_of(task, "adapter", group)] if "adapter" in task.step.inputs else []
    with loaded.lora.off(), attached(loaded.model, *changes):
        yield


def change_of(task: Task, name: str, group: WorkerGroup) -> Change:
    """The change to the base model by the round of the input `name`, on every worker."""
    change: Change | None = None
    if group.leads:
        artifact = task.inputs[name]
        low_rank = any(Path(file).parts[0] == "adapter" for file in artifact.record.files)
        change = read_factors(artifact.local("adapter"))[0] if low_rank else load_delta(artifact.local("delta"))
    return group.share(change)


def memory_of(task: Task, name: str, group: WorkerGroup) -> Memory | None:
    """The facts that stand before the questions to the model of the input `name`, on every worker; None: none do."""
    memory = None
    if group.leads and name in task.step.inputs and FACTS in task.inputs[name].record.files:
        memory = Memory.load(task.inputs[name].local(FACTS))
    return group.share(memory)


def shared_table(task: Task, name: str, group: WorkerGroup, file: str | None = None) -> pa.Table:
    """The small table `<file or name>.parquet` of the input `name`, read by the leader for all."""
    return group.share(pq.read_table(task.inputs[name].local(f"{file or name}.parquet")) if group.leads else None)
