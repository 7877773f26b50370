"""The steps of the code domain that need no cluster: reading problems, converting them to edits, and the report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from corsa.config.code_steps import CodeReportConfig, ProblemsConfig
from corsa.data.benchmarks.code_prompt import read_template
from corsa.data.benchmarks.programs import program_in, read_problems
from corsa.data.edit import Edit, to_table
from corsa.data.text import folded
from corsa.evaluation.pass_at_k import Tried, compared, measure, tried, unjudged
from corsa.evaluation.uncertainty import LEVEL
from corsa.evaluation.verdicts import judged, planned_pairs
from corsa.experiments.steps import described_run
from corsa.flow.task import Task

PROBLEMS = pa.schema(
    [
        (name, pa.string())
        for name in (
            *("id", "update", "package", "prompt", "described", "implementation", "entry", "lead"),
            *("solution", "tests", "imports", "before", "part"),
        )
    ]
)
"""One row per problem; `part` is "taught" or "asked"."""

RATES = {
    "upass_1": ("UPass@1", "updates", 1),
    "upass_5": ("UPass@5", "updates", 5),
    "upass_single": ("UPass, single", "updates", None),
    "spass_1": ("SPass@1", "humaneval", 1),
    "spass_5": ("SPass@5", "humaneval", 5),
    "spass_single": ("SPass, single", "humaneval", None),
    "spass_subset_1": ("SPass@1, published subset", "subset", 1),
    "spass_subset_5": ("SPass@5, published subset", "subset", 5),
}
"""Every rate: its name, its benchmark, and k (None: only the first sample)."""


def read(task: Task) -> dict[str, Any]:
    """Step function: a file of problems -> problems.parquet (`PROBLEMS`)."""
    config: ProblemsConfig = task.config
    template = read_template(task.placement.template)
    problems = read_problems(task.placement.data, limit=config.limit, offset=config.offset, template=template)
    seen: set[str] = set()
    rows = []
    for problem in problems:
        first = config.taught and problem.update not in seen
        seen.add(problem.update)
        rows.append({**problem.model_dump(), "part": "taught" if first else "asked"})
    pq.write_table(pa.Table.from_pylist(rows, schema=PROBLEMS), task.output / "problems.parquet")
    return {"problems": len(rows), **Counter(row["part"] for row in rows)}


def as_edits(task: Task) -> dict[str, Any]:
    """Step function: the taught problems, the base model's answers and their verdicts -> edits.parquet.

    An old answer is kept if it reached the tests and did not pass with the update. Otherwise the edit has no old
    answer and is trained with L_SFT only.
    """
    rows = {row["id"]: row for row in _rows(task, "problems") if row["part"] == "taught"}
    answers = {row["problem"]: row["output"].strip() for row in _rows(task, "answers")}
    verdicts = {row["problem"]: row for row in _rows(task, "verdicts") if row["updated"]}
    edits, counts = [], Counter[str]()
    for id_, row in rows.items():
        verdict, new = verdicts[id_], row["solution"].strip()
        same = folded(program_in(answers[id_])) == folded(new)
        if verdict["outcome"] == "sandbox":
            why = "not_judged"
        elif verdict["outcome"] == "passed" or same:
            why = "passes"
        else:
            why = "runs" if verdict["loaded"] else "does_not_run"
        counts[f"old_answer_{why}"] += 1
        old = answers[id_] if why == "runs" else ""
        edits.append(Edit(id=id_, chain=id_, round=1, prompt=row["prompt"], target_new=new, target_old=old))
    pq.write_table(to_table(edits), task.output / "edits.parquet")
    (task.output / "skipped.json").write_text("[]")
    return {"edits": len(edits), "without_old_answer": len(edits) - counts["old_answer_runs"], **counts}


def _rows(task: Task, name: str) -> list[dict[str, Any]]:
    return pq.read_table(task.inputs[name].local(f"{name}.parquet")).to_pylist()


# The report


def make_report(task: Task) -> dict[str, Any]:
    """Step function: verdicts of every method -> metrics.json, verdicts.parquet and the page."""
    from corsa.report.code import write_code_report

    config: CodeReportConfig = task.config
    metrics = measured(task, config)
    (task.output / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False))
    tables = [
        pq.read_table(task.inputs[shown.answers].local("verdicts.parquet"))
        .append_column("method", pa.array([shown.method] * task.inputs[shown.answers].metrics["programs"]))
        .append_column("benchmark", pa.array([shown.benchmark] * task.inputs[shown.answers].metrics["programs"]))
        .append_column("seed", pa.array([shown.seed] * task.inputs[shown.answers].metrics["programs"]))
        for shown in config.shown
    ]
    pq.write_table(pa.concat_tables(tables), task.output / "verdicts.parquet")
    run = described_run(task, config.title, config.command, config.experiment)
    (task.output / "run.json").write_text(json.dumps(run, indent=1))
    write_code_report(task.output, metrics=metrics, run=run)
    return {"verdicts": sum(len(table) for table in tables)}


def measured(task: Task, config: CodeReportConfig) -> dict[str, Any]:
    """The rates of every method, compared with the other methods and the base model, by update and by problem."""
    found: dict[str, dict[str, list[Tried]]] = {}
    verdicts = {
        shown.answers: pq.read_table(task.inputs[shown.answers].local("verdicts.parquet")).to_pylist()
        for shown in config.shown
    }
    lost = {(s.benchmark, problem) for s in config.shown for problem in unjudged(verdicts[s.answers])}
    for shown in config.shown:
        rows, updates = verdicts[shown.answers], shown.benchmark == "updates"
        problems = [row for row in _rows_of(task, shown.problems) if row["part"] == "asked"]
        counted = [row for row in problems if (shown.benchmark, row["id"]) not in lost]
        groups = {row["id"]: row["update"] or row["id"] for row in counted}
        sets = found.setdefault(shown.method, {})
        sets.setdefault(shown.benchmark, []).extend(tried(rows, groups, updates=updates, seed=shown.seed))
        if shown.benchmark == "humaneval" and config.subset:
            chosen = {id_: id_ for id_ in config.subset if id_ in groups}
            sets.setdefault("subset", []).extend(tried(rows, chosen, updates=False, seed=shown.seed))
    rates = {n: r for n, r in RATES.items() if any(sets.get(r[1]) for sets in found.values())}
    cells, sums = {}, {}
    for method, sets in found.items():
        for name, (_, of, k) in rates.items():
            cells[method, name], sums[method, name] = measure(name, sets.get(of, []), k)
    made = [
        entry
        for a in found
        for b in list(found)[list(found).index(a) + 1 :]
        for name, (_, of, _) in rates.items()
        if (entry := compared(name, a, b, sums[a, name], sums[b, name], cells[a, name]["probes"]))
    ]
    # A rate that this run does not measure (HumanEval without its file) gets no verdict.
    primary = [name for name in config.primary if name in rates or name not in RATES]
    edited = [name for name in found if name != "base"]
    better = dict.fromkeys(rates, "high")
    comparisons = judged(made, primary=primary, pairs=planned_pairs(edited), better=better)
    kinds = [step.kind.name for step in task.step.inputs.values()]
    notes = _notes(task, lost)
    return {
        "title": config.title,
        "over": "updates",
        "primary": primary,
        "rule": "tests passed",
        "protocol": "unbiased",
        "level": LEVEL,
        "probe_kind": "program",
        "standing": "earlier",
        "rounds": [1],
        "methods": list(found),
        "seeds": sorted({shown.seed for shown in config.shown}),
        "chains": len({t.group for sets in found.values() for t in sets.get("updates", [])}),
        "definitions": {
            name: {"label": label, "text": _TEXTS[of], "better": "high", "unit": "share"}
            for name, (label, of, _) in rates.items()
        },
        "headlines": list(rates),
        "rows": [{"method": m, "round": 1, "metrics": {name: cells[m, name] for name in rates}} for m in found],
        "comparisons": comparisons,
        "difference_to_base": _against_base(comparisons),
        "by_update": _by_group(found),
        "by_problem": {m: _by_problem(sets.get("updates", [])) for m, sets in found.items()},
        "notes": notes,
        "published": list(config.published),
        "steps": len(kinds),
    }


_TEXTS = {
    "updates": "programs that pass their tests with the update installed, and neither without it nor where it gives "
    "wrong results",
    "humaneval": "programs that pass HumanEval's tests: what an update of another API should not touch",
    "subset": "the same on the tasks that CodeUpdateArena's authors chose",
}


def _rows_of(task: Task, name: str) -> list[dict[str, Any]]:
    return pq.read_table(task.inputs[name].local("problems.parquet")).to_pylist()


def _against_base(comparisons: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each method, the difference of its HumanEval rates from the unedited model's."""
    found: dict[str, dict[str, Any]] = {}
    for entry in comparisons:
        if entry["a"] == "base" and entry["metric"].startswith("spass"):
            low, high = entry["low"], entry["high"]
            ends = {"low": None if high is None else -high, "high": None if low is None else -low}
            found.setdefault(entry["b"], {})[entry["metric"]] = {"value": -entry["difference"]} | ends
    return found


