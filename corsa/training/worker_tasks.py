"""The work of a worker group for one step: teach a round by its method, or ask a model edited by another step."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from corsa.algorithm.packing import ANCHOR, EARLIER, TAUGHT, Triplet
from corsa.config import EvaluationConfig, TrainingConfig
from corsa.config.steps import (
    AnchorsConfig,
    AskingConfig,
    ControlsConfig,
    RoundConfig,
    RoutingConfig,
    SamplesConfig,
    SpecificityConfig,
    TrialPlace,
)
from corsa.data.benchmarks.code_prompt import asked
from corsa.data.edit import Edit, from_table
from corsa.data.schedule import held_before, taught_in, valid_after
from corsa.errors import CorsaError
from corsa.evaluation.anchor_questions import anchor_questions
from corsa.evaluation.generation import end_tokens, sample
from corsa.evaluation.metrics import measure
from corsa.evaluation.mmlu import from_questions_table
from corsa.evaluation.multiple_choice import ANSWERS, MultipleChoice
from corsa.evaluation.predict import PREDICTIONS, Predictor, Taught
from corsa.evaluation.programs import PROGRAMS
from corsa.evaluation.sanity_questions import controls, judged
from corsa.flow.task import Task
from corsa.lora.attached import Change, attached
from corsa.lora.factors import Factors
from corsa.lora.peft_format import load_adapter, read_factors, save_adapter, write_factors
from corsa.lora.weight_deltas import load_delta, save_delta
from corsa.methods import method_of
from corsa.methods.base import Round
from corsa.training.loop import AtEpoch, RoundRun, curves_table, train, train_together
from corsa.training.memory_usage import peak_since, start_peak
from corsa.training.mixing import Material, anchored, in_role
from corsa.training.routing import route
from corsa.training.worker_context import Loaded, WorkerContext
from corsa.training.worker_group import WorkerGroup

Post = Callable[[dict[str, Any]], None]
"""Called with a line for the progress display."""


def take(tasks: Sequence[Task], context: WorkerContext, post: Post) -> dict[str, str]:
    """Do one step, or several that are trained together, and commit their results. Every worker of the group calls
    this; only the leader reads and writes. Returns {fingerprint: cause} of failed steps.
    """
    started = time.monotonic()
    post({"phase": "loading"})
    context.notes = []
    start_peak(context.group.device)
    if type(tasks[0].config) is RoundConfig:
        return _teach_lora(tasks, context, post)
    (task,) = tasks
    do = _teach_method if method_of(task.config) else _ASKING[type(task.config)]
    metrics = do(task, context, post)
    if context.group.leads:
        task.commit(metrics | _notes(context), time.monotonic() - started)
    context.spent.clear()
    return {}


def _notes(context: WorkerContext, together: int = 1) -> dict[str, Any]:
    """How a step was run, for its record. The peak memory is that of the leader, in bytes. `together`: the number of
    steps that shared the time.
    """
    group = context.group
    how = {
        "peak_memory": peak_since(group.device),
        "workers": group.size,
        "gpu": group.device.type == "cuda",
    }
    spent = {f"{what}_s": round(seconds / together, 3) for what, seconds in context.spent.items()}
    return how | spent | {"parameters": context.parameters} | ({"notes": context.notes} if context.notes else {})


def pack_key(task: Task) -> tuple[RoundConfig, tuple[tuple[str, str | None], ...]] | None:
    """Rounds with equal keys can be trained together: they differ only in lambda, beta, rho, learning rate and seed.

    None: the step runs alone.
    """
    if type(task.config) is not RoundConfig or task.config.step.effective().perturb_every > 1:
        return None
    inputs = {name: None if name == "previous" else step.fingerprint for name, step in task.step.inputs.items()}
    step, shared = task.config.step, task.config.shared
    # Edits have one role in all rows: a weight may differ, but not whether it is 0.
    roles = {name: float(getattr(step, name) > 0) for name in ("replay", "anchor")}
    shared = shared.model_copy(update={"step": shared.step.model_copy(update=roles)})
    return shared, tuple(sorted(inputs.items()))


# Teaching


def _teach_lora(tasks: Sequence[Task], context: WorkerContext, post: Post) -> dict[str, str]:
    """CoRSA, LoRA and the ablations: train one adapter further in each round, or several adapters together."""
    group, started = context.group, time.monotonic()
    facts, loaded = _open(tasks[0], context, adapters=len(tasks))
    lora = loaded.lora
    lora.initialise(*(task.config.seed for task in tasks))
    if "previous" in tasks[0].step.inputs:
        if group.leads:
            for row, task in enumerate(tasks):
                load_adapter(lora, task.inputs["previous"].local("adapter"), row)
        group.share_tensor(lora.phi.detach())
    post({"phase": "training"})
    round_runs = [RoundRun(task.config, (task.store, f"partial/{task.fingerprint[:16]}/checkpoint")) for task in tasks]
    scored = _scores(tasks, facts, loaded, context)
    material = facts.material(tasks[0].config)
    found = train_together(round_runs, material, loaded, context, post, scored)
    failed = {t.fingerprint: str(cause) for t, cause in zip(tasks, found, strict=True) if isinstance(cause, CorsaError)}
    shared = (time.monotonic() - started) / len(tasks)
    for row, (task, curves) in enumerate(zip(tasks, found, strict=True)):
        if not isinstance(curves, CorsaError):
            began = time.monotonic()
            with lora.only(row):
                metrics = _ask(task, facts, loaded, context, post)
            if group.leads:
                with context.timed("checkpoints"):
                    save_adapter(lora, task.output / "adapter", task.config.model.name, row)
                metrics |= _write_curves(task, curves, facts) | {"packed": len(tasks)} | _notes(context, len(tasks))
                task.commit(metrics, shared + time.monotonic() - began)
    context.spent.clear()
    return failed


def _scores(tasks: Sequence[Task], facts: _StepFacts, loaded: Loaded, context: WorkerContext) -> AtEpoch:
    """Asks trials their probes every `rung` epochs and reports the metric to Ray Tune, which may stop them there."""
    place = tasks[0].placement
    if not isinstance(place, TrialPlace) or place.metric is None:
        return lambda epochs: None
    metric, group, first = place.metric, context.group, tasks[0].config
    protocol = first.evaluation.protocol
    before = (place.seeds.index(first.seed) * place.rounds + first.round - 1) * first.training.epochs

    def at_epoch(epochs: int) -> None:
        from ray import train

        if epochs % place.rung or epochs == first.training.epochs:  # after the last epoch all probes are asked anyway
            return
        scores: dict[str, list[float]] = {}
        for row, task in enumerate(tasks):
            with loaded.lora.only(row), group.in_step(loaded.model):
                rows = _predictor(task.config, loaded, context).ask(_own_chains(facts.asked, group))
            rows = group.collect(rows)
            if group.leads:
                labels = {"method": "corsa", "seed": task.config.seed, "trained": task.config.round}
                table = pd.DataFrame([{**labels, **answer} for answer in rows])
                value = measure(metric, table, rule=place.rule, protocol=protocol)
                scores.setdefault(place.number(task.name), []).append(math.nan if value is None else value)
        means = {trial: sum(values) / len(values) for trial, values in scores.items()}  # over seeds
        best = (max if place.better == "high" else min)(means.values(), default=math.nan)
        train.report({metric: best, "epoch": before + epochs, "scores": means})

    return at_epoch


def _teach_method(task: Task, context: WorkerContext, post: Post) -> dict[str, Any]:
    """A round of a method that has its own teach function: F-Learning, MEMIT."""
    config, group = task.config, context.group
    method = method_of(config)
    assert method is not None
    assert method.load_teach is not None
    facts, loaded = _open(task, context)
    post({"phase": "training"})
    taught = method.load_teach()(
        Round(
            config=config,
            edits=facts.taught_now,
            triplets=facts.triplets,
            model=loaded.model,
            encoder=loaded.encoder,
            lora=loaded.lora,
            before=_change(task, "previous", group) if "previous" in task.step.inputs else None,
            leads=group.leads,
            share=group.share,
            earlier=facts.earlier,
            train=lambda triplets, name: train(
                config,
                Material(triplets),
                loaded,
                context,
                (task.store, f"partial/{task.fingerprint[:16]}/{name}"),
                post,
            ),
            input_file=lambda name, file: task.inputs[name].local(file),
            post=post,
        )
    )
    with loaded.lora.off(), attached(loaded.model, taught.change):
        metrics = dict(taught.metrics) | _ask(task, facts, loaded, context, post)
    if group.leads:
        _write_change(taught.change, task)
        metrics |= {} if taught.curves is None else _write_curves(task, taught.curves, facts)
    return metrics


def _write_change(change: Change, task: Task) -> None:
    """Write a low-rank change as a PEFT adapter, a dense change as a delta."""
    factors = {name: part for name, part in change.items() if isinstance(part, Factors)}
    dense = {name: part for name, part in change.items() if not isinstance(part, Factors)}
    base = task.config.model.name
    if factors:
        write_factors(factors, task.output / "adapter", base)
    else:
        save_delta(dense, task.output / "delta", base)


# Asking


def _ask_only(task: Task, context: WorkerContext, post: Post) -> dict[str, Any]:
    """The answers of the unedited model, or of a model edited by another step."""
    facts, loaded = _open(task, context)
    with _edited(task, loaded, context.group):
        return _ask(task, facts, loaded, context, post)


def _answer_questions(task: Task, context: WorkerContext, post: Post) -> dict[str, Any]:
    """The answers to MMLU. The workers share the subjects."""
    group = context.group
    questions = from_questions_table(_shared_table(task, "questions", group))
    loaded = context.open(task.config, ())
    post({"phase": "evaluating"})
    predictor = MultipleChoice(loaded.model, loaded.encoder.tokenizer, group.device, context.placement.probe_batch)
    with _edited(task, loaded, group):
        with group.in_step(loaded.model):
            own = list(predictor.answers(questions.share(group.rank, group.size)))
        rows = group.collect(own)
    if not group.leads:
        return {}
    rows.sort(key=lambda row: (row["subject"], row["index"]))
    pq.write_table(pa.Table.from_pylist(rows, schema=ANSWERS), task.output / "answers.parquet")
    return {"questions": len(rows), "accuracy": sum(row["correct"] for row in rows) / len(rows)}


def _ask_controls(task: Task, context: WorkerContext, post: Post) -> dict[str, Any]:
    """The answers to the everyday questions. There are few, so every worker answers all of them."""
    config: ControlsConfig = task.config
    loaded = context.open(config, ())
    post({"phase": "evaluating"})
    evaluation = EvaluationConfig(new_tokens=config.new_tokens)
    predictor = Predictor(
        loaded.model,
        loaded.encoder,
        evaluation,
        context.group.device,
        context.placement.probe_batch,
        loaded.packed,
    )
    with _edited(task, loaded, context.group), context.group.in_step(loaded.model):
        rows = judged(predictor.answers([control.question for control in controls()]))
    if not context.group.leads:
        return {}
    pq.write_table(pa.Table.from_pylist(rows), task.output / "answers.parquet")
    return {"questions": len(rows), "right": sum(row["right"] for row in rows)}


def _ask_anchors(task: Task, context: WorkerContext, post: Post) -> dict[str, Any]:
    """The base model's answers to the anchor questions."""
    config: AnchorsConfig = task.config
    loaded, group = context.open(config, ()), context.group
    post({"phase": "evaluating"})
    asking = EvaluationConfig(new_tokens=config.new_tokens)
    predictor = Predictor(
        loaded.model, loaded.encoder, asking, group.device, context.placement.probe_batch, loaded.packed
    )
    questions = anchor_questions()
    with loaded.lora.off(), group.in_step(loaded.model):
        outputs = predictor.answers(questions)
    if not group.leads:
        return {}
    table = pa.table({"question": list(questions), "output": outputs})
    pq.write_table(table, task.output / "answers.parquet")
    return {"questions": len(questions)}


