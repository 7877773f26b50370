"""What an update did, fact by fact, as the terminal shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table

from corsa.evaluation.sanity_questions import short, told

_SHOWN = 30


def facts(predictions: pd.DataFrame, rule: str) -> list[dict[str, Any]]:
    """One row for each fact that the last update taught: {edit, prompt, answer, took, right, wordings, says}.

    Args:
        predictions: the table of a report (`corsa.evaluation.predict`), one method beside the base model.
        rule: "contains" or "exact".
    """
    last = predictions[(predictions.method != "base") & (predictions.trained == predictions.trained.max())]
    last = last[last.learnt == last.trained]
    new = "matched_new" if rule == "contains" else "exact_new"
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
    """The facts as a table; of many only those that did not take or generalise."""
    shown = rows if len(rows) <= _SHOWN else [r for r in rows if not r["took"] or 2 * r["right"] < r["wordings"]]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", caption_justify="left")
    for name, justify in (("fact", "left"), ("taught", "left"), ("took", "left"), ("other wordings", "right")):
        grid.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in shown[:_SHOWN]:
        took = "yes" if row["took"] else f"no: {escape(short(row['says']) or '(nothing)')}"
        wordings = f"{row['right']}/{row['wordings']}" if row["wordings"] else "–"
        grid.add_row(escape(row["prompt"]), escape(row["answer"]), took, wordings)
    if len(shown) < len(rows) or len(shown) > _SHOWN:
        rest = len(rows) - min(len(shown), _SHOWN)
        grid.caption = f"and {rest} more, in the report" + (" (shown: those that did not take)" * (shown is not rows))
    return grid


def summary(metrics: dict[str, Any], predictions: pd.DataFrame) -> Iterator[str]:
    """What took, what generalises, what became of earlier facts and what else changed, a sentence each."""
    row = metrics["rows"][-1]["metrics"]
    found = facts(predictions, metrics["rule"])
    if found:
        yield f"took: {sum(f['took'] for f in found)} of {len(found)} facts"
        right, all_ = sum(f["right"] for f in found), sum(f["wordings"] for f in found)
        if all_:
            yield f"other wordings: {right} of {all_} answered right"
    if row["forgetting"]["value"] is not None:
        entry = row["forgetting"]
        lost = round(entry["value"] * 100)
        yield f"earlier facts: {lost} % of what was right when it was learnt is wrong now ({entry['edits']} facts)"
    if row["neighborhood"]["value"] is not None:
        same = row["agreement"]["value"]
        agreed = "" if same is None else f", {100 * same:.0f} % answered as the base model does"
        entry = row["neighborhood"]
        yield f"neighbors: {100 * entry['value']:.0f} % right{agreed} ({entry['probes']} asked)"
    yield from told(metrics.get("controls"))
