"""Example questions with every method's answer after every round, as in the paper's Tables 11 to 13."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from corsa.report.answers import gives


@dataclass(frozen=True)
class Answer:
    """One output and what it gives: "new", "old", "both" or "neither"."""

    output: str
    gives: str


@dataclass(frozen=True)
class Asked:
    """One fact after one round: the expected answer, the previous one, and each method's answer (base first)."""

    round: int
    expected: str
    old: str
    answers: dict[str, Answer]


@dataclass(frozen=True)
class Example:
    """One fact over all rounds, asked in one wording. `part`: "update" (revised) or "evaluation" (taught once)."""

    question: str
    part: str
    kind: str
    rounds: list[Asked]

    @property
    def revised(self) -> list[int]:
        """The rounds that taught it an answer; empty if there is only one."""
        first = {asked.expected: asked.round for asked in reversed(self.rounds)}
        return sorted(first.values()) if len(first) > 1 else []


def examples(predictions: pd.DataFrame, *, rule: str, kind: str, methods: list[str], limit: int = 8) -> list[Example]:
    """Up to `limit` facts, half from each part of the data. Facts on which the final answers differ come first.

    Args:
        predictions: the predictions table.
        rule: "words", "contains" or "exact", which classifies an answer.
        kind: the probe kind to show ("paraphrase", "edit", "multihop"); its first wording and first seed are used.
        methods: in display order.
    """
    rows = predictions[predictions.kind == kind].reset_index(drop=True)
    rows = rows[rows.draw == 0]
    rows = rows[rows.wording == rows.groupby("edit").wording.transform("min")]
    rows = rows[rows.seed == rows.groupby("method").seed.transform("min")]
    rows = rows.assign(gives=gives(rows, rule))
    base = rows[rows.method == "base"].drop_duplicates("edit").set_index("edit")
    edited = rows[rows.method != "base"]

    last = edited[edited.trained == edited.trained.max()]
    differs = last.groupby("chain").gives.nunique() > 1
    order = edited[["chain", "part"]].drop_duplicates("chain")
    order = order.assign(alike=~order.chain.map(differs).eq(True)).sort_values("alike", kind="stable")
    chosen = [
        chain for _, part in order.groupby("part") for chain in part.chain[: max(1, limit // order.part.nunique())]
    ]
    return [_example(edited[edited.chain == chain], base, methods) for chain in chosen[:limit]]


def _example(rows: pd.DataFrame, base: pd.DataFrame, methods: list[str]) -> Example:
    asked = []
    for number, after in rows.groupby("trained"):
        first = after.iloc[0]
        answers = {}
        if first.edit in base.index:
            answers["base"] = Answer(str(base.output[first.edit]), str(base.gives[first.edit]))
        for method in methods:
            for _, row in after[after.method == method].head(1).iterrows():
                answers[method] = Answer(str(row.output), str(row.gives))
        asked.append(Asked(int(str(number)), str(first.answer), str(first.target_old), answers))
    return Example(
        str(rows.prompt.iloc[int(rows.trained.argmax())]), str(rows.part.iloc[0]), str(rows.kind.iloc[0]), asked
    )
