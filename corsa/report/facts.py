"""The tables and sentences of an update, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from corsa.evaluation.sanity_questions import short, told
from corsa.report.update import Rows, told_forgotten
from corsa.terminal import visible

_SHOWN = 30
_WHOLE = ("prompt", "question", "answer")  # what a model said is cut
_MARKS = {True: "[green]✓[/green]", False: "[red]✗[/red]"}


def tables(found: dict[str, Any]) -> Iterator[Table]:
    """The facts, earlier facts then and now, and everyday answers lost and won.

    `found`: the result of `corsa.report.update.update`. If there are many facts, only those that did not take or
    generalise, and earlier ones that are wrong now.
    """
    taught: Rows = found["facts"]
    if taught:
        weak = [row for row in taught if not row["took"] or 2 * row["right"] < row["wordings"]]
        rows = [
            (
                _MARKS[row["took"]],
                *_cells(row, "prompt", "answer", "before", "says"),
                f"{row['right']}/{row['wordings']}" if row["wordings"] else "–",
            )
            for row in _few(taught, weak)
        ]
        columns = ("", "fact", "taught", "before", "now", "other wordings")
        yield _table(columns, rows, len(taught), "shown: those that did not take")
    if found["earlier"]:
        wrong = [row for row in found["earlier"] if not row["right_now"]]
        rows = [
            (_MARKS[row["right_now"]], *_cells(row, "prompt", "answer", "then", "now"))
            for row in _few(found["earlier"], wrong)
        ]
        columns = ("", "earlier fact", "taught", "then", "now")
        yield _table(columns, rows, len(found["earlier"]), "shown: those that are wrong now")
    for outcome in ("lost", "won"):
        rows = [
            (_MARKS[row["right"]], *_cells(row, "question", "before", "now"))
            for row in found["everyday"]
            if row["outcome"] == outcome
        ]
        if rows:
            yield _table(("", f"everyday answers {outcome}", "before", "now"), rows, len(rows), "")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _few(rows: Rows, notable: Rows) -> Rows:
    return rows if len(rows) <= _SHOWN else notable[:_SHOWN]


def _cells(row: dict[str, Any], *names: str) -> Iterator[str]:
    for name in names:
        text = row[name]
        text = text if text is None or name in _WHOLE else short(text) or "(nothing)"
        yield "–" if text is None else escape(visible(text))


def _table(columns: Sequence[str], rows: Sequence[tuple[str, ...]], of: int, which: str) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for name in columns:
        grid.add_column(name, justify="right" if name == "other wordings" else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    if len(rows) < of:
        grid.caption = f"and {of - len(rows)} more, in the report ({which})"
    return grid


def trials(found: dict[str, Any]) -> Table:
    """The trials of `corsa edit --tune`. `found`: choice.json (`corsa.editing.tuning_steps`)."""
    names = [name for name, (_, asked) in found["trials"][0]["judged"].items() if asked]
    rows = [
        (
            _MARKS[True] if index == found["best"] else "",
            *(f"{value:g}" for value in trial["setting"].values()),
            str(trial["steps"]),
            *("{}/{}".format(*count) for count in (trial["took"], *(trial["judged"][name] for name in names))),
            f"{trial['score']:.2f}",
        )
        for index, trial in enumerate(found["trials"])
    ]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, caption_justify="left")
    for name in ("", *found["setting"], "steps", "took", *names, "mean"):
        grid.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    grid.caption = "trials, the first with the settings as given; mean: of the shares before it"
    return grid


def summary(metrics: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    """The headline, and one sentence each on: what the training did, earlier facts, and side effects.

    `found`: the result of `corsa.report.update.update`.
    """
    yield found["headline"]
    yield from metrics.get("training", ())
    row = metrics["rows"][-1]["metrics"]
    yield from told_forgotten(metrics)
    if metrics["rule"] != "exact":
        shares = {n: row[n] for n in ("edit_success", "generality") if row[n]["value"] is not None}
        both = [
            f"{n.replace('_', ' ')} {_percent(e['value'])} ({_percent(e['exact'])} exact)" for n, e in shares.items()
        ]
        yield f"all facts that hold, by the rule {metrics['rule']}: {', '.join(both)}"
    if row["neighborhood"]["value"] is not None:
        same = row["agreement"]["value"]
        agreed = "" if same is None else f", {100 * same:.0f} % answered as the base model does"
        entry = row["neighborhood"]
        yield f"neighbors: {100 * entry['value']:.0f} % right{agreed} ({entry['probes']} asked)"
    yield from told(metrics.get("controls"))
