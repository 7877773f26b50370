"""The predictions table with the columns that the metrics read: right, standing, right when learnt, displaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import get_args

import numpy as np
import pandas as pd

from corsa.config.evaluation import Protocol
from corsa.errors import CorsaError, unknown_name
from corsa.evaluation.matching import normalise

BASE = "base"
"""The value of the column `method` for the unedited model."""
ROW_GROUP = 1 << 17
"""Rows of a row group of a predictions table on disk."""

RULES = {
    "words": ("words_new", "words_old"),
    "contains": ("matched_new", "matched_old"),
    "exact": ("exact_new", "exact_old"),
}
"""The columns of each rule: whether an output gives the new answer, and the old one."""
_TEXT = ("method", "edit", "chain", "part", "kind")
_MATCHES = tuple(column for columns in RULES.values() for column in columns)
_NUMBERS = ("seed", "trained", "learnt", "probe", "wording", "draw")
_NEEDED = (*_TEXT, *_NUMBERS, "output", "logp_new", "logp_old", *_MATCHES)
_OF_THE_FACT = ("edit", "paraphrase")


def check_columns(known: Iterable[str], source: str, remedy: str = "ask the model again") -> None:
    """Raises CorsaError if a predictions table lacks a needed column. `source` names the table in the message."""
    if missing := [column for column in _NEEDED if column not in {"method", *known}]:
        raise CorsaError(f"{source} lacks the columns {', '.join(missing)}: an earlier version wrote it; {remedy}")


@dataclass(frozen=True)
class Whole:
    """What the rows of a part depend on in the rest of a predictions table.

    paraphrased: the benchmarks that ask paraphrases. evaluation: some facts are in the evaluation set. revised: some
    facts are. edited: some method besides the base model was asked. learnt: the last round that teaches a fact.
    sampled: the base model was asked a sample, drawn for the last round.
    """

    paraphrased: frozenset[str]
    evaluation: bool
    revised: bool
    edited: bool
    learnt: int
    sampled: bool

    @classmethod
    def of(cls, predictions: pd.DataFrame) -> Whole:
        """Of all rows."""
        edited = predictions.method != BASE
        own = predictions[edited & (predictions.trained == predictions.learnt) & predictions.kind.isin(_OF_THE_FACT)]
        taught = own[["method", "seed", "chain", "learnt"]].drop_duplicates()
        asked = predictions[predictions.kind == "paraphrase"].drop_duplicates("edit")
        return cls(
            frozenset(_benchmark(asked).unique()) if len(asked) else frozenset(),
            bool((predictions.part == "evaluation").any()),
            bool(taught.duplicated(["method", "seed", "chain"]).any()),
            bool(edited.any()),
            int(predictions.learnt.max()),
            bool((_weight(predictions)[~edited] > 1).any()),
        )


def parts(predictions: pd.DataFrame, units: int) -> Iterator[pd.DataFrame]:
    """The rows in parts of so many units (facts, or cases), in the order of the units. A fact is in one part.

    Columns of categories are text in a part.
    """
    case = _case(predictions)
    if predictions.chain.nunique() != len(pd.DataFrame({"chain": predictions.chain, "case": case}).drop_duplicates()):
        units = len(predictions)  # a chain in several cases
    numbers = pd.factorize(case, sort=True)[0] // units
    order = np.argsort(numbers, kind="stable")
    texts = {name: "str" for name, kind in predictions.dtypes.items() if kind == "category"}
    for chosen in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
        yield predictions.iloc[chosen].astype(texts)


def prepared(
    predictions: pd.DataFrame, rule: str, protocol: str, *, taught_questions: bool = False, whole: Whole | None = None
) -> pd.DataFrame:
    """The rows that count under a protocol, with the columns that the metrics read.

    right, old (bool): the output gives the new or the old answer, under the rule. item (int): the wording of a probe;
    the draws of a wording share its item. case (text) and unit_code (int): the random unit of an interval, which is the
    optional column `case`, or the chain if that is blank. wordings, standing, displaced (bool): see
    `corsa.evaluation.metrics`. then (bool): right when it was learnt. once (bool), for displaced answers: the model
    gave the former answer after its own round (revised facts), or the new answer (facts taught once). compared (bool):
    the base model answered the same question. agrees (bool): this answer is the same as the base model's. any_right
    (bool): some wording of the probe was answered right. leads (bool): the first row of a probe (for metrics that count
    a probe once). scored (bool): has log-probabilities. weight (float): facts that the fact stands for. The rows of the
    base model are repeated for every round, for exactly the facts that the other methods are asked after that round.

    Args:
        predictions: the predictions table. The column `benchmark` groups facts to decide whether they have paraphrases;
            without it, the part of an edit's id before the first "/" is used.
        rule: a key of `RULES`.
        protocol: "full", "paper" or "authors"; the latter two count only the first paraphrase of an edit.
        taught_questions: standing and displaced also cover the questions as taught, not only other wordings.
        whole: of the table that these rows are a part of; by default these are all.

    Raises:
        CorsaError: no rows, missing columns, an unknown rule or protocol.
    """
    check(predictions, rule, protocol)
    whole = whole or Whole.of(predictions)
    rows = predictions[list(_NEEDED)].copy()
    for column in _TEXT:
        rows[column] = rows[column].astype(str)
    rows["benchmark"] = _benchmark(predictions)
    rows["case"] = _case(predictions)
    rows["weight"] = _weight(predictions)
    if protocol != "full":
        order = rows.probe.astype("int64") * (int(rows.wording.max()) + 1) + rows.wording
        first = order.groupby([rows.edit, rows.kind]).transform("min")
        rows = rows[(rows.kind != "paraphrase") | (order == first)]
    new, old = RULES[rule]
    rows["right"] = rows[new].eq(True).astype(bool)  # null (there is no such answer) counts as no match
    rows["old"] = rows[old].eq(True).astype(bool)
    rows["item"] = rows.groupby(["edit", "kind", "probe", "wording"], sort=True).ngroup()
    rows["unit_code"] = rows.groupby("case", sort=True).ngroup()
    for column in ("logp_new", "logp_old"):
        rows[column] = pd.to_numeric(rows[column]).astype(float)
    rows["scored"] = np.isfinite(rows.logp_new) & np.isfinite(rows.logp_old)

    probe = rows.groupby(["method", "seed", "trained", "edit", "probe", "draw"], sort=False)
    rows["any_right"] = probe.right.transform("any")
    rows["leads"] = probe.cumcount() == 0

    paraphrase = rows.kind == "paraphrase"
    paraphrased = rows.benchmark.isin(whole.paraphrased)
    rows["wordings"] = paraphrase | ((rows.kind == "edit") & ~paraphrased)
    asked = rows.kind.isin(_OF_THE_FACT) if taught_questions else rows.wordings

    rows["answered"] = rows.output.fillna("").map(normalise)
    base = rows[rows.method == BASE].drop_duplicates("item").set_index("item").answered
    rows["compared"] = rows.item.isin(base.index[base != ""])  # two empty answers do not agree on anything
    rows["agrees"] = rows.compared & (rows.answered == rows.item.map(base))

    key = ["method", "seed", "item", "draw"]
    learnt = rows[rows.trained == rows.learnt].drop_duplicates(key)[[*key, "right"]].rename(columns={"right": "then"})
    rows = rows.assign(asked=asked).merge(learnt, on=key, how="left")
    standing = rows.asked & (rows.learnt < rows.trained) & rows.then.notna()
    if whole.evaluation:
        standing &= rows.part == "evaluation"
    rows["standing"] = standing & (rows.method != BASE)
    rows["then"] = rows.then.eq(True).astype(bool)
    rows = _with_displaced(rows, whole.revised)
    # A fixed order, so that sums are bit for bit independent of the order of the table.
    return _base_after_every_round(rows.sort_values(["seed", "item", "draw"], kind="stable"), whole)


def check(predictions: pd.DataFrame, rule: str, protocol: str) -> None:
    """Raises CorsaError for a table or a way of counting that `prepared` refuses."""
    if rule not in RULES:
        raise unknown_name("match rule", rule, RULES)
    if protocol not in get_args(Protocol):
        raise unknown_name("protocol", protocol, get_args(Protocol))
    if "method" not in predictions.columns:
        raise CorsaError("the predictions table lacks the column method: it says whose answers these are")
    check_columns(predictions.columns, "the predictions table")
    if predictions.empty:
        raise CorsaError("the predictions table is empty: no model was asked anything, so there is nothing to measure")


def _case(predictions: pd.DataFrame) -> pd.Series:
    """The unit of every row: its case, or its chain if that is blank."""
    chain = predictions.chain.astype(str)
    if "case" not in predictions.columns:
        return chain
    case = predictions["case"].astype(str).fillna("")
    return chain.where(case == "", case)


def _weight(predictions: pd.DataFrame) -> pd.Series:
    """How many facts the fact of each row stands for; 1 where a table does not say it."""
    if "weight" not in predictions.columns:
        return pd.Series(1.0, predictions.index)
    return predictions.weight.astype(float).fillna(1.0)


def _benchmark(predictions: pd.DataFrame) -> pd.Series:
    if "benchmark" in predictions.columns:
        return predictions.benchmark.astype(str)
    prefix = predictions.edit.astype(str).str.partition("/")
    return prefix[0].where(prefix[1] == "/", "")


def _with_displaced(rows: pd.DataFrame, revised: bool) -> pd.DataFrame:
    """Add the columns displaced and once.

    An old answer is displaced if the model gave it and an edit replaced it. A revised fact counts from the round that
    revises it, if its former answer was learnt in its own round (some question was answered right). In a table without
    revised facts, a fact counts after later rounds if its answer replaced the old one (some question gave the new
    answer and not the old one).
    """
    own = rows[(rows.method != BASE) & (rows.trained == rows.learnt) & rows.kind.isin(_OF_THE_FACT)]
    fact = ["method", "seed", "chain", "learnt"]
    took = own.assign(went=own.right & ~own.old).groupby(fact)[["right", "went"]].any().reset_index()
    before = took.groupby(fact[:3])
    took["former"], took["former_took"] = before.learnt.shift(), before.right.shift().eq(True)
    rows = rows.merge(took[[*fact, "went", "former", "former_took"]], on=fact, how="left")
    wording = [*fact, "kind", "probe", "wording", "draw"]
    former = own[[*wording, "right"]].drop_duplicates(wording)
    former = former.rename(columns={"learnt": "former", "right": "former_right"}).astype({"former": "float64"})
    rows = rows.astype({"former": "float64"})
    rows = rows.merge(former, on=["former" if name == "learnt" else name for name in wording], how="left")
    if revised:
        displaced, once = rows.former_took.eq(True), rows.former_right.eq(True)
    else:
        displaced, once = rows.went.eq(True) & (rows.learnt < rows.trained), rows.then
    rows["displaced"] = (displaced & rows.asked & (rows.method != BASE)).astype(bool)
    rows["once"] = once.astype(bool)
    return rows.drop(columns=["went", "former", "former_took", "former_right"])


def _base_after_every_round(rows: pd.DataFrame, whole: Whole) -> pd.DataFrame:
    """Repeat the answers of the base model for every round: the base model never changes. Of a sample only the last
    round has them: earlier rounds were asked other facts.
    """
    base, edited = rows[rows.method == BASE], rows[rows.method != BASE]
    if base.empty:
        return rows
    if not whole.edited:
        return base.assign(trained=whole.learnt)
    copies = [
        base[base.item.isin(edited.item[edited.trained == number])].assign(trained=number)
        for number in sorted(edited.trained.unique())[-1 if whole.sampled else 0 :]
    ]
    return pd.concat([*copies, edited], ignore_index=True)
