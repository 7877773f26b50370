"""What an update did to every question, for the page and for the terminal: the taught facts, other wordings, earlier
facts then and now, neighbors, and everyday questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from corsa.evaluation import capability
from corsa.evaluation.prepared_predictions import BASE, RULES

Rows = list[dict[str, Any]]

_QUESTION = ["edit", "kind", "probe", "wording"]
_OF_THE_FACT = ("edit", "paraphrase")

_SHALLOW = {
    "reversal": "reversals",
    "negation": "negations",
    "choice": "choices",
    "template": "other template",
}
"""Kinds of probes that shallow edits fail, as the headline names them."""


def update(metrics: dict[str, Any], predictions: pd.DataFrame) -> dict[str, Any]:
    """The rows of every table of an update, and its headline.

    Args:
        metrics: the metrics of a report, with `controls` if everyday questions were asked.
        predictions: the table of a report (`corsa.evaluation.predict`), with the base model and one other method.

    Returns:
        `headline`: one sentence. `facts` and `earlier`: see the functions. `failed`: other wordings of the facts of
        this update that are answered wrong. `lost`: those of earlier facts, right then and wrong now. `others`: {kind
        of probe: rows} of all other kinds. `everyday`: all everyday questions. Rows other than those of the facts have
        question, answer, before, now, right_before, right and outcome (`outcome`). `capability`: one sentence per
        measure of a gate.
    """
    rows = asked(predictions, metrics["rule"])
    kinds = [kind for kind in dict.fromkeys(row["kind"] for row in rows) if kind not in _OF_THE_FACT]
    everyday = [row | {"outcome": outcome(row)} for row in (metrics.get("controls") or {}).get("asked", ())]
    wrong = [row for row in rows if row["kind"] == "paraphrase" and not row["right"]]
    found: dict[str, Any] = {
        "facts": facts(rows),
        "failed": [row for row in wrong if not row["earlier"]],
        "lost": [row for row in wrong if row["earlier"] and row["right_then"]],
        "earlier": earlier(rows),
        "others": {kind: [row for row in rows if row["kind"] == kind] for kind in kinds},
        "everyday": everyday,
        "capability": [f"{one['measure']}: {capability.told(one)}" for one in metrics.get("capability") or ()],
    }
    return found | {"headline": headline(found, metrics)}


def asked(predictions: pd.DataFrame, rule: str) -> Rows:
    """Every question of the last round with the answers before and now, in the order of the table.

    A row has edit, kind, question, answer, now, right, exact (now, by the rule `exact`), before and right_before (of
    the base model; None if it was not asked), then and right_then (after the fact's own round; None if unknown),
    earlier (the fact is of an earlier round) and outcome.
    """
    new, _ = RULES[rule]
    rows = predictions[predictions.draw == 0]
    rows = rows.assign(right=rows[new].eq(True), now=rows.output.fillna(""))
    edited = rows[rows.method != BASE]

    def named(part: pd.DataFrame, name: str) -> pd.DataFrame:
        part = part.drop_duplicates(_QUESTION)[[*_QUESTION, "now", "right"]]
        return part.rename(columns={"now": name, "right": f"right_{name}"})

    last = edited[edited.trained == edited.trained.max()]
    last = last.merge(named(rows[rows.method == BASE], "before"), on=_QUESTION, how="left")
    last = last.merge(named(edited[edited.trained == edited.learnt], "then"), on=_QUESTION, how="left")
    last = last.assign(earlier=last.learnt < last.trained, question=last.prompt, exact=last.exact_new.eq(True))
    columns = ["edit", "kind", "question", "answer", "now", "right", "exact", "earlier"]
    columns += ["before", "right_before", "then", "right_then"]
    plain = last[columns].astype(object).where(last[columns].notna(), None)
    found: Rows = plain.to_dict("records")  # type: ignore[assignment]
    return [row | {"outcome": outcome(row)} for row in found]


def outcome(row: dict[str, Any]) -> str:
    """What happened to an answer: "kept", "lost", "won" (right before or now), or if it is wrong before and now "same"
    or "changed".
    """
    if row["right"]:
        return "kept" if row["right_before"] else "won"
    if row["right_before"]:
        return "lost"
    return "same" if row["now"] == row["before"] else "changed"


def facts(asked: Rows) -> Rows:
    """One row for each fact that the last update taught, from the rows of `asked`: {edit, prompt, answer, took, exact,
    right, wordings, before, says}. `right` of `wordings`: other wordings answered right.
    """
    own: dict[str, Rows] = {}
    for row in asked:
        if not row["earlier"] and row["kind"] in _OF_THE_FACT:
            own.setdefault(row["edit"], []).append(row)
    found = []
    for edit, rows in own.items():
        others = [row for row in rows if row["kind"] == "paraphrase"]
        fact = next((row for row in rows if row["kind"] == "edit"), None)
        if fact is None:  # --evaluation.probes leaves the taught questions out
            continue
        found.append(
            {
                "edit": edit,
                "prompt": fact["question"],
                "answer": fact["answer"],
                "took": bool(fact["right"]),
                "exact": bool(fact["exact"]),
                "right": sum(row["right"] for row in others),
                "wordings": len(others),
                "before": fact["before"],
                "says": fact["now"],
            }
        )
    return found


def earlier(asked: Rows) -> Rows:
    """One row for each fact of an earlier update that still holds, from the rows of `asked`: {edit, prompt, answer,
    before, then, now, right_then, right_now, outcome, wordings, wordings_then, wordings_now}.

    `then` is the answer right after the update that taught the fact. The last two count other wordings answered right.
    `outcome`: "kept", "lost", "won" or "wrong" (then and now); of a fact without a known `then` "kept" or "wrong".
    """
    rows = [row for row in asked if row["earlier"]]
    others: dict[str, Rows] = {}
    for row in rows:
        if row["kind"] == "paraphrase":
            others.setdefault(row["edit"], []).append(row)
    found = []
    for row in rows:
        if row["kind"] != "edit":
            continue
        then, now = row["right_then"], row["right"]
        change = ("kept" if then or then is None else "won") if now else "lost" if then else "wrong"
        wordings = others.get(row["edit"], [])
        found.append(
            {
                "edit": row["edit"],
                "prompt": row["question"],
                "answer": row["answer"],
                "before": row["before"],
                "then": row["then"],
                "now": row["now"],
                "right_then": then,
                "right_now": bool(now),
                "outcome": change,
                "wordings": len(wordings),
                "wordings_then": sum(bool(other["right_then"]) for other in wordings),
                "wordings_now": sum(other["right"] for other in wordings),
            }
        )
    return found


def headline(found: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The update in one sentence. `found`: the rows of `update`."""
    return ", ".join(_parts(found, metrics)) + "."


def _parts(found: dict[str, Any], metrics: dict[str, Any]) -> Iterator[str]:
    if taught := found["facts"]:
        exact = sum(fact["exact"] for fact in taught)
        took = sum(fact["took"] for fact in taught)
        words = "" if metrics["rule"] == "exact" or exact == took else f" ({exact} word for word)"
        yield f"{took} of {len(taught)} facts took{words}"
        if wordings := sum(fact["wordings"] for fact in taught):
            yield f"{wordings - sum(fact['right'] for fact in taught)} of {wordings} other wordings failed"
    if counts := metrics["forgotten"].get(metrics["rows"][-1]["method"]):
        right, lost = (counts["taught"][name] + counts["other"][name] for name in ("right", "lost"))
        if right:
            yield f"{lost} of {right} earlier answers lost"
    elif held := found["earlier"]:
        yield f"{sum(fact['right_now'] for fact in held)} of {len(held)} earlier facts are answered right"
    neighbors = [row for row in found["others"].get("neighbor", ()) if row["right_before"]]
    if neighbors:
        yield f"{sum(not row['right'] for row in neighbors)} of {len(neighbors)} neighbor answers lost"
    for kind, name in _SHALLOW.items():
        if rows := found["others"].get(kind):
            yield f"{name} right in {sum(row['right'] for row in rows)} of {len(rows)}"
    if everyday := found["everyday"]:
        lost, won = (sum(row["outcome"] == name for row in everyday) for name in ("lost", "won"))
        yield f"{lost} everyday answer{'s' * (lost != 1)} lost, {won} won"


def told_forgotten(metrics: dict[str, Any]) -> Iterator[str]:
    """One sentence on forgetting, with its counts, for the console and the page of an update."""
    row = metrics["rows"][-1]
    counts = metrics["forgotten"].get(row["method"])
    if counts is None or row["metrics"]["forgetting"]["value"] is None:
        return
    taught, other, entry = counts["taught"], counts["other"], row["metrics"]["forgetting"]
    right, lost = (taught[name] + other[name] for name in ("right", "lost"))
    yield (
        f"Earlier facts: {lost} of {right} answers that were right when they were learnt are wrong now "
        f"({100 * entry['value']:.0f} %): {taught['lost']} of {taught['right']} to questions as taught, "
        f"{other['lost']} of {other['right']} to other wordings ({counts['facts']} facts)."
    )
    if sample := metrics.get("recheck"):
        yield (
            f"Of {sample['of']:,} earlier facts a random sample of {sample['asked']:,} was asked. Forgetting over all "
            f"of them is {100 * entry['low']:.1f} to {100 * entry['high']:.1f} % (95 % interval of the sample)."
        )
