"""The steps that need no cluster: reading data, assigning facts to rounds, merging adapters, making the report."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from corsa.config.steps import (
    EditsConfig,
    JoinedConfig,
    MergeConfig,
    PartConfig,
    PerplexityConfig,
    ReportConfig,
    RoundConfig,
    Shown,
)
from corsa.data.benchmarks import read
from corsa.data.benchmarks.cases import told
from corsa.data.edit import from_table, to_table
from corsa.data.schedule import PLACED, assign, placed
from corsa.data.splits import describe, split
from corsa.evaluation import capability, mmlu, sanity_questions, specificity
from corsa.evaluation.metrics import compute
from corsa.evaluation.prepared_predictions import BASE
from corsa.experiments.reported import read_reported, reported, write_reported
from corsa.flow.step import Step, topological
from corsa.flow.store import Artifact
from corsa.flow.task import Task
from corsa.methods import looks_back, method_of
from corsa.report.page import Scenario, write_paper, write_report
from corsa.report.training import told_perturbation, told_training
from corsa.report.update import told_forgotten


def read_edits(task: Task) -> dict[str, Any]:
    """Step function: a benchmark -> edits.parquet, and skipped.json with every unusable record."""
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
    return {"edits": len(found.edits), "facts": facts} | counts | found.repeats.counts


def assign_rounds(task: Task) -> dict[str, Any]:
    """Step function: edits.parquet -> schedule.parquet (`corsa.data.schedule.ROUNDS`)."""
    edits = pq.read_table(task.inputs["edits"].local("edits.parquet"), columns=list(PLACED))
    schedule = assign(placed(edits), task.config)
    pq.write_table(schedule, task.output / "schedule.parquet")
    return {"taught": len(schedule), "rounds": len(set(schedule["learnt"].to_pylist()))}


def take_part(task: Task) -> dict[str, Any]:
    """Step function: edits.parquet -> edits.parquet of one part, and a text on its content."""
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
    """Step function: separately trained adapters -> one adapter, and its distance from their sum."""
    from corsa.lora.arithmetic import check_same_base, merge  # imports torch: only for a merge
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
    answers = ((task.inputs[one.answers].local("predictions.parquet"), one) for one in config.shown)
    table = reported(answers, pa.concat_tables(schedules), _cases(task))
    write_reported(table, task.output / "predictions.parquet")
    predictions = table.to_pandas()
    del table
    taught = {shown.answers: shown.method for shown in reversed(config.shown)}
    curves = [
        _named(task.inputs[name], "curves.parquet", method)
        for name, method in reversed(taught.items())
        if "curves.parquet" in task.inputs[name].record.files
    ]
    curves = pd.concat(curves, ignore_index=True) if curves else pd.DataFrame()
    curves.to_parquet(task.output / "curves.parquet", index=False)
    metrics = measured(task, config, predictions)
    (task.output / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False))
    run = described_run(task, config.title, config.command, config.experiment) | {
        "scenario": config.scenario,
        "notes": [
            *config.notes,
            *_notes(task),
            *told_forgotten(metrics),
            *sanity_questions.told(metrics.get("controls")),
            *(f"{one['measure']}: {capability.told(one)}." for one in metrics.get("capability", ())),
        ],
    }
    (task.output / "run.json").write_text(json.dumps(run, indent=1))
    write_report(task.output, metrics=metrics, predictions=predictions, curves=curves, run=run)
    return {"predictions": len(predictions)}


def described_run(task: Task, title: str, command: str, experiment: dict[str, Any]) -> dict[str, Any]:
    """The description of a run for its page."""
    steps = _steps(task)
    first = next(task.inputs[name] for name, step in task.step.inputs.items() if step.kind.name in FIRST)
    return {
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": sum(step["seconds"] for step in steps),
        "command": command,
        "config": experiment,
        "steps": steps,
        "skipped": skipped(task.inputs.values()),
        "commits": _commits(task),
        "versions": first.record.versions,
        "hardware": _hardware(),
    }


def skipped(inputs: Iterable[Artifact]) -> list[dict[str, Any]]:
    """The records that any input skipped, each once: two reference columns skip the same ones."""
    found = [
        entry
        for artifact in inputs
        if "skipped.json" in artifact.record.files
        for entry in json.loads(artifact.read("skipped.json"))
    ]
    return [entry for i, entry in enumerate(found) if entry not in found[:i]]


FIRST = ("edits", "part", "problems")
"""Kinds of the first steps of a run."""


def join_reports(task: Task) -> dict[str, Any]:
    """Step function: the reports of several scenarios -> one page, and their metrics by scenario."""
    config: JoinedConfig = task.config
    scenarios, metrics = {}, {}
    for step, artifact in task.inputs.items():
        run = json.loads(artifact.read("run.json"))
        metrics[step.removeprefix("report/")] = found = json.loads(artifact.read("metrics.json"))
        answers = read_reported(artifact.local("predictions.parquet")).to_pandas()
        curves = pd.read_parquet(artifact.local("curves.parquet"))
        scenarios[run["title"]] = Scenario(found, answers, curves, run)
    run = about(task, config)
    (task.output / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False))
    (task.output / "run.json").write_text(json.dumps(run, indent=1))
    write_paper(task.output, scenarios, run)
    return {"scenarios": len(scenarios)}


def about(task: Task, config: JoinedConfig) -> dict[str, Any]:
    """The description of a run that joins several reports (run.json)."""
    steps = _steps(task)
    return {
        "title": config.title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": sum(step["seconds"] for step in steps),
        "command": config.command,
        "config": config.experiment,
        "steps": steps,
        "commits": _commits(task),
        "versions": next(iter(task.inputs.values())).record.versions,
        "hardware": _hardware(),
    }


def measured(task: Task, config: ReportConfig, predictions: pd.DataFrame) -> dict[str, Any]:
    """The metrics of all answers, of each benchmark if there are several, and of the MMLU answers."""
    how: dict[str, Any] = {
        "rule": config.rule,
        "protocol": config.protocol,
        "compare_with": config.compare_with,
        "taught_questions": config.taught_questions,
        "kinds": config.kinds,
    }
    metrics = compute(predictions, **how, primary=config.primary)
    names = [name for name, step in task.step.inputs.items() if step.kind.name == "edits"]
    if len(names) > 1:
        rows = {}
        for name in names:
            ids = set(pq.read_table(task.inputs[name].local("edits.parquet"), columns=["id"])["id"].to_pylist())
            rows[name.removeprefix("edits/")] = compute(predictions[predictions.edit.isin(ids)], **how)["rows"]
        metrics["by_benchmark"] = rows
    metrics["specificity"] = _by_method(task, config.specificity, mmlu.accuracy)
    if config.everyday:
        metrics["everyday"] = _by_method(task, config.everyday, specificity.everyday)
    if config.controls:
        before, now = (pq.read_table(task.inputs[s.answers].local("answers.parquet")) for s in config.controls)
        metrics["controls"] = sanity_questions.changes(before.to_pylist(), now.to_pylist())
    if config.capability:
        metrics["capability"] = _capability(task, config, metrics.get("controls"))
    metrics |= {
        "training": [text for _, text in _trained(task)],
        "cost": _cost(task, config.shown),
        "looks_back": sorted({s.method for s in config.shown if _looks_back(task.step.inputs[s.answers])}),
        "headlines": list(config.headlines),
        "axes": [axis.canonical() for axis in config.axes],
        "published": list(config.published),
    }
    return metrics


def _by_method(task: Task, shown: Sequence[Shown], measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Each method's result over its seeds, {seed: rows}, next to the unedited model's rows."""
    runs: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for one in shown:
        rows = pq.read_table(task.inputs[one.answers].local("answers.parquet")).to_pylist()
        runs.setdefault(one.method, {})[one.seed] = rows
    before = next(iter(runs.get(BASE, {}).values()), None)
    return {method: measure(own, None if method == BASE else before) for method, own in runs.items()}


