"""What a group of workers does for one step: teach a round by its method, or ask a model edited by another step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from corsa.adapters.peft_files import load_adapter, read_factors, save_adapter, write_factors
from corsa.baselines.f_learning import f_learning
from corsa.baselines.key_statistics import KeyStatistics
from corsa.baselines.memit import memit
from corsa.baselines.weight_deltas import load_delta, save_delta
from corsa.edits import Edit, from_table
from corsa.evaluation.asking import PREDICTIONS, Asker, Taught
from corsa.evaluation.mmlu import from_questions_table
from corsa.evaluation.multiple_choice import ANSWERS, MultipleChoice
from corsa.flow.task import Task
from corsa.identities import (
    AskingConfig,
    FLearningRoundConfig,
    MemitRoundConfig,
    RoundConfig,
    RoutingConfig,
    SpecificityConfig,
)
from corsa.method.packing import Triplet
from corsa.models.attached import Change, attached
from corsa.rounds import taught_in, valid_after
from corsa.training.crew import Crew
from corsa.training.loop import CURVES, train
from corsa.training.routing import route
from corsa.training.workshop import Loaded, Workshop

Post = Callable[[dict[str, Any]], None]
"""Takes a line for the progress display."""


def take(task: Task, workshop: Workshop, post: Post) -> None:
    """Do one step and commit its result. Every worker of the group calls this; the leader reads and writes."""
    started = time.monotonic()
    post({"phase": "loading"})
    workshop.notes = []
    metrics = _LESSONS[type(task.config)](task, workshop, post)
    if workshop.crew.leads:
        notes = {"notes": workshop.notes} if workshop.notes else {}
        task.commit(metrics | notes, time.monotonic() - started)


# Teaching


def _teach_lora(task: Task, workshop: Workshop, post: Post) -> dict[str, Any]:
    """CoRSA, LoRA and the ablations: one adapter, trained on through the rounds."""
    config, crew = task.config, workshop.crew
    lesson, loaded = _open(task, workshop)
    loaded.lora.initialise(config.seed)
    if "previous" in task.step.inputs:
        if crew.leads:
            load_adapter(loaded.lora, task.inputs["previous"].local("adapter"))
        crew.share_tensor(loaded.lora.phi.detach())
    post({"phase": "training"})
    checkpoint = (task.store, f"partial/{task.fingerprint[:16]}/checkpoint")
    curves = train(config, lesson.triplets, loaded, workshop, checkpoint, post)
    metrics = _ask(task, lesson, loaded, workshop, post)
    if crew.leads:
        save_adapter(loaded.lora, task.output / "adapter", config.model.name)
        metrics |= _write_curves(task, curves)
    return metrics


def _teach_f_learning(task: Task, workshop: Workshop, post: Post) -> dict[str, Any]:
    """F-Learning: the adapter grows by what is subtracted and what is learnt."""
    config, crew = task.config, workshop.crew
    lesson, loaded = _open(task, workshop)
    post({"phase": "training"})
    before: Any = _change(task, "previous", crew) if "previous" in task.step.inputs else None
    partial = f"partial/{task.fingerprint[:16]}"
    adapter, curves, metrics = f_learning(
        config, lesson.triplets, loaded, workshop, (task.store, partial), before, post
    )
    with loaded.lora.off(), attached(loaded.model, adapter):
        metrics |= _ask(task, lesson, loaded, workshop, post)
    if crew.leads:
        write_factors(adapter, task.output / "adapter", config.model.name)
        metrics |= _write_curves(task, curves)
    return metrics


def _teach_memit(task: Task, workshop: Workshop, post: Post) -> dict[str, Any]:
    """MEMIT: a dense change of a few layers, added to that of the rounds before."""
    config: MemitRoundConfig = task.config
    crew = workshop.crew
    lesson, loaded = _open(task, workshop)
    post({"phase": "training"})
    change: Any = dict(_change(task, "previous", crew)) if "previous" in task.step.inputs else {}
    began = time.monotonic()
    found, metrics = {}, {}
    with loaded.lora.off():
        if crew.leads:  # one solve for all edits of the round: the others wait
            statistics = KeyStatistics.load(task.inputs["statistics"].local("statistics.safetensors"))
            with attached(loaded.model, change):
                found, metrics = memit(
                    loaded.model,
                    loaded.encoder,
                    lesson.taught_now,
                    statistics,
                    config.memit,
                    seed=config.seed,
                    post=post,
                )
        found = crew.share(found)
        change = {name: change[name] + delta if name in change else delta for name, delta in found.items()}
        metrics |= {"training_s": round(time.monotonic() - began, 3)}
        with attached(loaded.model, change):
            metrics |= _ask(task, lesson, loaded, workshop, post)
    if crew.leads:
        save_delta(change, task.output / "delta", config.model.name)
    return metrics


# Asking


def _ask_only(task: Task, workshop: Workshop, post: Post) -> dict[str, Any]:
    """The answers of the unedited model, or of one that another step has edited."""
    lesson, loaded = _open(task, workshop)
    with _edited(task, loaded, workshop.crew):
        return _ask(task, lesson, loaded, workshop, post)


def _answer_questions(task: Task, workshop: Workshop, post: Post) -> dict[str, Any]:
    """The answers to MMLU, the subjects divided over the workers."""
    crew = workshop.crew
    questions = from_questions_table(_shared_table(task, "questions", crew))
    loaded = workshop.open(task.config, ())
    post({"phase": "evaluating"})
    asker = MultipleChoice(loaded.model, loaded.encoder.tokenizer, crew.device, workshop.placement.probe_batch)
    with _edited(task, loaded, crew):
        with crew.in_step(loaded.model):
            own = list(asker.answers(questions.share(crew.rank, crew.size)))
        rows = crew.collect(own)
    if not crew.leads:
        return {}
    rows.sort(key=lambda row: (row["subject"], row["index"]))
    pq.write_table(pa.Table.from_pylist(rows, schema=ANSWERS), task.output / "answers.parquet")
    return {"questions": len(rows), "accuracy": sum(row["correct"] for row in rows) / len(rows)}


def _route(task: Task, workshop: Workshop, post: Post) -> dict[str, Any]:
    """The answers of a model that sends each query to one of several adapters."""
    crew, parts = workshop.crew, [name.removeprefix("adapter") for name in task.step.inputs if "adapter" in name]
    lesson, loaded = _open(task, workshop)
    splits = [from_table(_shared_table(task, f"edits{part}", crew, "edits")) for part in parts]
    changes = [_change(task, f"adapter{part}", crew) for part in parts]
    post({"phase": "evaluating"})
    asker = _asker(task.config, loaded, workshop)
    with loaded.lora.off(), crew.in_step(loaded.model):
        rows, chosen = route(task.config.router, loaded, asker, splits, changes, _own_chains(lesson.asked, crew))
    rows, chosen = crew.collect(rows), crew.collect(chosen)
    if not crew.leads:
        return {}
    pq.write_table(pa.Table.from_pylist(chosen), task.output / "routes.parquet")
    right = sum(row["chosen"] == row["part"] for row in chosen) / len(chosen)
    return {"routing_accuracy": right} | _write_predictions(task, rows)


_LESSONS: dict[type, Callable[[Task, Workshop, Post], dict[str, Any]]] = {
    RoundConfig: _teach_lora,
    FLearningRoundConfig: _teach_f_learning,
    MemitRoundConfig: _teach_memit,
    AskingConfig: _ask_only,
    SpecificityConfig: _answer_questions,
    RoutingConfig: _route,
}


# What they share


@dataclass(frozen=True)
class _Lesson:
    """What a step teaches (`taught_now`, and as `triplets`) and asks (`asked`)."""

    taught_now: list[Edit]
    triplets: list[Triplet]
    asked: list[Taught]


def _open(task: Task, workshop: Workshop) -> tuple[_Lesson, Loaded]:
    """The step's edits, and the model that it is done with."""
    config: AskingConfig = task.config
    table = workshop.tables[task.step.inputs["reference"].fingerprint]
    edits = {e.id: e for e in from_table(_shared_table(task, "edits", workshop.crew)) if e.id in table}
    loaded = workshop.open(config, sorted(map(table.triplet, edits), key=len)[-4:])  # windows show in long rows
    if "schedule" not in task.step.inputs:  # which round teaches an edit is then the scenario's affair
        return _Lesson([], [], [Taught(edit, edit.round, "") for edit in edits.values()]), loaded
    schedule = _shared_table(task, "schedule", workshop.crew)
    now = [id_ for id_ in taught_in(schedule, config.round) if id_ in edits]
    facts = [fact for fact in valid_after(schedule, config.round) if fact["edit"] in edits]
    asked = [Taught(edits[fact["edit"]], fact["learnt"], fact["part"]) for fact in facts]
    return _Lesson([edits[id_] for id_ in now], [table.triplet(id_) for id_ in now], asked), loaded