def _by_group(found: dict[str, dict[str, list[Tried]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """UPass of each update, by method."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for method, sets in found.items():
        for group in dict.fromkeys(t.group for t in sets.get("updates", [])):
            own = [t for t in sets["updates"] if t.group == group]
            values = {name: measure(name, own, k)[0]["value"] for name, (_, of, k) in RATES.items() if of == "updates"}
            table.setdefault(group, {})[method] = values | {"problems": len({t.problem for t in own})}
    return table


def _by_problem(found: list[Tried]) -> dict[str, dict[str, int]]:
    """The number of correct programs per problem, over all seeds."""
    table: dict[str, dict[str, int]] = {}
    for t in found:
        entry = table.setdefault(t.problem, {"right": 0, "samples": 0})
        entry["right"] += sum(t.right)
        entry["samples"] += len(t.right)
    return table


def _notes(task: Task, lost: Collection[Any]) -> list[str]:
    from corsa.flow.step import topological

    notes = ["MEMIT is not among the methods: it needs a subject and an object of one fact, and an update has neither."]
    for step in topological([task.step])[:-1]:
        metrics = task.store.artifact(step.fingerprint).metrics
        if step.kind.name == "program-edits":
            reasons = {"did not run": "does_not_run", "passed already": "passes", "could not be judged": "not_judged"}
            why = "; ".join(f"{said}: {metrics.get(f'old_answer_{name}', 0)}" for said, name in reasons.items())
            notes.append(
                f"{metrics['without_old_answer']} of {metrics['edits']} edits have no old answer (the base model's "
                f"{why}), so they are taught by L_SFT alone."
            )
    if lost:
        names = ", ".join(sorted(problem for _, problem in lost))
        notes.append(
            f"{len(lost)} problems are counted for no method, because a program of theirs could not be judged (their "
            f"tests cannot be run, or the sandbox broke): {names}."
        )
    return notes