def _cost(task: Task, shown: Sequence[Shown]) -> dict[str, float]:
    """Seconds of training of each method that was trained in this run: over all rounds, as a mean over seeds."""
    rounds = {task.step.inputs[s.answers].fingerprint: s for s in shown if s.method != BASE}  # each once
    spent: dict[str, dict[int, float]] = {}
    for one in rounds.values():
        artifact = task.inputs[one.answers]
        if (seconds := artifact.metrics.get("training_s")) is not None:
            seeds = spent.setdefault(one.method, {})
            seed = getattr(task.step.inputs[one.answers].config, "seed", one.seed)
            seeds[seed] = seeds.get(seed, 0.0) + seconds
    return {method: mean(seeds.values()) for method, seeds in spent.items()}


def _capability(task: Task, config: ReportConfig, controls: dict[str, Any] | None) -> list[dict[str, Any]]:
    """How each measure of a gate changed; the everyday questions among them."""
    found: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
    if controls and any(isinstance(task.step.inputs[s.answers].config, PerplexityConfig) for s in config.capability):
        for when, right in (("before", "right_before"), ("now", "right")):
            found[when] += capability.everyday(controls["asked"], right)
    for shown in config.capability:
        found[shown.method] += pq.read_table(task.inputs[shown.answers].local("measured.parquet")).to_pylist()
    return capability.changes(found["before"], found["now"])


