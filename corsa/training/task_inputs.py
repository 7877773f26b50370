"""What a step on the workers reads: edits, schedule, model, and the change made by an earlier step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from corsa.algorithm.packing import Triplet
from corsa.config.steps import AskingConfig
from corsa.data.edit import Edit, from_table
from corsa.data.schedule import taught_in, valid_after
from corsa.evaluation.predict import Taught
from corsa.flow.task import Task
from corsa.lora.attached import Change, attached
from corsa.lora.peft_format import read_factors
from corsa.lora.weight_deltas import load_delta
from corsa.training.worker_context import Loaded, WorkerContext
from corsa.training.worker_group import WorkerGroup


@dataclass(frozen=True)
class StepFacts:
    """What a step teaches (`taught_now`, and as `triplets`) and asks (`asked`)."""

    taught_now: list[Edit]
    triplets: list[Triplet]
    asked: list[Taught]


def open_step(task: Task, context: WorkerContext, adapters: int = 1) -> tuple[StepFacts, Loaded]:
    """The edits and the model of the step."""
    config: AskingConfig = task.config
    with context.timed("data"):
        table = context.tables[task.step.inputs["reference"].fingerprint]
        edits = {e.id: e for e in from_table(shared_table(task, "edits", context.group)) if e.id in table}
        sample = sorted(map(table.triplet, edits), key=len)[-4:]  # sliding windows have an effect in long rows
    loaded = context.open(config, sample, adapters)
    if "schedule" not in task.step.inputs:  # then the scenario decides which round teaches an edit
        return StepFacts([], [], [Taught(edit, edit.round, "") for edit in edits.values()]), loaded
    schedule = shared_table(task, "schedule", context.group)
    now = [id_ for id_ in taught_in(schedule, config.round) if id_ in edits]
    facts = [fact for fact in valid_after(schedule, config.round) if fact["edit"] in edits]
    asked = [Taught(edits[fact["edit"]], fact["learnt"], fact["part"]) for fact in facts]
    return StepFacts([edits[id_] for id_ in now], [table.triplet(id_) for id_ in now], asked), loaded


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


def shared_table(task: Task, name: str, group: WorkerGroup, file: str | None = None) -> pa.Table:
    """The small table `<file or name>.parquet` of the input `name`, read by the leader for all."""
    return group.share(pq.read_table(task.inputs[name].local(f"{file or name}.parquet")) if group.leads else None)
