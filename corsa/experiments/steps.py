"""The steps that need no cluster: reading, dealing facts to rounds, merging adapters, and making the report."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from corsa.config.steps import (
    EditsConfig,
    FLearningRoundConfig,
    JoinedConfig,
    MergeConfig,
    PartConfig,
    ReportConfig,
    Shown,
)
from corsa.data.benchmarks import read
from corsa.data.edit import from_table, to_table
from corsa.data.schedule import deal
from corsa.data.splits import describe, split
from corsa.evaluation import mmlu
from corsa.evaluation import sanity_questions as controls
from corsa.evaluation.metrics import compute
from corsa.evaluation.prepared_predictions import BASE
from corsa.flow.step import topological
from corsa.flow.store import Artifact
from corsa.flow.task import Task
from corsa.report.page import Scenario, write_paper, write_report


def read_edits(task: Task) -> dict[str, Any]:
    """Step function: a benchmark -> edits.parquet, and skipped.json with every record that could not be used."""
    config: EditsConfig = task.config
    found = read(
        config.benchmark,
        task.placement.data,
        limit=config.limit,
        offset=config.offset,
        rounds=config.rounds,
        on_bad_record=config.on_bad_record,
        on_contradiction=config.on_contradiction,
        whole_cases=config.whole_cases,
    )
    pq.write_table(to_table(found.edits), task.output / "edits.parquet")
    against = [str(contradiction) for contradiction in found.contradictions]
    (task.output / "contradictions.json").write_text(json.dumps(against, indent=1))
    skipped = [{"where": b.where, "field": b.field, "reason": b.reason} for b in found.skipped]
    (task.output / "skipped.json").write_text(json.dumps(skipped, indent=1))
    facts = len({e.chain for e in found.edits})
    counts = {"skipped": len(skipped), "short": found.short, "contradictions": len(against)}
    return {"edits": len(found.edits), "facts": facts} | counts


def deal_rounds(task: Task) -> dict[str, Any]:
    """Step function: edits.parquet -> schedule.parquet (`corsa.data.schedule.ROUNDS`)."""
    edits = from_table(pq.read_table(task.inputs["edits"].local("edits.parquet")))
    schedule = deal(edits, task.config)
    pq.write_table(schedule, task.output / "schedule.parquet")
    return {"taught": len(schedule), "rounds": len(set(schedule["learnt"].to_pylist()))}


def take_part(task: Task) -> dict[str, Any]:
    """Step function: edits.parquet -> edits.parquet of one part, and what the part is about, in words."""
    config: PartConfig = task.config
    edits = from_table(pq.read_table(task.inputs["edits"].local("edits.parquet")))
    part = split(edits, config.parts)[config.part]
    pq.write_table(to_table(part), task.output / "edits.parquet")
    (task.output / "description.txt").write_text(describe(part))
    (task.output / "skipped.json").write_text("[]")
    return {"edits": len(part), "facts": len({e.chain for e in part})}


def read_questions(task: Task) -> dict[str, Any]:
    """Step function: MMLU's files -> questions.parquet."""
    questions = mmlu.read_mmlu(task.placement.data, limit=task.config.limit)
    pq.write_table(questions, task.output / "questions.parquet")
    return {"questions": len(questions), "subjects": len(set(questions["subject"].to_pylist()))}


def merge_adapters(task: Task) -> dict[str, Any]:
    """Step function: adapters that were trained apart -> one adapter, and how far it is from their sum."""
    from corsa.lora.arithmetic import check_same_base, merge  # torch: only where something is merged
    from corsa.lora.peft_format import read_factors, write_factors

    config: MergeConfig = task.config
    adapters, bases = zip(*(read_factors(a.local("adapter")) for a in task.inputs.values()), strict=True)
    check_same_base(bases)
    how = {"weights": config.weights, "rank": config.rank, "density": config.density, "seed": config.seed}
    merged, metrics = merge(adapters, config.method, **how)
    write_factors(merged, task.output / "adapter", bases[0])
    return metrics


