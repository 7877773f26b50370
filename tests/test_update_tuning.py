"""`corsa edit --tune`: which settings are tried on which facts, and how the best is chosen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from test_update_plan import ACME, adapter, drafts, facts_file, options

from corsa.config import TrainingConfig
from corsa.config.steps import ChoiceConfig, FewFactsConfig
from corsa.data.edit import from_table, to_table
from corsa.editing import tuning_steps
from corsa.editing.history import join
from corsa.editing.options import EditOptions
from corsa.editing.plan import Tuned, plan_edit
from corsa.editing.tuning import FEW, SEARCHED, Tuning, chosen, plan_tuning, settings, tune
from corsa.editing.tuning_steps import PARTS, counts, score, told
from corsa.errors import CorsaError
from corsa.evaluation.sanity_questions import sanity_questions
from corsa.flow import Step, Store
from corsa.flow.step import topological
from corsa.flow.task import Task
from corsa.report.facts import trials
from corsa.tuning.space import Domain

GIVEN: TrainingConfig = EditOptions.model_fields["training"].default


def rows(fact: str, learnt: int, **right: Sequence[bool]) -> list[dict[str, Any]]:
    """Answers to the questions of a fact, by kind."""
    return [
        {"edit": fact, "learnt": learnt, "kind": kind, "probe": probe, "wording": wording, "words_new": is_right}
        for probe, (kind, answers) in enumerate(right.items())
        for wording, is_right in enumerate(answers)
    ]


def config_of(tuning: Tuning) -> ChoiceConfig:
    assert isinstance(tuning.choice.config, ChoiceConfig)
    return tuning.choice.config


def test_half_of_the_other_wordings_of_each_fact_decide_and_the_question_as_taught_does_not() -> None:
    found = pd.DataFrame(
        [
            *rows("2/a", 2, edit=[True], paraphrase=[True, False, True]),
            *rows("2/b", 2, edit=[True], paraphrase=[False, True], neighbor=[True]),
            *rows("1/c", 1, edit=[False], paraphrase=[True, True]),
        ]
    )
    shuffled = found.sample(frac=1, random_state=0)
    for table in (found, shuffled):
        assert counts(table, 0, rule="words", update=2) == {"wordings": (2, 3), "earlier": (1, 2)}
        assert counts(table, 1, rule="words", update=2) == {"wordings": (1, 2), "earlier": (1, 1)}


def test_a_score_is_the_mean_of_the_shares_of_what_was_asked() -> None:
    assert score({"wordings": (3, 4), "everyday": (5, 20), "earlier": (0, 0)}) == pytest.approx((0.75 + 0.25) / 2)
    assert score({"wordings": (0, 0)}) == 0.0


def test_the_first_trial_has_the_settings_as_given_and_the_rest_are_spread_over_the_ranges() -> None:
    found = settings(GIVEN, 33, 0, new_adapter=True)
    assert found[0] == {"learning_rate": 5e-4, "ridge": 0.01, "stop_above": 0.5, "epochs": 15}
    assert found == settings(GIVEN, 33, 0, new_adapter=True) != settings(GIVEN, 33, 1, new_adapter=True)
    assert found[:9] == settings(GIVEN, 9, 0, new_adapter=True)  # with more trials, the earlier ones are the same
    for name, text in SEARCHED.items():
        domain, values = Domain.read(name, text), sorted(setting[name] for setting in found[1:])
        assert domain.low <= values[0] < values[-1] <= domain.high
        assert [value < domain.at(0.5) for value in values].count(True) in range(14, 19)  # half of 32, nearly
        TrainingConfig.model_validate({name: values[-1]})


def test_what_is_given_is_kept_and_a_line_keeps_its_ridge() -> None:
    own = GIVEN.model_copy(update={"learning_rate": 1e-4, "stop_above": None})
    assert set(settings(own, 2, 0, new_adapter=True)[1]) == {"ridge", "epochs"}
    assert set(settings(own, 2, 0, new_adapter=False)[1]) == {"epochs"}
    with pytest.raises(CorsaError, match="--tune has nothing to choose"):
        settings(own.model_copy(update={"epochs": 3}), 2, 0, new_adapter=False)


def test_a_value_at_a_share_of_a_range() -> None:
    assert [Domain.read("learning_rate", "0.001:0.1").at(share) for share in (0, 0.5, 1)] == [0.001, 0.01, 0.1]
    assert [Domain.read("stop_above", "0.5:0.9:linear").at(share) for share in (0, 0.5, 1)] == [0.5, 0.7, 0.9]
    assert [Domain.read("epochs", "1,2,3").at(share) for share in (0, 0.34, 0.99, 1)] == [1, 2, 3, 3]
    assert [Domain.read("epochs", "1:3:linear").at(share) for share in (0, 0.34, 0.99, 1)] == [1, 2, 3, 3]


def test_few_facts_are_all_taught_in_each_trial_and_the_chosen_trial_is_the_update(tmp_path: Path) -> None:
    own = options(tmp_path, tune=3)
    tuning = plan_tuning(own)
    tried = config_of(tuning).trials
    rounds = [tuning.choice.inputs[trial.round] for trial in tried]
    assert rounds[0].fingerprint == plan_edit(options(tmp_path)).round.fingerprint
    setting = tried[2].setting
    plan = plan_edit(own, Tuned(setting, ["Settings chosen."]))
    assert plan.round.fingerprint == rounds[2].fingerprint
    assert plan.experiment.training.learning_rate == setting["learning_rate"]
    config = plan.report.config.canonical()
    assert config["command"].endswith(f"--edits {own.edits} --tune 3")  # which chooses the same settings again
    assert config["notes"] == ["Settings chosen."]
    assert "notes" not in plan_edit(options(tmp_path)).report.config.canonical()
    assert str(tuning).startswith("--tune: 3 trainings of 1 facts each; the chosen one is the adapter")


def test_of_many_facts_a_few_are_taught_in_each_trial(tmp_path: Path) -> None:
    facts = [{"prompt": f"Who leads firm {n}?", "target_new": f"A{n}", "target_old": f"B{n}"} for n in range(40)]
    own = options(tmp_path, edits=str(facts_file(tmp_path, *facts, name="many.jsonl")), tune=2)
    tuning = plan_tuning(own)
    assert tuning.taught == (FEW, 40)
    assert "then one of all 40 with the chosen settings" in str(tuning)
    few = next(step for step in topological([tuning.choice]) if isinstance(step.config, FewFactsConfig))
    earlier = join([], drafts(tmp_path, {"prompt": "Who?", "target_new": "a", "target_old": "b"}), 1, {})
    edits = join(earlier, drafts(tmp_path, *facts), 2, {})
    store = Store(tmp_path / "runs")
    commit(store, few.inputs["edits"], edits=to_table([*earlier, *edits]))
    config = FewFactsConfig(facts=FEW, update=2)
    task = Task(Step(few.name, few.kind, config, few.inputs), store)
    assert tuning_steps.take_few(task)["edits"] == FEW
    kept = from_table(pq.read_table(task.output / "edits.parquet"))
    assert kept[:1] == earlier
    assert [edits.index(edit) for edit in kept[1:]] == [n * 40 // FEW for n in range(FEW)]


def commit(store: Store, step: Step, metrics: dict[str, Any] | None = None, **tables: pa.Table) -> None:
    output = store.workspace(step)
    for name, table in tables.items():
        pq.write_table(table, output / f"{name}.parquet")
    store.commit(step, output, metrics or {}, 0.0)


def test_the_best_trial_is_chosen_and_of_equal_ones_the_first(tmp_path: Path) -> None:
    own = options(tmp_path, tune=3, storage=str(tmp_path / "runs"))
    tuning, store = plan_tuning(own), Store(tmp_path / "runs")
    choice, config = tuning.choice, config_of(tuning)
    kept = {1: 30, 2: 40, 3: 40}  # everyday questions that are answered as before

    def everyday(unchanged: int) -> pa.Table:
        return pa.Table.from_pylist(
            [
                {"question": q.question, "answer": q.answer, "right": False, "output": "x" if n < unchanged else "y"}
                for n, q in enumerate(sanity_questions())
            ]
        )

    commit(store, choice.inputs[config.everyday], answers=everyday(40))
    for number, trial in enumerate(config.trials, start=1):
        answers = rows("1/facts/0", 1, edit=[True], paraphrase=[number > 1, True, number > 1])
        commit(store, choice.inputs[trial.round], {"steps": 7}, predictions=pa.Table.from_pylist(answers))
        commit(store, choice.inputs[trial.everyday], answers=everyday(kept[number]))
    assert chosen(tuning, store) is None
    task = Task(choice, store)
    found = json.loads(task.commit(tuning_steps.choose(task), 0.0).read("choice.json"))
    tuned = chosen(tuning, store)
    assert tuned is not None
    assert found["best"] == 1  # the second, which is as good as the third
    assert tuned.setting == config.trials[1].setting
    first, second = found["trials"][:2]
    assert first["judged"] == {"wordings": [0, 2], "earlier": [0, 0], "everyday": [15, 20]}
    assert first["rest"] == {"wordings": [1, 1], "earlier": [0, 0], "everyday": [15, 20]}
    assert (first["score"], second["score"], second["took"], second["steps"]) == (0.375, 1.0, [1, 1], 7)
    text = " ".join(tuned.told)
    assert f"learning rate {tuned.setting['learning_rate']:g} (given: 0.0005)" in text
    assert f"2 of 2 {PARTS['wordings']}, 20 of 20 {PARTS['everyday']}; with the settings as given 0 of 2" in text
    assert f"no trial was judged: 1 of 1 {PARTS['wordings']}, 20 of 20" in text
    console = Console(width=80)
    with console.capture() as capture:
        console.print(trials(found))
    lines = capture.get().splitlines()
    assert next(line for line in lines if "✓" in line).split()[-4:] == ["1/1", "2/2", "20/20", "1.00"]
    assert not any("…" in line for line in lines)


def test_settings_as_given_that_are_best_stay() -> None:
    trial = {"setting": {"epochs": 15}, "judged": {"wordings": (1, 2)}, "rest": {"wordings": (0, 0)}}
    (sentence,) = told({"trials": [trial, trial], "best": 0, "setting": {"epochs": 15}}, (5, 9))
    assert sentence == (
        f"None among 2 trials on 5 of the 9 facts was better than the settings as given: 1 of 2 {PARTS['wordings']}. "
        "On questions by which no trial was judged: none."
    )


def test_a_directory_with_another_adapter_is_refused_before_any_trial(tmp_path: Path) -> None:
    taken = adapter(tmp_path / "taken", *join([], drafts(tmp_path, {**ACME, "target_old": "x"}), 1, {}))
    with pytest.raises(CorsaError, match="holds the adapter of another update"):
        tune(options(tmp_path, tune=2, out=str(taken), storage=str(tmp_path / "runs")), Console(quiet=True))
    assert json.loads((taken / "line.json").read_text())["updates"]