def _asker(config: AskingConfig, loaded: Loaded, workshop: Workshop) -> Asker:
    batch = workshop.placement.probe_batch
    return Asker(loaded.model, loaded.encoder, config.evaluation, workshop.crew.device, batch, loaded.packed)


def _ask(task: Task, lesson: _Lesson, loaded: Loaded, workshop: Workshop, post: Post) -> dict[str, Any]:
    """Ask the model as it stands, and write the answers."""
    crew = workshop.crew
    post({"phase": "evaluating"})
    began = time.monotonic()
    with crew.in_step(loaded.model):
        rows = _asker(task.config, loaded, workshop).ask(_own_chains(lesson.asked, crew))
    rows = crew.collect(rows)
    return {"evaluation_s": round(time.monotonic() - began, 3)} | _write_predictions(task, rows) if crew.leads else {}


def _write_predictions(task: Task, rows: list[dict[str, Any]]) -> dict[str, Any]:
    labels = {"seed": task.config.seed, "trained": task.config.round}
    predictions = [{**labels, **row} for row in sorted(rows, key=lambda r: (r["edit"], r["probe"], r["wording"]))]
    pq.write_table(pa.Table.from_pylist(predictions, schema=PREDICTIONS), task.output / "predictions.parquet")
    return {"probes": len(rows)}