def _cases(task: Task) -> pa.Table | None:
    """The case of every edit (columns edit, case); blank if the edit is its own case. None without edits."""
    tables = [
        pq.read_table(task.inputs[name].local("edits.parquet"), columns=["id", "case"])
        for name, step in task.step.inputs.items()
        if step.kind.name in ("edits", "part")
    ]
    return pa.concat_tables(tables).rename_columns(["edit", "case"]) if tables else None


def _named(artifact: Artifact, file: str, method: str) -> pd.DataFrame:
    return pq.read_table(artifact.local(file)).to_pandas().assign(method=method)


def _trained(task: Task) -> list[tuple[str, str]]:
    """What the training of each round did, as (name of its step, a sentence without its stop)."""
    found = []
    for step in topological([task.step])[:-1]:
        if isinstance(config := step.config, RoundConfig):
            metrics = task.store.artifact(step.fingerprint).metrics
            texts = (*told_training(config.training, metrics), *told_perturbation(config.model, metrics))
            found += [(step.name, text) for text in texts]
    return found


def _told_once(said: Iterable[tuple[str, str]]) -> list[str]:
    """Sentences about steps, each once: seeds and rounds often say the same."""
    names: dict[str, list[str]] = {}
    for name, text in said:
        names.setdefault(text, []).append(name)
    more = {text: f" and {len(own) - 1} more" if len(own) > 1 else "" for text, own in names.items()}
    return [f"{own[0]}{more[text]}: {text}." for text, own in names.items()]


def _looks_back(answers: Step) -> bool:
    """Whether these answers are of a model that was taught earlier facts again."""
    adapter = answers.inputs.get("adapter", answers)
    return looks_back(adapter.config)


def _notes(task: Task) -> list[str]:
    """Notes that a reader needs to interpret the numbers."""
    notes = _told_once(_trained(task))
    for step in topological([task.step])[:-1]:
        found = task.store.artifact(step.fingerprint).metrics
        notes += [f"{step.name}: {text}." for text in found.get("notes", ())]
        if step.kind.name == "statistics":
            notes.append(f"The key statistics come from {found['tokens']:,} tokens of {found['corpus']}.")
        if method := method_of(step.config):
            notes += [note for note in method.notes(step.name, found) if note not in notes]
        if found.get("contradictions"):
            kept = step.config.canonical()["on_contradiction"] == "keep-first"
            result = "their cases are left out" if kept else "all are taught"
            notes.append(f"{step.name}: {found['contradictions']} edits contradict an earlier one ({result}).")
        if said := told(found):
            notes.append(f"{step.name}: {said}.")
        if step.kind.name == "merge":
            error = f"relative error {found['error']:.2g} against the adapters' sum"
            notes.append(f"{step.name}: rank {found['rank']}, {error}.")
        if "routing_accuracy" in found:
            notes.append(f"{step.name}: {100 * found['routing_accuracy']:.1f} % of the queries reach their adapter.")
        if found.get("templated"):
            notes.append(
                f"{found['templated']} of {found['edits']} facts came without other wordings: templates made theirs."
            )
        if found.get("asked"):
            count = f"{found['asked']} fact{'s' if found['asked'] > 1 else ''} came without an old answer"
            known = f" It already knew {found['known']} of them." if found["known"] else ""
            notes.append(f"{count}: what the model said before the edit is used as the old answer.{known}")
        if found.get("without_subject"):
            notes.append(
                f"{step.name}: {found['without_subject']} of {found['edits']} edits do not name their subject in the "
                "question, so the question's last token stood in for it."
            )
    return notes


def _steps(task: Task) -> list[dict[str, Any]]:
    """Every step that the report depends on, with its running time in seconds."""
    rows = []
    for step in topological([task.step]):
        if step is not task.step:
            record = task.store.artifact(step.fingerprint).record
            needs = [needed.name for needed in step.inputs.values()]
            rows.append({"name": step.name, "seconds": record.seconds, "state": "done", "inputs": needs})
    return rows


def _commits(task: Task) -> list[str]:
    """The commits that the steps were computed at, in order of time."""
    records = [task.store.artifact(step.fingerprint).record for step in topological([task.step])[:-1]]
    records.sort(key=lambda record: record.created)
    return list(dict.fromkeys(r.versions["commit"] for r in records if "commit" in r.versions))


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