def make_report(task: Task) -> dict[str, Any]:
    """Step function: answers of the base model and of every round -> predictions, curves, metrics and the page."""
    config: ReportConfig = task.config
    kinds = {name: step.kind.name for name, step in task.step.inputs.items()}
    schedules = [pq.read_table(task.inputs[n].local("schedule.parquet")) for n, k in kinds.items() if k == "schedule"]
    predictions = pd.concat([_answers(task, shown) for shown in config.shown], ignore_index=True)
    predictions = _as_scheduled(predictions, pa.concat_tables(schedules).to_pandas())
    taught = {shown.answers: shown.method for shown in reversed(config.shown)}
    curves = [
        _named(task.inputs[name], "curves.parquet", method)
        for name, method in reversed(taught.items())
        if "curves.parquet" in task.inputs[name].record.files
    ]
    curves = pd.concat(curves, ignore_index=True) if curves else pd.DataFrame()
    predictions.to_parquet(task.output / "predictions.parquet", index=False)
    curves.to_parquet(task.output / "curves.parquet", index=False)
    metrics = measured(task, config, predictions)
    (task.output / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False))
    run = described_run(task, config.title, config.command, config.experiment) | {
        "notes": [*_notes(task), *controls.told(metrics.get("controls"))]
    }
    (task.output / "run.json").write_text(json.dumps(run, indent=1))
    write_report(task.output, metrics=metrics, predictions=predictions, curves=curves, run=run)
    return {"predictions": len(predictions)}


def described_run(task: Task, title: str, command: str, experiment: dict[str, Any]) -> dict[str, Any]:
    """What a page says of the run behind it."""
    steps = _steps(task)
    first = next(task.inputs[name] for name, step in task.step.inputs.items() if step.kind.name in FIRST)
    return {
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": sum(step["seconds"] for step in steps),
        "command": command,
        "config": experiment,
        "steps": steps,
        "skipped": [
            entry
            for artifact in task.inputs.values()
            if "skipped.json" in artifact.record.files
            for entry in json.loads(artifact.read("skipped.json"))
        ],
        "versions": first.record.versions,
        "hardware": _hardware(),
    }


FIRST = ("edits", "part", "problems")
"""Kinds of the steps that a run begins with."""


def join_reports(task: Task) -> dict[str, Any]:
    """Step function: the reports of several scenarios -> one page, and their metrics by scenario."""
    config: JoinedConfig = task.config
    scenarios, metrics = {}, {}
    for step, artifact in task.inputs.items():
        run = json.loads(artifact.read("run.json"))
        metrics[step.removeprefix("report/")] = found = json.loads(artifact.read("metrics.json"))
        answers, curves = (pd.read_parquet(artifact.local(f"{name}.parquet")) for name in ("predictions", "curves"))
        scenarios[run["title"]] = Scenario(found, answers, curves, run)
    run = about(task, config)
    (task.output / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False))
    (task.output / "run.json").write_text(json.dumps(run, indent=1))
    write_paper(task.output, scenarios, run)
    return {"scenarios": len(scenarios)}


def about(task: Task, config: JoinedConfig) -> dict[str, Any]:
    """What is known of a run that joins several reports (run.json)."""
    steps = _steps(task)
    return {
        "title": config.title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": sum(step["seconds"] for step in steps),
        "command": config.command,
        "config": config.experiment,
        "steps": steps,
        "versions": next(iter(task.inputs.values())).record.versions,
        "hardware": _hardware(),
    }


