"""The effect of an update on each fact, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table

from corsa.evaluation.prepared_predictions import RULES
from corsa.evaluation.sanity_questions import short, told
from corsa.terminal import visible

_SHOWN = 30


def facts(predictions: pd.DataFrame, rule: str) -> list[dict[str, Any]]:
    """One row for each fact that the last update taught: {edit, prompt, answer, took, right, wordings, says}.

    Args:
        predictions: the table of a report (`corsa.evaluation.predict`), with the base model and one other method.
        rule: "words", "contains" or "exact".
    """
    last = predictions[(predictions.method != "base") & (predictions.trained == predictions.trained.max())]
    last = last[(last.learnt == last.trained) & (last.draw == 0)]
    new, _ = RULES[rule]
    found = []
    for edit, rows in last.groupby("edit", sort=False):
        own, others = rows[rows.kind == "edit"], rows[rows.kind == "paraphrase"]
        found.append(
            {
                "edit": edit,
                "prompt": own.prompt.iloc[0],
                "answer": own.answer.iloc[0],
                "took": bool(own[new].iloc[0]),
                "right": int(others[new].sum()),
                "wordings": len(others),
                "says": own.output.iloc[0],
            }
        )
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    """The facts as a table. If there are many, only those that did not take or generalise."""
    shown = rows if len(rows) <= _SHOWN else [r for r in rows if not r["took"] or 2 * r["right"] < r["wordings"]]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", caption_justify="left")
    for name, justify in (("fact", "left"), ("taught", "left"), ("took", "left"), ("other wordings", "right")):
        grid.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in shown[:_SHOWN]:
        took = "yes" if row["took"] else f"no: {escape(visible(short(row['says'])) or '(nothing)')}"
        wordings = f"{row['right']}/{row['wordings']}" if row["wordings"] else "–"
        grid.add_row(escape(visible(row["prompt"])), escape(visible(row["answer"])), took, wordings)
    if len(shown) < len(rows) or len(shown) > _SHOWN:
        rest = len(rows) - min(len(shown), _SHOWN)
        grid.caption = f"and {rest} more, in the report" + (" (shown: those that did not take)" * (shown is not rows))
    return grid


def told_forgotten(metrics: dict[str, Any]) -> Iterator[str]:
    """One sentence on forgetting, with its counts, for the console and the page of an update."""
    row = metrics["rows"][-1]
    counts = metrics["forgotten"].get(row["method"])
    if counts is None or row["metrics"]["forgetting"]["value"] is None:
        return
    taught, other = counts["taught"], counts["other"]
    right, lost = (taught[name] + other[name] for name in ("right", "lost"))
    yield (
        f"Earlier facts: {lost} of {right} answers that were right when they were learnt are wrong now "
        f"({100 * row['metrics']['forgetting']['value']:.0f} %): {taught['lost']} of {taught['right']} to questions as "
        f"taught, {other['lost']} of {other['right']} to other wordings ({counts['facts']} facts)."
    )


def summary(metrics: dict[str, Any], predictions: pd.DataFrame) -> Iterator[str]:
    """One sentence each on: what the training did, facts that took, generality, earlier facts, and side effects."""
    yield from metrics.get("training", ())
    row = metrics["rows"][-1]["metrics"]
    found = facts(predictions, metrics["rule"])
    if found:
        yield f"took: {sum(f['took'] for f in found)} of {len(found)} facts"
        right, all_ = sum(f["right"] for f in found), sum(f["wordings"] for f in found)
        if all_:
            yield f"other wordings: {right} of {all_} answered right"
    yield from told_forgotten(metrics)
    if row["neighborhood"]["value"] is not None:
        same = row["agreement"]["value"]
        agreed = "" if same is None else f", {100 * same:.0f} % answered as the base model does"
        entry = row["neighborhood"]
        yield f"neighbors: {100 * entry['value']:.0f} % right{agreed} ({entry['probes']} asked)"
    yield from told(metrics.get("controls"))
