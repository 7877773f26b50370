"""The steps of `corsa edit --tune` that need no cluster: take a few facts, and choose a setting among trials.

Other wordings are never taught. Half of them and half of the everyday questions decide; the other halves show on
questions that no trial was judged by what the choice is worth.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from corsa.config.steps import ChoiceConfig, FewFactsConfig, Trial
from corsa.data.edit import from_table, to_table
from corsa.evaluation import sanity_questions
from corsa.evaluation.prepared_predictions import RULES
from corsa.flow.task import Task

Count = tuple[int, int]
"""Right answers, and questions."""

PARTS = {
    "wordings": "other wordings right",
    "everyday": "everyday answers as before or still right",
    "earlier": "questions about earlier facts right",
}
"""What a trial is judged by: the mean of these shares, as far as anything was asked."""


def take_few(task: Task) -> dict[str, Any]:
    """Step function: edits.parquet -> edits.parquet with a few facts of the update, and all earlier ones."""
    config: FewFactsConfig = task.config
    edits = from_table(pq.read_table(task.inputs["edits"].local("edits.parquet")))
    own = [edit for edit in edits if edit.round == config.update]
    few = [own[index * len(own) // config.facts] for index in range(min(config.facts, len(own)))]
    kept = [edit for edit in edits if edit.round != config.update] + few
    pq.write_table(to_table(kept), task.output / "edits.parquet")
    (task.output / "skipped.json").write_text("[]")
    return {"edits": len(few), "facts": len({edit.chain for edit in kept})}


def choose(task: Task) -> dict[str, Any]:
    """Step function: answers of trials -> choice.json: every trial with its counts, and the best.

    Of equal ones the earlier is the best, so the settings as given stay if nothing is better.
    """
    config: ChoiceConfig = task.config
    base = _table(task, config.everyday, "answers.parquet")
    trials = [_counted(task, config, trial, base) for trial in config.trials]
    best = max(range(len(trials)), key=lambda index: trials[index]["score"])
    found = {"trials": trials, "best": best, "setting": config.trials[best].setting}
    (task.output / "choice.json").write_text(json.dumps(found, indent=1))
    return {"best": best, "score": trials[best]["score"]}


def _counted(task: Task, config: ChoiceConfig, trial: Trial, base: list[dict[str, Any]]) -> dict[str, Any]:
    answers = pd.DataFrame(_table(task, trial.round, "predictions.parquet"))
    now = _table(task, trial.everyday, "answers.parquet")
    metrics = task.inputs[trial.round].metrics
    judged, rest = (
        {
            **counts(answers, half, rule=config.rule, update=config.update),
            "everyday": (sanity_questions.changes(base[half::2], now[half::2])["kept"], len(base[half::2])),
        }
        for half in (0, 1)
    )
    own = answers[(answers.learnt == config.update) & (answers.kind == "edit")]
    return {
        "setting": trial.setting,
        "steps": metrics.get("steps"),
        "took": (int(_right(own, config.rule).sum()), len(own)),
        "judged": judged,
        "rest": rest,
        "score": score(judged),
    }


def counts(answers: pd.DataFrame, half: int, *, rule: str, update: int) -> dict[str, Count]:
    """Right answers to the even (half 0) or odd (1) questions of each fact: new ones and earlier ones.

    Of a new fact only other wordings count, because the question itself is taught.
    """
    of_the_fact = answers[answers.kind.isin(("edit", "paraphrase"))].sort_values(["edit", "probe", "wording"])
    new = of_the_fact[(of_the_fact.learnt == update) & (of_the_fact.kind == "paraphrase")]
    earlier = of_the_fact[of_the_fact.learnt < update]
    found = {}
    for name, rows in (("wordings", new), ("earlier", earlier)):
        own = rows[rows.groupby("edit").cumcount() % 2 == half]
        found[name] = (int(_right(own, rule).sum()), len(own))
    return found


def score(judged: Mapping[str, Count]) -> float:
    """The mean of the shares of what was asked; 0 if nothing was."""
    shares = [right / asked for right, asked in judged.values() if asked]
    return sum(shares) / len(shares) if shares else 0.0


def _right(rows: pd.DataFrame, rule: str) -> pd.Series:
    return rows[RULES[rule][0]].eq(True)


def _table(task: Task, name: str, file: str) -> list[dict[str, Any]]:
    return pq.read_table(task.inputs[name].local(file)).to_pylist()


def told(found: Mapping[str, Any], taught: Count) -> list[str]:
    """The choice in sentences. `found`: choice.json. `taught`: facts that a trial taught, and those of the update."""
    trials: Sequence[Mapping[str, Any]] = found["trials"]
    given, best = trials[0], trials[found["best"]]
    few, of = taught
    among = f"among {len(trials)} trials on {'all' if few == of else f'{few} of the'} {of} facts"
    if best is given:
        return [
            f"None {among} was better than the settings as given: {_shares(given, 'judged')}. On questions by which no "
            f"trial was judged: {_shares(given, 'rest')}."
        ]
    changed = ", ".join(
        f"{name.replace('_', ' ')} {value:g} (given: {given['setting'][name]:g})"
        for name, value in best["setting"].items()
    )
    return [
        f"Settings chosen {among}: {changed}.",
        f"Questions that decided: {_shares(best, 'judged')}; with the settings as given {_shares(given, 'judged')}. "
        "The best of several trials is flattered by chance.",
        f"Questions by which no trial was judged: {_shares(best, 'rest')}; with the settings as given "
        f"{_shares(given, 'rest')}.",
    ]


def _shares(trial: Mapping[str, Any], half: str) -> str:
    return ", ".join(f"{right} of {of} {PARTS[name]}" for name, (right, of) in trial[half].items() if of) or "none"
