"""The predictions table as the metrics read it: what was right, what is standing, what was right when it was learnt."""

from __future__ import annotations

import numpy as np
import pandas as pd

from corsa.errors import CorsaError, unknown_name
from corsa.evaluation.matching import normalise

BASE = "base"
"""The unedited model, as the column `method` names it."""

_RULES = {"contains": ("matched_new", "matched_old"), "exact": ("exact_new", "exact_old")}
_TEXT = ("method", "edit", "chain", "part", "kind")
_MATCHES = tuple(column for columns in _RULES.values() for column in columns)
_NEEDED = (*_TEXT, "seed", "trained", "learnt", "probe", "wording", "output", "logp_new", "logp_old", *_MATCHES)


def prepared(predictions: pd.DataFrame, rule: str, protocol: str) -> pd.DataFrame:
    """The rows that count under a protocol, with columns the metrics read.

    right, old (bool): the answer given, under the rule. item, chain_code (int): which wording of which probe, which
    fact. wordings, standing (bool): see `corsa.evaluation.metrics`. then (bool): right when it was learnt. compared,
    agrees (bool): the base model was asked the same, and said the same. any_right, leads (bool): some wording of the
    probe was answered right, and this is its first row (where a probe counts once). scored (bool): has
    log-probabilities. The base model's rows are repeated for every round, on exactly the facts the others are asked
    after it.

    Raises:
        CorsaError: no rows, missing columns, an unknown rule or protocol.
    """
    if rule not in _RULES:
        raise unknown_name("match rule", rule, _RULES)
    if protocol not in ("full", "paper"):
        raise unknown_name("protocol", protocol, ("full", "paper"))
    if missing := [column for column in _NEEDED if column not in predictions.columns]:
        raise CorsaError(f"the predictions table lacks the columns {', '.join(missing)}: is it one of this version?")
    if predictions.empty:
        raise CorsaError("the predictions table is empty: no model was asked anything, so there is nothing to measure")

    rows = predictions[list(_NEEDED)].copy()
    for column in _TEXT:
        rows[column] = rows[column].astype(str)
    if protocol == "paper":
        order = rows.probe.astype("int64") * (int(rows.wording.max()) + 1) + rows.wording
        first = order.groupby([rows.edit, rows.kind]).transform("min")
        rows = rows[(rows.kind != "paraphrase") | (order == first)]
    new, old = _RULES[rule]
    rows["right"] = rows[new].eq(True).astype(bool)  # a null match (no such answer) is no match
    rows["old"] = rows[old].eq(True).astype(bool)
    rows["item"] = rows.groupby(["edit", "kind", "probe", "wording"], sort=True).ngroup()
    rows["chain_code"] = rows.groupby("chain", sort=True).ngroup()
    for column in ("logp_new", "logp_old"):
        rows[column] = pd.to_numeric(rows[column]).astype(float)
    rows["scored"] = np.isfinite(rows.logp_new) & np.isfinite(rows.logp_old)

    probe = rows.groupby(["method", "seed", "trained", "edit", "probe"], sort=False)
    rows["any_right"] = probe.right.transform("any")
    rows["leads"] = probe.cumcount() == 0

    wordings = "paraphrase" if (rows.kind == "paraphrase").any() else "edit"
    rows["wordings"] = rows.kind == wordings

    rows["answered"] = rows.output.fillna("").map(normalise)
    base = rows[rows.method == BASE].drop_duplicates("item").set_index("item").answered
    rows["compared"] = rows.item.isin(base.index)
    rows["agrees"] = rows.compared & (rows.answered == rows.item.map(base))

    key = ["method", "seed", "item"]
    learnt = rows[rows.trained == rows.learnt].drop_duplicates(key)[[*key, "right"]].rename(columns={"right": "then"})
    rows = rows.merge(learnt, on=key, how="left")
    standing = rows.wordings & (rows.learnt < rows.trained) & rows.then.notna()
    if (rows.part == "evaluation").any():
        standing &= rows.part == "evaluation"
    rows["standing"] = standing & (rows.method != BASE)
    rows["then"] = rows.then.eq(True).astype(bool)
    # In a fixed order, so that sums do not depend, to the last bit, on that of the table.
    return _base_after_every_round(rows.sort_values(["seed", "item"], kind="stable"))


def _base_after_every_round(rows: pd.DataFrame) -> pd.DataFrame:
    """The base model never changes, so what it said once stands for every round."""
    base, edited = rows[rows.method == BASE], rows[rows.method != BASE]
    if base.empty:
        return rows
    if edited.empty:
        return base.assign(trained=base.learnt.max())
    copies = [
        base[base.item.isin(edited.item[edited.trained == number])].assign(trained=number)
        for number in sorted(edited.trained.unique())
    ]
    return pd.concat([*copies, edited], ignore_index=True)
