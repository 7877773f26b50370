"""Steps that train: a round of CoRSA, LoRA and the ablations, or of a method with its own teach function."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from safetensors.torch import save_file

from corsa.config import TrainingConfig
from corsa.config.steps import TrialPlace
from corsa.errors import CorsaError
from corsa.evaluation.metrics import measure
from corsa.evaluation.retrieval import FACTS
from corsa.flow.task import Task
from corsa.lora.attached import Change, attached
from corsa.lora.factors import Factors
from corsa.lora.peft_format import load_adapter, save_adapter, write_factors
from corsa.lora.ridge_start import read_little
from corsa.lora.weight_deltas import save_delta
from corsa.methods import method_of
from corsa.methods.base import STATE, Round
from corsa.training.loop import AtEpoch, RoundRun, curves_table, train, train_together
from corsa.training.mixing import Material
from corsa.training.prediction_tasks import ask, predictor_of
from corsa.training.task_inputs import StepFacts, change_of, open_step
from corsa.training.worker_context import Loaded, Post, WorkerContext


def teach_lora(tasks: Sequence[Task], context: WorkerContext, post: Post) -> dict[str, str]:
    """CoRSA, LoRA and the ablations: train one adapter further in each round, or several adapters together."""
    group, started = context.group, time.monotonic()
    facts, loaded = open_step(tasks[0], context, adapters=len(tasks))
    lora = loaded.lora
    lora.initialise(*(task.config.seed for task in tasks))
    ridge = tasks[0].config.training.ridge
    if ridge is not None and "previous" not in tasks[0].step.inputs:
        read_little(loaded.model, lora, [[*t.prompt, *t.new] for t in facts.anchors], ridge)
        group.share_tensor(lora.phi.detach())
    if "previous" in tasks[0].step.inputs:
        if group.leads:
            for row, task in enumerate(tasks):
                load_adapter(lora, task.inputs["previous"].local("adapter"), row)
        group.share_tensor(lora.phi.detach())
    post({"phase": "training"})
    round_runs = [RoundRun(task.config, (task.store, f"partial/{task.fingerprint[:16]}/checkpoint")) for task in tasks]
    scored = _scores(tasks, facts, loaded, context)
    found = train_together(round_runs, facts.material(tasks[0].config), loaded, context, post, scored)
    failed = {t.fingerprint: str(cause) for t, cause in zip(tasks, found, strict=True) if isinstance(cause, CorsaError)}
    shared = (time.monotonic() - started) / len(tasks)
    for row, (task, curves) in enumerate(zip(tasks, found, strict=True)):
        if not isinstance(curves, CorsaError):
            began = time.monotonic()
            with lora.only(row):
                metrics = ask(task, facts, loaded, context, post)
            if group.leads:
                with context.timed("checkpoints"):
                    save_adapter(lora, task.output / "adapter", task.config.model.name, row)
                metrics |= _write_curves(task, curves, facts) | {"packed": len(tasks)} | context.how_it_ran(len(tasks))
                task.commit(metrics, shared + time.monotonic() - began)
    return failed


def _scores(tasks: Sequence[Task], facts: StepFacts, loaded: Loaded, context: WorkerContext) -> AtEpoch:
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
                rows = predictor_of(task.config, loaded, context).ask(facts.asked.own(group))
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


def teach_method(task: Task, context: WorkerContext, post: Post) -> dict[str, Any]:
    """A round of a method that has its own teach function."""
    config, group = task.config, context.group
    method = method_of(config)
    assert method is not None
    assert method.load_teach is not None
    facts, loaded = open_step(task, context)
    post({"phase": "training"})
    taught = method.load_teach()(
        Round(
            config=config,
            edits=facts.taught_now,
            triplets=facts.triplets,
            earlier=facts.earlier,
            model=loaded.model,
            encoder=loaded.encoder,
            lora=loaded.lora,
            before=change_of(task, "previous", group) if "previous" in task.step.inputs else None,
            leads=group.leads,
            share=group.share,
            train=lambda own, name, phi=None, /: train(
                config,
                Material(own),
                replace(loaded, other=phi),
                context,
                (task.store, f"partial/{task.fingerprint[:16]}/{name}"),
                post,
            ),
            input_file=lambda name, file: task.inputs[name].local(file),
            post=post,
        )
    )
    with loaded.lora.off(), attached(loaded.model, taught.change):
        metrics = dict(taught.metrics) | ask(task, facts, loaded, context, post, taught.memory)
    if group.leads:
        _write_change(taught.change, task)
        if taught.state:
            save_file({name: part.contiguous() for name, part in taught.state.items()}, task.output / STATE)
        if taught.memory:
            taught.memory.save(task.output / FACTS)
        metrics = ({} if taught.curves is None else _write_curves(task, taught.curves, facts)) | metrics
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


def _write_curves(task: Task, curves: list[dict[str, Any]], facts: StepFacts) -> dict[str, Any]:
    pq.write_table(curves_table(curves), task.output / "curves.parquet")
    training: TrainingConfig = task.config.training
    planned = len(curves) // curves[-1]["epoch"] * training.epochs  # every epoch has the same number of steps
    beside = {"replayed_from": len(facts.earlier)} if training.replay else {}
    beside |= {"anchored_on": len(facts.anchors)} if training.anchor else {}
    changes = [c["gradient_change"] for c in curves if c.get("gradient_change") is not None and not c["skipped"]]
    beside |= {"gradient_change": median(changes)} if changes else {}
    return beside | {
        "steps": len(curves),
        "steps_planned": planned,
        "stopped": "learnt" if len(curves) < planned else "epochs",
        "skipped": sum(c["skipped"] for c in curves),
        "loss_sft": curves[-1]["loss_sft"],
        "training_s": round(sum(c["seconds"] for c in curves), 3),
    }
