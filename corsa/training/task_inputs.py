"""What a step on the workers reads: edits, schedule, model, and the change made by an earlier step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from corsa.algorithm.packing import ANCHOR, EARLIER, TAUGHT, Triplet
from corsa.config.steps import AnchorsConfig, PredictionConfig, RoundConfig
from corsa.data.edit import Edit, from_table
from corsa.data.schedule import held_before, taught_in, valid_after
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

    taught_now: list[Edit]
    triplets: list[Triplet]
    earlier: list[Triplet]
    asked: list[Taught]
    anchors: list[Triplet]

    def material(self, config: RoundConfig) -> Material:
        """What the batches of the round are drawn from, with the roles that its objectives read."""
        earlier = in_role(self.earlier, EARLIER if config.step.replay else TAUGHT)
        anchors = in_role(self.anchors, ANCHOR if config.step.anchor else TAUGHT)
        return Material(self.triplets, earlier if config.training.replay else (), anchors)


def open_step(task: Task, context: WorkerContext, adapters: int = 1) -> tuple[StepFacts, Loaded]:
    """The edits and the model of the step."""
    config: PredictionConfig = task.config
    with context.timed("data"):
        table = context.tables[task.step.inputs["reference"].fingerprint]
        read = from_table(shared_table(task, "edits", context.group))
        asked_as = with_shallow_edit_probes(read, config.evaluation.kinds)
        edits = {e.id: e for e in asked_as if e.id in table}
        sample = sorted(map(table.triplet, edits), key=len)[-4:]  # sliding windows have an effect in long rows
    loaded = context.open(config, sample, adapters)
    if "schedule" not in task.step.inputs:  # then the scenario decides which round teaches an edit
        return StepFacts([], [], [], [Taught(edit, edit.round, "") for edit in edits.values()], []), loaded
    schedule = shared_table(task, "schedule", context.group)
    now = [id_ for id_ in taught_in(schedule, config.round) if id_ in edits]
    facts = [fact for fact in valid_after(schedule, config.round) if fact["edit"] in edits]
    asked = [Taught(edits[fact["edit"]], fact["learnt"], fact["part"]) for fact in facts]
    before = [table.triplet(fact["edit"]) for fact in held_before(schedule, config.round) if fact["edit"] in edits]
    if "known_schedule" in task.step.inputs:  # the chain began with facts of another table
        known = context.tables[task.step.inputs["known_reference"].fingerprint]
        first = held_before(shared_table(task, "known_schedule", context.group, "schedule"), config.round)
        before = [known.triplet(fact["edit"]) for fact in first if fact["edit"] in known] + before
    own = [table.triplet(id_) for id_ in now]
    return StepFacts([edits[id_] for id_ in now], own, before, asked, _anchors(task, loaded, context.group)), loaded


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