def _write_curves(task: Task, curves: list[dict[str, Any]]) -> dict[str, Any]:
    pq.write_table(pa.Table.from_pylist(curves, schema=CURVES), task.output / "curves.parquet")
    return {
        "steps": len(curves),
        "skipped": sum(c["skipped"] for c in curves),
        "loss_sft": curves[-1]["loss_sft"],
        "training_s": round(sum(c["seconds"] for c in curves), 3),
    }


@contextmanager
def _edited(task: Task, loaded: Loaded, crew: Crew) -> Iterator[None]:
    """The base model with what the step's input `adapter` adds to it, if it has one."""
    changes = [_change(task, "adapter", crew)] if "adapter" in task.step.inputs else []
    with loaded.lora.off(), attached(loaded.model, *changes):
        yield


def _change(task: Task, name: str, crew: Crew) -> Change:
    """What the round of the input `name` adds to the base model, on every worker."""
    change: Change | None = None
    if crew.leads:
        artifact = task.inputs[name]
        low_rank = any(Path(file).parts[0] == "adapter" for file in artifact.record.files)
        change = read_factors(artifact.local("adapter"))[0] if low_rank else load_delta(artifact.local("delta"))
    return crew.share(change)


def _own_chains(taught: Sequence[Taught], crew: Crew) -> list[Taught]:
    """What this worker asks about: its share of the chains, whole."""
    chains = {c: i for i, c in enumerate(dict.fromkeys(t.edit.chain for t in taught))}
    return [t for t in taught if chains[t.edit.chain] % crew.size == crew.rank]


def _shared_table(task: Task, name: str, crew: Crew, file: str | None = None) -> pa.Table:
    """The small table `<file or name>.parquet` of the input `name`, read by the leader for all."""
    return crew.share(pq.read_table(task.inputs[name].local(f"{file or name}.parquet")) if crew.leads else None)
