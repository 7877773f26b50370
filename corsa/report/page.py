"""The report of a run: one HTML file for screen, phone or print."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from corsa.config.evaluation import SHALLOW
from corsa.report.answers import folded_answers, sampled, text
from corsa.report.dag import Dag
from corsa.report.examples import examples
from corsa.report.figures import figures
from corsa.report.findings import findings, headlines, summary
from corsa.report.layout import write_page
from corsa.report.paper_figures import with_measured
from corsa.report.update import update

_DIRECTIONS = {"high": "higher is better", "low": "lower is better"}

_TITLES = {
    "neighbor": ("Neighbors", "Questions about other facts, whose answers should not change"),
    "multihop": ("Conclusions", "Questions whose answer follows from the facts"),
    "history": ("Former answers", "Questions for the former answer of a fact"),
    "reversal": ("Reversal", "The questions turned round: the answer is the subject"),
    "negation": ("Negation", "Is the old answer true, and is the new one?"),
    "choice": ("Choice", "The right answer among others"),
    "template": ("Other prompt template", "The taught questions asked in chat, or in `Q:` and `A:` if taught in chat"),
}
"""Heading and caption of the questions of each kind on the page of an update, besides those of the facts."""

_RIGHT = {
    "words": "An answer is right if it contains the taught one as whole words.",
    "contains": "An answer is right if it contains the taught one.",
    "exact": "An answer is right if it is the taught one and nothing else.",
}


@dataclass(frozen=True)
class Scenario:
    """The data for one scenario's part of a page.

    metrics: the result of `corsa.evaluation.metrics.compute`. predictions: one row per wording asked
    (`corsa.evaluation.predict`). curves: one row per optimizer step; may be empty. run: see `write_report`.
    """

    metrics: dict[str, Any]
    predictions: pd.DataFrame
    curves: pd.DataFrame
    run: Mapping[str, Any]


def write_report(
    directory: Path, *, metrics: dict[str, Any], predictions: pd.DataFrame, curves: pd.DataFrame, run: Mapping[str, Any]
) -> Path:
    """Write `report.html` into a directory and return its path.

    Args:
        directory: created if absent.
        metrics: the result of `corsa.evaluation.metrics.compute`.
        predictions: one row per wording asked (`corsa.evaluation.predict`).
        curves: one row per optimizer step; may be empty.
        run: facts about the run; every key is optional: `scenario` ("update": the page of an update, whose technical
            part is folded away), `title`, `created`, `seconds`, `command` (text), `config`
            (nested mapping), `steps` (list of {name, seconds, state, inputs: names}), `versions` and `hardware`
            (mappings, or text), `skipped` (list of skipped records, each a mapping or text), `notes` (list of
            sentences shown under the summary).
    """
    title = run.get("title", "CoRSA run")
    scenario = Scenario(metrics, predictions, curves, run)
    of_update = run.get("scenario") == "update" and metrics["methods"] != ["base"]
    more = {
        "update": update(metrics, text(predictions)) if of_update else {},
        "titles": _TITLES,
        "right_is": _RIGHT[metrics["rule"]],
    }
    return write_page(
        directory,
        "update.html" if of_update else "report.html",
        **(more if of_update else {}),
        **_section("", title, scenario),
        **_about(run, {title: scenario}),
        skipped=_table(run.get("skipped") or []),
    )


def write_paper(
    directory: Path,
    scenarios: Mapping[str, Scenario],
    run: Mapping[str, Any],
    sizes: dict[str, Any] | None = None,
) -> Path:
    """Write `report.html` for several scenarios {title: scenario} and return its path. `sizes`
    (`corsa.report.sizes.page_of_sizes`) adds a part on several model sizes.
    """
    sections = [
        _section(f"s{number}", title, scenario) for number, (title, scenario) in enumerate(scenarios.items(), start=1)
    ]
    plots = {id_: plot for section in sections for id_, plot in section.pop("plots").items()}
    plots |= sizes["plots"] if sizes else {}
    about = _about(run, scenarios)
    return write_page(directory, "paper.html", title=run["title"], sections=sections, sizes=sizes, plots=plots, **about)


def _section(id_: str, title: str, scenario: Scenario) -> dict[str, Any]:
    """Template variables for the results, figures and examples of one scenario."""
    metrics, run = scenario.metrics, scenario.run
    chosen = headlines(metrics)
    prefix = f"{id_}-" if id_ else ""
    drawn = figures(metrics, scenario.curves)
    shown = sampled(scenario.predictions)
    edited = [name for name in metrics["methods"] if name != "base"]
    kinds = [metrics["probe_kind"], *(["multihop"] if (scenario.predictions.kind == "multihop").any() else [])]
    return {
        "id": id_,
        "prefix": prefix,
        "title": title,
        "metrics": metrics,
        "summary": summary(metrics),
        "findings": [*findings(metrics), *run.get("notes", [])],
        "main": list(chosen),
        "more": [name for name in metrics["definitions"] if name not in chosen and _asked(metrics, name)],
        "pairs": list(dict.fromkeys((entry["a"], entry["b"]) for entry in metrics["comparisons"])),
        "counted": {name: _counted(metrics, name) for name in metrics["definitions"]},
        "published": with_measured(metrics),
        "specificity": metrics.get("specificity") or {},
        "everyday": metrics.get("everyday") or {},
        "by_benchmark": metrics.get("by_benchmark") or {},
        "matrices": metrics.get("matrices") or {},
        "figures": drawn,
        "plots": {
            f"{prefix}{figure.id}-{index}": plot for figure in drawn for index, (_, plot) in enumerate(figure.plots)
        },
        "examples": [
            example for kind in kinds for example in examples(shown, rule=metrics["rule"], kind=kind, methods=edited)
        ],
        "asked": ["base"] * ("base" in metrics["methods"]) + edited,
    }


def _about(run: Mapping[str, Any], scenarios: Mapping[str, Scenario]) -> dict[str, Any]:
    """Template variables for the whole run: every answer, the steps, and how to repeat it."""
    rules = {scenario.metrics["rule"] for scenario in scenarios.values()}
    return {
        "run": run,
        "directions": _DIRECTIONS,
        "rule": ", ".join(sorted(rules)),
        "answers": folded_answers({t: (s.predictions, s.metrics["rule"]) for t, s in scenarios.items()}),
        "dag": Dag.of(run.get("steps") or []),
        "config": yaml.safe_dump(_plain(run["config"]), sort_keys=False, allow_unicode=True)
        if run.get("config")
        else "",
    }


def _asked(metrics: dict[str, Any], name: str) -> bool:
    """Whether a metric was measured, or is one that every run measures."""
    return name not in SHALLOW or any(row["metrics"][name]["value"] is not None for row in metrics["rows"])


def _counted(metrics: dict[str, Any], name: str) -> str:
    """The number of facts and wordings behind a metric; a range if it depends on the method."""
    entries = [row["metrics"][name] for row in metrics["rows"] if row["metrics"][name]["value"] is not None]
    if not entries:
        return ""
    edits, probes = (
        [min(entry[key] for entry in entries), max(entry[key] for entry in entries)] for key in ("edits", "probes")
    )
    over = metrics.get("over", "facts")
    return f"{'–'.join(map(str, dict.fromkeys(edits)))} {over}, {'–'.join(map(str, dict.fromkeys(probes)))} wordings"


def _table(records: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of text for a list of mappings or texts."""
    rows = [record if isinstance(record, Mapping) else {"record": record} for record in records]
    columns = list(dict.fromkeys(str(key) for row in rows for key in row))
    return columns, [[str(row.get(column, "")) for column in columns] for row in rows]


def _plain(value: Any) -> Any:
    """Converts a value to types that YAML supports."""
    return json.loads(json.dumps(value, default=str))