def _route(task: Task, context: WorkerContext, post: Post) -> dict[str, Any]:
    """The answers of a model that routes each query to one of several adapters."""
    group, parts = (
        context.group,
        [name.removeprefix("adapter") for name in task.step.inputs if "adapter" in name],
    )
    facts, loaded = _open(task, context)
    splits = [from_table(_shared_table(task, f"edits{part}", group, "edits")) for part in parts]
    changes = [_change(task, f"adapter{part}", group) for part in parts]
    post({"phase": "evaluating"})
    predictor = _predictor(task.config, loaded, context)
    with loaded.lora.off(), group.in_step(loaded.model):
        rows, chosen = route(task.config.router, loaded, predictor, splits, changes, _own_chains(facts.asked, group))
    rows, chosen = group.collect(rows), group.collect(chosen)
    if not group.leads:
        return {}
    pq.write_table(pa.Table.from_pylist(chosen), task.output / "routes.parquet")
    right = sum(row["chosen"] == row["part"] for row in chosen) / len(chosen)
    return {"routing_accuracy": right} | _write_predictions(task, rows)


def _write_programs(task: Task, context: WorkerContext, post: Post) -> dict[str, Any]:
    """Sample programs for the asked problems. The workers share the samples."""
    config: SamplesConfig = task.config
    group, how = context.group, config.sampling
    table = _shared_table(task, "problems", group)
    problems = [row for row in table.to_pylist() if row["part"] == "asked"]
    loaded = context.open(config, ())
    post({"phase": "evaluating"})
    every = [(i, n) for i in range(len(problems)) for n in range(how.samples)]
    share = -(-len(every) // group.size)  # contiguous: samples of one problem share their prompt
    own = every[group.rank * share :][:share]
    told = {"described": config.described, "implementation": config.implementation}
    prompts = [asked(problem, **told) for problem in problems]
    with _edited(task, loaded, group), group.in_step(loaded.model):
        outputs = sample(
            loaded.model,
            [loaded.encoder.prompt(prompts[i]) for i, _ in own],
            seeds=[(config.seed, zlib.crc32(problems[i]["id"].encode()), n) for i, n in own],
            temperature=how.temperature,
            top_p=how.top_p,
            stops=end_tokens(loaded.model, loaded.encoder.tokenizer),
            new_tokens=how.new_tokens,
            batch=max(1, context.placement.probe_batch // 8),  # programs are longer than answers
            device=group.device,
        )
    texts = (loaded.encoder.read(ids).strip("\n") for ids in outputs)
    rows = group.collect(
        [
            {"problem": problems[i]["id"], "sample": n, "output": text, "tokens": len(ids)}
            for (i, n), text, ids in zip(own, texts, outputs, strict=True)
        ]
    )
    if not group.leads:
        return {}
    rows.sort(key=lambda row: (row["problem"], row["sample"]))
    pq.write_table(pa.Table.from_pylist(rows, schema=PROGRAMS), task.output / "answers.parquet")
    return {"programs": len(rows), "cut_off": sum(row["tokens"] == how.new_tokens for row in rows)}


_ASKING: dict[type, Callable[[Task, WorkerContext, Post], dict[str, Any]]] = {
    AskingConfig: _ask_only,
    SpecificityConfig: _answer_questions,
    ControlsConfig: _ask_controls,
    AnchorsConfig: _ask_anchors,
    RoutingConfig: _route,
    SamplesConfig: _write_programs,
}


# What they share


@dataclass(frozen=True)
class _StepFacts:
    """What a step teaches (`taught_now`, and as `triplets`) and asks (`asked`). `earlier`: the facts that earlier
    rounds taught and that still hold, so without those that this one revises.
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


def _open(task: Task, context: WorkerContext, adapters: int = 1) -> tuple[_StepFacts, Loaded]:
    """The edits and the model of the step."""
    config: AskingConfig = task.config
    with context.timed("data"):
        table = context.tables[task.step.inputs["reference"].fingerprint]
        edits = {e.id: e for e in from_table(_shared_table(task, "edits", context.group)) if e.id in table}
        sample = sorted(map(table.triplet, edits), key=len)[-4:]  # sliding windows have an effect in long rows
    loaded = context.open(config, sample, adapters)
    if "schedule" not in task.step.inputs:  # then the scenario decides which round teaches an edit
        return _StepFacts([], [], [], [Taught(edit, edit.round, "") for edit in edits.values()], []), loaded
    schedule = _shared_table(task, "schedule", context.group)
    now = [id_ for id_ in taught_in(schedule, config.round) if id_ in edits]
    facts = [fact for fact in valid_after(schedule, config.round) if fact["edit"] in edits]
    asked = [Taught(edits[fact["edit"]], fact["learnt"], fact["part"]) for fact in facts]
    before = [table.triplet(fact["edit"]) for fact in held_before(schedule, config.round) if fact["edit"] in edits]
    if "known_schedule" in task.step.inputs:  # the chain began with facts of another table
        known = context.tables[task.step.inputs["known_reference"].fingerprint]
        first = held_before(_shared_table(task, "known_schedule", context.group, "schedule"), config.round)
        before = [known.triplet(fact["edit"]) for fact in first if fact["edit"] in known] + before
    anchors: list[Triplet] = []
    if "anchors" in task.step.inputs:
        rows = _shared_table(task, "anchors", context.group, "answers").to_pylist()
        asking, own_config = task.step.inputs["anchors"].config, task.config
        assert isinstance(asking, AnchorsConfig)
        assert isinstance(own_config, RoundConfig)
        encoder = replace(loaded.encoder, answer_end=own_config.training.answer_end)
        anchors = anchored(encoder, rows, asking.new_tokens)
    own = [table.triplet(id_) for id_ in now]
    return _StepFacts([edits[id_] for id_ in now], own, before, asked, anchors), loaded


def _predictor(config: AskingConfig, loaded: Loaded, context: WorkerContext) -> Predictor:
    batch = context.placement.probe_batch
    device = context.group.device
    return Predictor(loaded.model, loaded.encoder, config.evaluation, device, batch, loaded.packed, config.seed)


def _ask(task: Task, facts: _StepFacts, loaded: Loaded, context: WorkerContext, post: Post) -> dict[str, Any]:
    """Ask the model in its current state, and write the answers."""
    group = context.group
    post({"phase": "evaluating", "eta_s": None})
    began = time.monotonic()
    predictor = replace(
        _predictor(task.config, loaded, context), told=lambda done, of: post({"answered": done, "probes": of})
    )
    with group.in_step(loaded.model):
        rows = predictor.ask(_own_chains(facts.asked, group))
    post({"probes": None})
    rows = group.collect(rows)
    return {"evaluation_s": round(time.monotonic() - began, 3)} | _write_predictions(task, rows) if group.leads else {}


def _write_predictions(task: Task, rows: list[dict[str, Any]]) -> dict[str, Any]:
    labels = {"seed": task.config.seed, "trained": task.config.round}
    predictions = [{**labels, **row} for row in sorted(rows, key=lambda r: [r[name] for name in _ORDER])]
    pq.write_table(pa.Table.from_pylist(predictions, schema=PREDICTIONS), task.output / "predictions.parquet")
    return {"probes": len(rows)}


_ORDER = ("edit", "probe", "wording", "draw")


def _write_curves(task: Task, curves: list[dict[str, Any]], facts: _StepFacts) -> dict[str, Any]:
    pq.write_table(curves_table(curves), task.output / "curves.parquet")
    training: TrainingConfig = task.config.training
    planned = len(curves) // curves[-1]["epoch"] * training.epochs  # every epoch has the same number of steps
    beside = {"replayed_from": len(facts.earlier)} if training.replay else {}
    beside |= {"anchored_on": len(facts.anchors)} if training.anchor else {}
    return beside | {
        "steps": len(curves),
        "steps_planned": planned,
        "stopped": "learnt" if len(curves) < planned else "epochs",
        "skipped": sum(c["skipped"] for c in curves),
        "loss_sft": curves[-1]["loss_sft"],
        "training_s": round(sum(c["seconds"] for c in curves), 3),
    }


@contextmanager
def _edited(task: Task, loaded: Loaded, group: WorkerGroup) -> Iterator[None]:
    """The base model, with the change of the step's input `adapter` if there is one."""
    changes = [_change(task, "adapter", group)] if "adapter" in task.step.inputs else []
    with loaded.lora.off(), attached(loaded.model, *changes):
        yield


def _change(task: Task, name: str, group: WorkerGroup) -> Change:
    """The change to the base model by the round of the input `name`, on every worker."""
    change: Change | None = None
    if group.leads:
        artifact = task.inputs[name]
        low_rank = any(Path(file).parts[0] == "adapter" for file in artifact.record.files)
        change = read_factors(artifact.local("adapter"))[0] if low_rank else load_delta(artifact.local("delta"))
    return group.share(change)


def _own_chains(taught: Sequence[Taught], group: WorkerGroup) -> list[Taught]:
    """This worker's share of the chains. A chain is not split."""
    chains = {c: i for i, c in enumerate(dict.fromkeys(t.edit.chain for t in taught))}
    return [t for t in taught if chains[t.edit.chain] % group.size == group.rank]


def _shared_table(task: Task, name: str, group: WorkerGroup, file: str | None = None) -> pa.Table:
    """The small table `<file or name>.parquet` of the input `name`, read by the leader for all."""
    return group.share(pq.read_table(task.inputs[name].local(f"{file or name}.parquet")) if group.leads else None)