def measured(task: Task, config: ReportConfig, predictions: pd.DataFrame) -> dict[str, Any]:
    """The metrics of all answers, of each benchmark's where there are several, and of the answers to MMLU."""
    how: dict[str, Any] = {"rule": config.rule, "protocol": config.protocol, "compare_with": config.compare_with}
    metrics = compute(predictions, **how)
    names = [name for name, step in task.step.inputs.items() if step.kind.name == "edits"]
    if len(names) > 1:
        rows = {}
        for name in names:
            ids = set(pq.read_table(task.inputs[name].local("edits.parquet"), columns=["id"])["id"].to_pylist())
            rows[name.removeprefix("edits/")] = compute(predictions[predictions.edit.isin(ids)], **how)["rows"]
        metrics["by_benchmark"] = rows
    answers = {s.method: pq.read_table(task.inputs[s.answers].local("answers.parquet")) for s in config.specificity}
    metrics["specificity"] = {method: mmlu.accuracy(rows.to_pylist()) for method, rows in answers.items()}
    if config.controls:
        before, now = (pq.read_table(task.inputs[s.answers].local("answers.parquet")) for s in config.controls)
        metrics["controls"] = controls.changes(before.to_pylist(), now.to_pylist())
    metrics |= {
        "headlines": list(config.headlines),
        "axes": [axis.canonical() for axis in config.axes],
        "published": list(config.published),
    }
    return metrics


def _answers(task: Task, shown: Shown) -> pd.DataFrame:
    rows = _named(task.inputs[shown.answers], "predictions.parquet", shown.method)
    return rows if shown.trained is None else rows.assign(trained=shown.trained)


def _named(artifact: Artifact, file: str, method: str) -> pd.DataFrame:
    return pq.read_table(artifact.local(file)).to_pandas().assign(method=method)


def _as_scheduled(predictions: pd.DataFrame, schedule: pd.DataFrame) -> pd.DataFrame:
    """The base model's rows with the round and part that this scenario gives to each edit, if it teaches it."""
    base = predictions[predictions.method == BASE].drop(columns=["learnt", "part"])
    schedule = schedule[["edit", "learnt", "part"]].drop_duplicates("edit")
    base = base.merge(schedule, on="edit")[list(predictions.columns)]
    return pd.concat([base, predictions[predictions.method != BASE]], ignore_index=True)


def _notes(task: Task) -> list[str]:
    """What a reader of the numbers has to know that they do not show."""
    notes = []
    for step in topological([task.step])[:-1]:
        found = task.store.artifact(step.fingerprint).metrics
        notes += [f"{step.name}: {text}." for text in found.get("notes", ())]
        if step.kind.name == "statistics":
            notes.append(f"MEMIT's key statistics rest on {found['tokens']} tokens of {found['corpus']}.")
        if found.get("contradictions"):
            kept = step.config.canonical()["on_contradiction"] == "keep-first"
            dealt = "their cases are left out" if kept else "all are taught"
            notes.append(f"{step.name}: {found['contradictions']} edits contradict an earlier one ({dealt}).")
        if step.kind.name == "merge":
            error = f"relative error {found['error']:.2g} against the adapters' sum"
            notes.append(f"{step.name}: rank {found['rank']}, {error}.")
        if "routing_accuracy" in found:
            notes.append(f"{step.name}: {100 * found['routing_accuracy']:.1f} % of the queries reach their adapter.")
        if "cut_error" in found:
            notes.append(f"{step.name}: cut to rank {found['rank']}, relative error {found['cut_error']:.2g}.")
        elif isinstance(step.config, FLearningRoundConfig):
            notes.append(f"{step.name}: the adapter has rank {found['rank']}.")
        if found.get("templated"):
            notes.append(
                f"{found['templated']} of {found['edits']} facts came without other wordings: templates made theirs."
            )
        if found.get("asked"):
            notes.append(
                f"{found['asked']} old answers are the model's own"
                + (f"; {found['known']} of these facts it knew already." if found["known"] else ".")
            )
        if found.get("without_subject"):
            notes.append(
                f"{step.name}: {found['without_subject']} of {found['edits']} edits do not name their subject in the "
                "question, so the question's last token stood in for it."
            )
    return notes


def _steps(task: Task) -> list[dict[str, Any]]:
    """Every step the report rests on, with the seconds it took when it was run."""
    rows = []
    for step in topological([task.step]):
        if step is not task.step:
            record = task.store.artifact(step.fingerprint).record
            needs = [needed.name for needed in step.inputs.values()]
            rows.append({"name": step.name, "seconds": record.seconds, "state": "done", "inputs": needs})
    return rows


def _hardware() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": platform.system(),
    }
