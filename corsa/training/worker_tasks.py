"""What a group of workers does for one step: teach a round by its method, or ask a model edited by another step."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from corsa.algorithm.packing import Triplet
from corsa.config import EvaluationConfig
from corsa.config.steps import (
    AskingConfig,
    ControlsConfig,
    FLearningRoundConfig,
    MemitRoundConfig,
    RoundConfig,
    RoutingConfig,
    SamplesConfig,
    SpecificityConfig,
    TrialPlace,
)
from corsa.data.edit import Edit, from_table
from corsa.data.schedule import taught_in, valid_after
from corsa.errors import CorsaError
from corsa.evaluation.generation import end_alone, sample
from corsa.evaluation.metrics import measure
from corsa.evaluation.mmlu import from_questions_table
from corsa.evaluation.multiple_choice import ANSWERS, MultipleChoice
from corsa.evaluation.predict import PREDICTIONS, Asker, Taught
from corsa.evaluation.programs import PROGRAMS
from corsa.evaluation.sanity_questions import controls, judged
from corsa.flow.task import Task
from corsa.lora.attached import Change, attached
from corsa.lora.peft_format import load_adapter, read_factors, save_adapter, write_factors
from corsa.methods.f_learning.algorithm import f_learning
from corsa.methods.memit.algorithm import memit
from corsa.methods.memit.key_statistics import KeyStatistics
from corsa.methods.memit.weight_deltas import load_delta, save_delta
from corsa.training.loop import CURVES, AtEpoch, Lesson, train_together
from corsa.training.memory_usage import peak_since, start_peak
from corsa.training.routing import route
from corsa.training.worker_context import Loaded, Workshop
from corsa.training.worker_group import Crew

Post = Callable[[dict[str, Any]], None]
"""Takes a line for the progress display."""


def take(tasks: Sequence[Task], workshop: Workshop, post: Post) -> dict[str, str]:
    """Do one step, or several that are trained together, and commit their results. Every worker of the group calls
    this; the leader reads and writes. Returns {fingerprint: cause} of those that failed.
    """
    started = time.monotonic()
    post({"phase": "loading"})
    workshop.notes = []
    start_peak(workshop.crew.device)
    if type(tasks[0].config) is RoundConfig:
        return _teach_lora(tasks, workshop, post)
    (task,) = tasks
    metrics = _LESSONS[type(task.config)](task, workshop, post)
    if workshop.crew.leads:
        task.commit(metrics | _notes(workshop), time.monotonic() - started)
    workshop.spent.clear()
    return {}


def _notes(workshop: Workshop, together: int = 1) -> dict[str, Any]:
    """What a step's record says of how it was run; the peak is the leading worker's, bytes. `together`: with how many
    steps it shared the time.
    """
    crew = workshop.crew
    how = {"peak_memory": peak_since(crew.device), "workers": crew.size, "gpu": crew.device.type == "cuda"}
    spent = {f"{what}_s": round(seconds / together, 3) for what, seconds in workshop.spent.items()}
    return how | spent | {"parameters": workshop.parameters} | ({"notes": workshop.notes} if workshop.notes else {})


def trains_with(first: Task, other: Task) -> bool:
    """Whether two rounds can be trained together: they differ in lambda, beta, rho, learning rate and seed alone."""
    if not all(type(task.config) is RoundConfig and task.config.step.perturb_every == 1 for task in (first, other)):
        return False
    both = first.config.step.dpo and other.config.step.dpo  # without DPO there is nothing for PCGrad to do

    def common(task: Task) -> tuple[Any, ...]:
        config: RoundConfig = task.config
        free = {"lambda_": 1.0, "beta": 1.0, "rho": 1.0} | ({} if both else {"pcgrad": "off"})
        step = config.step.model_copy(update=free)
        training = config.training.model_copy(update={"learning_rate": 1.0})
        needs = {name: None if name == "previous" else step.fingerprint for name, step in task.step.inputs.items()}
        return config.model_copy(update={"seed": 0, "training": training, "step": step}), needs

    return common(first) == common(other)


# Teaching


def _teach_lora(tasks: Sequence[Task], workshop: Workshop, post: Post) -> dict[str, str]:
    """CoRSA, LoRA and the ablations: one adapter, trained on through the rounds; or several of them together."""
    crew, started = workshop.crew, time.monotonic()
    lesson, loaded = _open(tasks[0], workshop, adapters=len(tasks))
    lora = loaded.lora
    lora.initialise(*(task.config.seed for task in tasks))
    if "previous" in tasks[0].step.inputs:
        if crew.leads:
            for row, task in enumerate(tasks):
                load_adapter(lora, task.inputs["previous"].local("adapter"), row)
        crew.share_tensor(lora.phi.detach())
    post({"phase": "training"})
    lessons = [Lesson(task.config, (task.store, f"partial/{task.fingerprint[:16]}/checkpoint")) for task in tasks]
    scored = _scores(tasks, lesson, loaded, workshop)
    found = train_together(lessons, lesson.triplets, loaded, workshop, post, scored)
    failed = {t.fingerprint: str(cause) for t, cause in zip(tasks, found, strict=True) if isinstance(cause, CorsaError)}
    shared = (time.monotonic() - started) / len(tasks)
    for row, (task, curves) in enumerate(zip(tasks, found, strict=True)):
        if not isinstance(curves, CorsaError):
            began = time.monotonic()
            with lora.only(row):
                metrics = _ask(task, lesson, loaded, workshop, post)
            if crew.leads:
                with workshop.timed("checkpoints"):
                    save_adapter(lora, task.output / "adapter", task.config.model.name, row)
                metrics |= _write_curves(task, curves) | {"packed": len(tasks)} | _notes(workshop, len(tasks))
                task.commit(metrics, shared + time.monotonic() - began)
    workshop.spent.clear()
    return failed


def _scores(tasks: Sequence[Task], lesson: _Subject, loaded: Loaded, workshop: Workshop) -> AtEpoch:
    """Asks the rounds of trials at the end of every so many epochs and tells Ray Tune, which may stop them there."""
    place = tasks[0].placement
    if not isinstance(place, TrialPlace) or place.metric is None:
        return lambda epochs: None
    metric, crew, first = place.metric, workshop.crew, tasks[0].config
    protocol = first.evaluation.protocol
    before = (place.seeds.index(first.seed) * place.rounds + first.round - 1) * first.training.epochs

    def at_epoch(epochs: int) -> None:
        from ray import train

        if epochs % place.rung or epochs == first.training.epochs:  # at the end all is asked anyway
            return
        scores: dict[str, list[float]] = {}
        for row, task in enumerate(tasks):
            with loaded.lora.only(row), crew.in_step(loaded.model):
                rows = _asker(task.config, loaded, workshop).ask(_own_chains(lesson.asked, crew))
            rows = crew.collect(rows)
            if crew.leads:
                labels = {"method": "corsa", "seed": task.config.seed, "trained": task.config.round}
                table = pd.DataFrame([{**labels, **answer} for answer in rows])
                value = measure(metric, table, rule=place.rule, protocol=protocol)
                scores.setdefault(place.number(task.name), []).append(math.nan if value is None else value)
        means = {trial: sum(values) / len(values) for trial, values in scores.items()}  # over seeds
        best = (max if place.better == "high" else min)(means.values(), default=math.nan)
        train.report({metric: best, "epoch": before + epochs, "scores": means})

    return at_epoch


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


def _ask_controls(task: Task, workshop: Workshop, post: Post) -> dict[str, Any]:
    """The answers to the everyday questions; they are few, so every worker answers them all."""
    config: ControlsConfig = task.config
    loaded = workshop.open(config, ())
    post({"phase": "evaluating"})
    evaluation = EvaluationConfig(new_tokens=config.new_tokens)
    asker = Asker(
        loaded.model, loaded.encoder, evaluation, workshop.crew.device, workshop.placement.probe_batch, loaded.packed
    )
    with _edited(task, loaded, workshop.crew), workshop.crew.in_step(loaded.model):
        rows = judged(asker.answers([control.question for control in controls()]))
    if not workshop.crew.leads:
        return {}
    pq.write_table(pa.Table.from_pylist(rows), task.output / "answers.parquet")
    return {"questions": len(rows), "right": sum(row["right"] for row in rows)}


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


def _write_programs(task: Task, workshop: Workshop, post: Post) -> dict[str, Any]:
    """Programs drawn for the problems that are asked, divided over the workers."""
    config: SamplesConfig = task.config
    crew, how = workshop.crew, config.sampling
    table = _shared_table(task, "problems", crew)
    problems = [row for row in table.to_pylist() if row["part"] == "asked"]
    loaded = workshop.open(config, ())
    post({"phase": "evaluating"})
    every = [(i, n) for i in range(len(problems)) for n in range(how.samples)]
    share = -(-len(every) // crew.size)  # in a row: the samples of one problem have their prompt in common
    own = every[crew.rank * share :][:share]
    tokenizer = loaded.encoder.tokenizer
    described = [f"{p['described']}\n\n{p['prompt']}" if config.described else p["prompt"] for p in problems]
    with _edited(task, loaded, crew), crew.in_step(loaded.model):
        outputs = sample(
            loaded.model,
            [loaded.encoder.prompt(described[i]) for i, _ in own],
            seeds=[(config.seed, zlib.crc32(problems[i]["id"].encode()), n) for i, n in own],
            temperature=how.temperature,
            top_p=how.top_p,
            stops=end_alone(tokenizer),
            new_tokens=how.new_tokens,
            batch=max(1, workshop.placement.probe_batch // 8),  # programs are longer than answers
            device=crew.device,
        )
    texts = (tokenizer.decode(ids, skip_special_tokens=True).strip("\n") for ids in outputs)
    rows = crew.collect(
        [
            {"problem": problems[i]["id"], "sample": n, "output": text, "tokens": len(ids)}
            for (i, n), text, ids in zip(own, texts, outputs, strict=True)
        ]
    )
    if not crew.leads:
        return {}
    rows.sort(key=lambda row: (row["problem"], row["sample"]))
    pq.write_table(pa.Table.from_pylist(rows, schema=PROGRAMS), task.output / "answers.parquet")
    return {"programs": len(rows), "cut_off": sum(row["tokens"] == how.new_tokens for row in rows)}


_LESSONS: dict[type, Callable[[Task, Workshop, Post], dict[str, Any]]] = {
    FLearningRoundConfig: _teach_f_learning,
    MemitRoundConfig: _teach_memit,
    AskingConfig: _ask_only,
    SpecificityConfig: _answer_questions,
    ControlsConfig: _ask_controls,
    RoutingConfig: _route,
    SamplesConfig: _write_programs,
}


# What they share


@dataclass(frozen=True)
class _Subject:
    """What a step teaches (`taught_now`, and as `triplets`) and asks (`asked`)."""

    taught_now: list[Edit]
    triplets: list[Triplet]
    asked: list[Taught]


def _open(task: Task, workshop: Workshop, adapters: int = 1) -> tuple[_Subject, Loaded]:
    """The step's edits, and the model that it is done with."""
    config: AskingConfig = task.config
    with workshop.timed("data"):
        table = workshop.tables[task.step.inputs["reference"].fingerprint]
        edits = {e.id: e for e in from_table(_shared_table(task, "edits", workshop.crew)) if e.id in table}
        sample = sorted(map(table.triplet, edits), key=len)[-4:]  # windows show in long rows
    loaded = workshop.open(config, sample, adapters)
    if "schedule" not in task.step.inputs:  # which round teaches an edit is then the scenario's affair
        return _Subject([], [], [Taught(edit, edit.round, "") for edit in edits.values()]), loaded
    schedule = _shared_table(task, "schedule", workshop.crew)
    now = [id_ for id_ in taught_in(schedule, config.round) if id_ in edits]
    facts = [fact for fact in valid_after(schedule, config.round) if fact["edit"] in edits]
    asked = [Taught(edits[fact["edit"]], fact["learnt"], fact["part"]) for fact in facts]
    return _Subject([edits[id_] for id_ in now], [table.triplet(id_) for id_ in now], asked), loaded


def _asker(config: AskingConfig, loaded: Loaded, workshop: Workshop) -> Asker:
    batch = workshop.placement.probe_batch
    return Asker(loaded.model, loaded.encoder, config.evaluation, workshop.crew.device, batch, loaded.packed)


def _ask(task: Task, lesson: _Subject, loaded: Loaded, workshop: Workshop, post: Post) -> dict[str, Any]:
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
