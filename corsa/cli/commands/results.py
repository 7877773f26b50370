"""How the commands that teach and ask print their results: for people, or as JSON for a program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from corsa.cli.commands import GATE_NOT_PASSED
from corsa.editing.options import EditOptions, EvaluateOptions, Teaching
from corsa.editing.plan import Plan, Tuned, plan_evaluation
from corsa.editing.run import Result
from corsa.experiments.runner import lasting, show_plan
from corsa.flow import Store
from corsa.report.facts import summary, tables, trials
from corsa.report.tables import summary_tables
from corsa.report.update import update
from corsa.terminal import Console, visible


def teach(options: Teaching, plan: Plan, as_json: bool) -> int:
    """Run the planned update and show its result. Returns the exit status."""
    from corsa.editing.run import teach

    console = Console(stderr=as_json)
    if options.dry_run:
        _say_what_no_gate_measures(options, plan, console)
        show_plan([plan.report], Store(lasting(options.storage)), console)
        return 0
    _say(console, plan.report.config.canonical()["title"])
    _say_what_no_gate_measures(options, plan, console)
    result = teach(options, plan, console)
    return _show(result, as_json, Console(), plan.tuned)


def teach_tuned(options: EditOptions, as_json: bool) -> int:
    """Run the trials that choose settings, then the update with them. Returns the exit status."""
    from corsa.editing.plan import plan_edit
    from corsa.editing.tuning import chosen, plan_tuning, tune

    console = Console(stderr=as_json)
    if options.dry_run:
        tuning, store = plan_tuning(options), Store(lasting(options.storage))
        if tuned := chosen(tuning, store):
            return teach(options, plan_edit(options, tuned), as_json)
        _say(console, str(tuning))
        show_plan([tuning.choice], store, console)
        return 0
    tuned, found = tune(options, console)
    console.print(trials(found))
    return teach(options, plan_edit(options, tuned), as_json)


def _say_what_no_gate_measures(options: Teaching, plan: Plan, console: Console) -> None:
    if plan.line is None and options.gates.max_forgetting is not None:
        _say(
            console,
            "note: --max-forgetting has nothing to measure in a first update, which has no earlier facts to forget: it "
            "will pass. Give --adapter to continue an earlier update",
        )


def ask(options: EvaluateOptions, as_json: bool) -> int:
    """Run the planned evaluation and show the answers. Returns the exit status."""
    from corsa.editing.run import evaluate

    console = Console(stderr=as_json)
    if options.dry_run:
        show_plan([plan_evaluation(options)[1]], Store(lasting(options.storage)), console)
        return 0
    return _show(evaluate(options, console), as_json, Console())


def show_rolled_back(out: Path, as_json: bool) -> int:
    """Print the path of the restored adapter."""
    if as_json:
        print(json.dumps({"out": str(out)}))
    else:
        print(visible(f"the adapter as it was, with its report and history:\n{out}"))
    return 0


def _show(result: Result, as_json: bool, console: Console, tuned: Tuned | None = None) -> int:
    found = update(result.metrics, result.predictions)
    if as_json:
        print(json.dumps(_plain(result, found) | ({"tuned": dict(tuned.setting)} if tuned else {}), indent=1))
        return 0 if result.passed else GATE_NOT_PASSED
    if result.out:
        for one in tables(found):
            console.print(one)
        for sentence in summary(result.metrics, found):
            _say(console, sentence)
        for sentence in tuned.told if tuned else ():
            _say(console, sentence)
    else:
        for one in summary_tables(result.metrics):
            console.print(one)
    if result.as_base:
        _say(console, str(result.as_base))
    for verdict in result.verdicts:
        _say(console, f"gate {verdict}")
    _say(console, f"report   {result.report}")
    if result.out:
        _say(console, f"adapter  {result.out}")
    return 0 if result.passed else GATE_NOT_PASSED


def _plain(result: Result, found: dict[str, Any]) -> dict[str, Any]:
    gates = [{"gate": v.gate, "bound": v.bound, "value": v.value, "passed": v.passed} for v in result.verdicts]
    return {
        "out": str(result.out) if result.out else None,
        "report": str(result.report),
        "passed": result.passed,
        "gates": gates,
        **({"served": {**result.as_base._asdict(), "applied": result.as_base.applied}} if result.as_base else {}),
        "metrics": result.values,
        "headline": found["headline"],
        "facts": found["facts"],
        "earlier": found["earlier"],
        "controls": result.metrics.get("controls"),
    }


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
