"""The metrics: what each one counts.

A fact is *standing* after round r if it was learnt in an earlier round and not revised since. A chain is
asked through its latest edit, so these are the rows with learnt < trained. Where the data has an evaluation set
(facts taught once, never revised: the temporal scenario), the standing facts are those of the evaluation set.

An old answer was *displaced* if the model gave it and an edit replaced it. In a table with revised facts (chains),
these are the revised facts whose former answer was learnt in its own round; they count from the round that revises
them. In a table without revised facts, these are the facts of an earlier round whose new answer was learnt then.

The metrics on *wordings* use the paraphrases. A benchmark without any paraphrase falls back to its edit prompts; the
result names these benchmarks in `fallback`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from corsa.config.evaluation import ProbeKind

Counts = tuple[np.ndarray, "np.ndarray | int", "np.ndarray | int"]


class Columns:
    """The columns of a table as arrays, each converted once: on a pandas column, every operation takes far longer."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self._rows = rows

    def __getattr__(self, name: str) -> np.ndarray:
        column = self._rows[name].to_numpy()
        setattr(self, name, column)
        return column


@dataclass(frozen=True)
class Metric:
    """One metric. `count` maps rows to (which rows count, numerator, denominator); the value is sum / sum."""

    label: str
    text: str
    better: Literal["high", "low"]
    unit: Literal["share", "change", "points", "nats"]
    count: Callable[[Columns], Counts]
    of: ProbeKind | Literal["wordings", "latest", "standing", "displaced"] = "wordings"
    matched: bool = True


def _of_probes(kind: ProbeKind, label: str, text: str) -> Metric:
    return Metric(label, text, "high", "share", lambda rows: (rows.kind == kind, rows.right, 1), of=kind)


METRICS: dict[str, Metric] = {
    "edit_success": Metric(
        "Edit success",
        "edit prompts answered with the new answer, over all facts still valid",
        "high",
        "share",
        lambda rows: (rows.kind == "edit", rows.right, 1),
        of="edit",
    ),
    "generality": Metric(
        "Generality",
        "paraphrases answered with the new answer, over all facts still valid",
        "high",
        "share",
        lambda rows: (rows.kind == "paraphrase", rows.right, 1),
        of="paraphrase",
    ),
    "efficacy": Metric(
        "Update efficacy",
        "wordings of the latest round's facts answered with the new answer",
        "high",
        "share",
        lambda rows: (rows.wordings & (rows.learnt == rows.trained), rows.right, 1),
        of="latest",
    ),
    "forgetting": Metric(
        "Forgetting",
        "of the wordings of standing facts answered right when they were learnt, the share that is wrong now",
        "low",
        "share",
        lambda rows: (rows.standing, rows.then & ~rows.right, rows.then),
        of="standing",
    ),
    "forgetting_relative": Metric(
        "Forgetting, net relative drop",
        "(right when learnt - right now) / right when learnt, on standing facts; later gains offset losses",
        "low",
        "change",
        lambda rows: (rows.standing, rows.then.astype(float) - rows.right, rows.then),
        of="standing",
    ),
    "forgetting_points": Metric(
        "Forgetting, drop in points",
        "share right when learnt minus share right now, on standing facts",
        "low",
        "points",
        lambda rows: (rows.standing, rows.then.astype(float) - rows.right, 1),
        of="standing",
    ),
    "retention": Metric(
        "Old knowledge retained",
        "wordings of all facts still valid that are answered with the old answer",
        "low",
        "share",
        lambda rows: (rows.wordings, rows.old, 1),
    ),
    "activation": Metric(
        "Old knowledge activated",
        "wordings of facts whose old answer was displaced that give this old answer again",
        "low",
        "share",
        lambda rows: (rows.displaced, rows.old, 1),
        of="displaced",
    ),
    "activation_of_right": Metric(
        "Old knowledge activated, of those once right",
        "the same over the wordings answered right, after its own round, by the former answer of a revised fact, or by "
        "the new answer of one taught once",
        "low",
        "share",
        lambda rows: (rows.displaced, rows.once & rows.old, rows.once),
        of="displaced",
    ),
    "multihop": Metric(
        "Multi-hop",
        "cases of which any wording of the multi-hop question is answered with the new answer",
        "high",
        "share",
        lambda rows: ((rows.kind == "multihop") & rows.leads, rows.any_right, 1),
        of="multihop",
    ),
    "neighborhood": Metric(
        "Neighborhood",
        "questions about neighbouring facts answered with their true answer",
        "high",
        "share",
        lambda rows: (rows.kind == "neighbor", rows.right, 1),
        of="neighbor",
    ),
    "agreement": Metric(
        "Neighborhood, agreement with base",
        "questions about neighbouring facts to which the base model gives an answer, answered the same (normalised)",
        "high",
        "share",
        lambda rows: ((rows.kind == "neighbor") & rows.compared, rows.agrees, 1),
        of="neighbor",
        matched=False,
    ),
    "reversal": _of_probes("reversal", "Reversal", "questions turned round that are answered with the subject"),
    "negation": _of_probes(
        "negation", "Negation", "yes-or-no questions about the old and the new answer answered right"
    ),
    "choice": _of_probes(
        "choice", "Choice", "questions with other answers to choose from, answered with the new one alone"
    ),
    "template": _of_probes(
        "template", "Other template", "edit prompts answered with the new answer in the other template"
    ),
    "margin": Metric(
        "Margin",
        "mean of log p(new answer) - log p(old answer) in nats, over the scored wordings of facts still valid",
        "high",
        "nats",
        lambda rows: (rows.wordings & rows.scored, rows.logp_new - rows.logp_old, 1),
        matched=False,
    ),
    "logp_new": Metric(
        "log p(new answer)",
        "its first term: mean log-probability of the new answer, in nats",
        "high",
        "nats",
        lambda rows: (rows.wordings & rows.scored, rows.logp_new, 1),
        matched=False,
    ),
    "logp_old": Metric(
        "log p(old answer)",
        "its second term: mean log-probability of the old answer, in nats",
        "low",
        "nats",
        lambda rows: (rows.wordings & rows.scored, rows.logp_old, 1),
        matched=False,
    ),
}
"""Every metric by name, in the order of a report."""
