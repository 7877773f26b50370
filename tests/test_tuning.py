"""The space of a sweep and its study, without a cluster: suggestions, stored trials, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import optuna
import pyarrow.parquet as pq
import pytest
import yaml
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from corsa.config.command_line import configure
from corsa.config.steps import EditsConfig, RoundConfig, RoundsConfig
from corsa.data.edit import Edit, Probe, to_table
from corsa.errors import CorsaError
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Planner
from corsa.flow import Store, Task
from corsa.flow.step import topological
from corsa.tuning import sweep as tuning
from corsa.tuning.space import Domain, Space, applied, default_setting, grid, label, with_default
from corsa.tuning.study import SweepStudy
from corsa.tuning.sweep import refuse_what_is_not_asked, rung_of
from corsa.tuning.trials import Trials
from tune.sweep import Sweep, confirmation, sweep

ROOT = Path(__file__).parents[1]


def domains(*, grid: bool = False, **space: str) -> dict[str, Domain]:
    found = Space.model_validate(space).domains(grid=grid)
    return with_default(found, default_setting(Experiment(), found))


def study(folder: Path, name: str = "s", *, sampler: Any = "tpe", seed: int = 0, **space: str) -> SweepStudy:
    found = domains(grid=sampler == "grid", **space)
    directions: Sequence[Literal["maximize", "minimize"]] = ["maximize"]
    return SweepStudy(
        Store(folder),
        name,
        domains=found,
        default=default_setting(Experiment(), found),
        directions=directions,
        sampler=sampler,
        seed=seed,
        made_with={"space": {n: d.text for n, d in found.items()}, "seed": seed},
    )


def ask(made: SweepStudy) -> tuple[int, dict[str, float]]:
    trial = made.ask()
    assert trial is not None
    return trial.number, made.setting(trial)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"rho": "0.5:0.1"}, "--space.rho 0.5:0.1: an empty range, 0.5 is not below 0.1"),
        ({"rho": "0:0.1"}, "a log scale starts above 0; 0|LOW:HIGH has 0 as well"),
        ({"beta": "0,0.1"}, "beta cannot be 0"),
        ({"rank": "2.5,4"}, "rank is a whole number"),
        ({"lambda": "much"}, "cannot be read"),
        ({"learning_rate": ","}, "holds no value"),
        ({"rho": "nan,1"}, "not finite"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_with_its_reason(space: dict[str, Any], message: str) -> None:
    with pytest.raises(CorsaError) as refused:
        domains(**space)
    assert message in str(refused.value)


def test_an_unknown_field_of_a_space_file_is_refused_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"roh": "0.1:1"}))
    with pytest.raises(CorsaError, match="did you mean 'rho'"):
        configure(Space(), ["--config", str(tmp_path / "space.yaml")], program="x", description="")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectives": ["generalty"]}, "unknown metric 'generalty'"),
        ({"objectives": ["forgetting"]}, "no trial would report forgetting: it needs a later round; add --rounds 2"),
        ({"objectives": ["agreement"]}, "no trial would report agreement"),
        ({"objectives": []}, "name one of --objectives"),
        ({"objectives": ["generality", "margin"], "stop": "asha"}, "--stop needs one objective"),
    ],
)
def test_a_metric_that_no_trial_reports_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CorsaError) as refused:
        Sweep.model_validate(change).checked()
    assert message in str(refused.value)


def test_a_metric_of_probes_that_the_edits_lack_is_refused() -> None:
    probes = (Probe(kind="edit", prompts=("Where?",), answer="here", aliases=()),)
    edit = Edit(id="a", chain="a", round=1, prompt="Where?", target_new="here", target_old="there", probes=probes)
    edits = to_table([edit])
    refuse_what_is_not_asked(["efficacy", "margin"], edits)
    with pytest.raises(CorsaError, match="no trial would report multihop: these edits have no multihop probes"):
        refuse_what_is_not_asked(["efficacy", "multihop"], edits)


def test_zero_stands_below_the_log_scale() -> None:
    rho = domains(rho="0|0.01:0.1")["rho"]
    assert [rho.value(v) for v in (rho.floor, 0.0099, 0.01, 0.05)] == [0.0, 0.0, 0.01, 0.05]
    assert rho.value(rho.drawn(0.0)) == 0.0


def test_a_setting_changes_what_it_names_and_nothing_else() -> None:
    changed = applied(Experiment(), {"lambda": 2.0, "rho": 0.0, "rank": 8, "epochs": 3})
    assert (changed.corsa.lambda_, changed.corsa.rho, changed.corsa.beta) == (2.0, 0.0, 0.1)
    assert (changed.lora.rank, changed.lora.alpha) == (8, 16.0)  # alpha in proportion: the same scale
    assert (changed.training.epochs, changed.training.learning_rate) == (3, 2e-4)
    assert label(Experiment(), {"rho": 0.05}) == "lambda=1.0,rho=0.05,beta=0.1"


def test_a_grid_begins_with_the_default_and_the_points_of_the_sensitivity_figure() -> None:
    found = domains(grid=True)
    default = default_setting(Experiment(), found)
    points = list(grid(found, default))
    assert points[0] == default
    changed = [sum(point[name] != default[name] for name in point) for point in points]
    assert changed[1:13] == [1] * 12
    assert changed == sorted(changed)
    assert len(points) == 125


def test_the_first_trials_are_the_default_and_its_control(tmp_path: Path) -> None:
    made = study(tmp_path)
    assert ask(made) == (0, {"lambda": 1.0, "rho": 0.05, "beta": 0.1})
    assert ask(made) == (1, {"lambda": 1.0, "rho": 0.0, "beta": 0.1})


@pytest.mark.parametrize(
    ("space", "default"),
    [
        ({"rho": "0.1:0.5"}, {"rho": 0.05}),  # below the range
        ({"rho": "0|0.1:0.5"}, {"rho": 0.05}),  # below the range, and not its 0
        ({"rho": "0.1:0.5"}, {"rho": 0.0}),  # not on its log scale
        ({"learning_rate": "1e-5:1e-3"}, {"learning_rate": 1.23456e-4}),  # with more digits than sampled values have
        ({"rank": "4:16"}, {"rank": 32}),
        ({"lambda": "2,4"}, {"lambda": 1.0}),
    ],
)
def test_the_default_is_tried_once_wherever_it_lies(
    tmp_path: Path, space: dict[str, str], default: dict[str, float]
) -> None:
    found = with_default(Space.model_validate(space).domains(grid=False), default)

    def opened() -> SweepStudy:
        how: dict[str, Any] = {"sampler": "tpe", "seed": 0, "made_with": {}, "directions": ["maximize"]}
        return SweepStudy(Store(tmp_path), "s", domains=found, default=default, **how)

    made = opened()
    settings = [ask(made)[1] for _ in range(3)] + [ask(opened())[1]]
    assert settings[0] == default
    assert default not in settings[1:]


def test_a_suggestion_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    """Optuna writes a trial and each of its values separately: a kill in between leaves a trial without values."""
    made = study(tmp_path)
    first = ask(made)
    made.study.ask({"lambda": optuna.distributions.FloatDistribution(0.1, 10, log=True)})
    again = study(tmp_path)
    assert [(t.number, again.setting(t)) for t in again.unfinished()] == [first]
    number, setting = ask(again)
    assert (number, setting) == (2, {"lambda": 1.0, "rho": 0.0, "beta": 0.1})
    assert again.study.trials[1].state is TrialState.FAIL


def trial(seconds: float, training: float) -> optuna.trial.FrozenTrial:
    attrs = {"seconds": seconds, "training_s": training, "evaluation_s": 2.0}
    return optuna.trial.create_trial(state=TrialState.COMPLETE, value=0.5, user_attrs=attrs)


def test_a_rung_is_as_long_as_a_start_is_worth() -> None:
    config = SimpleNamespace(rung=None, rounds=RoundsConfig(rounds=1))
    experiment = Experiment.model_validate({"training": {"epochs": 10}})
    found, said = rung_of(cast(Any, config), experiment, [trial(24.0, 10.0)])
    assert (found, "a start takes 12.0 s, an epoch 1.00 s" in said) == (10, True)
    assert rung_of(cast(Any, config), experiment, [trial(16.0, 10.0)])[0] == 4
    # A trial found in the store takes no time: another trial gives the start time, or the default is used.
    assert rung_of(cast(Any, config), experiment, [trial(0.2, 10.0), trial(15.0, 10.0)])[0] == 3
    assert rung_of(cast(Any, config), experiment, [trial(0.2, 100.0)])[0] == 2
    assert rung_of(cast(Any, config), experiment, [])[0] == 1


def test_a_sweep_writes_its_best_setting_and_measures_a_start_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step without a cluster: each trial gets a value by its number, and the second fails."""
    searched: list[tuple[int, int | None]] = []

    def searching(study: SweepStudy, trials: Trials, *, most: int, **_: Any) -> None:
        searched.append((most, trials.rung))
        while len(study.trials) < most:
            number, setting = ask(study)
            study.note(number, label=trials.label(setting), setting=setting)
            if number == 1:
                study.tell(number, TrialState.FAIL, failed="out of memory", seconds=1.0)
                continue
            found = {"generality": {"value": 0.5 + 0.1 * number, "low": 0.4, "high": 1.0, "seeds": {"values": {}}}}
            times = {"seconds": 9.0, "training_s": 4.0, "evaluation_s": 1.0}
            study.tell(number, TrialState.COMPLETE, [0.5 + 0.1 * number], metrics=found, **times)

    monkeypatch.setattr(tuning, "search", searching)
    monkeypatch.setattr(tuning, "trials_at_once", lambda placement: (1, "1 at once"))
    tiny = {"model": "random:tiny-llama", "trials": 3, "development": 6, "stop": "asha", "training": {"epochs": 4}}
    step = sweep(Planner.of(Sweep.model_validate(tiny), "python tune/sweep.py"))
    store, edits = Store(tmp_path / "runs"), step.inputs["edits"]
    probe = Probe(kind="paraphrase", prompts=("Its head?",), answer="Bo")
    edit = Edit.build(id="a", prompt="Who leads A?", target_new="Bo", target_old="Al")
    table = to_table([edit.model_copy(update={"probes": (*edit.probes, probe)})])
    folder = store.workspace(edits)
    pq.write_table(table, folder / "edits.parquet")
    store.commit(edits, folder, {}, 0.0)
    task = Task(step, store)
    summary = tuning.run(task)
    assert searched == [(1, None), (3, 4)]  # a start takes 4 s, an epoch 1 s
    assert (summary["best"], summary["trials"], summary["done"], summary["failed"]) == (2, 3, 2, 1)
    assert summary["objectives"] == {"generality": pytest.approx(0.7)}
    assert summary == json.loads((task.output / "sweep.json").read_text())
    best = yaml.safe_load((task.output / "best.yaml").read_text())
    assert best["offset"] == 6
    assert {name: best["corsa"][name] for name in ("lambda", "rho", "beta")} == summary["setting"]
    assert best["model"] == {"name": "random:tiny-llama", "revision": None, "dtype": "float32", "template": "qa"}
    rows = pq.read_table(task.output / "trials.parquet").to_pylist()
    assert [(row["trial"], row["state"], row["cause"]) for row in rows] == [
        (0, "done", None),
        (1, "failed", "out of memory"),
        (2, "done", None),
    ]
    assert (task.output / "report.html").is_file()


def test_a_confirmation_asks_other_facts_of_both_settings() -> None:
    asked = Sweep.model_validate({"development": 6, "offset": 2, "confirm": 2})
    steps = list(topological([confirmation(Planner.of(asked, "again"), {"rho": 0.0})]))
    rounds = [step.config for step in steps if isinstance(step.config, RoundConfig)]
    assert sorted((r.seed, r.step.rho) for r in rounds) == [(0, 0.0), (0, 0.05), (1, 0.0), (1, 0.05)]
    (edits,) = (step.config for step in steps if isinstance(step.config, EditsConfig))
    assert (edits.offset, edits.limit) == (8, 6)


@pytest.mark.process
def test_a_sweep_that_cannot_be_confirmed_or_held_is_refused_before_it_starts(tmp_path: Path) -> None:
    facts = [{"prompt": f"Who leads {n}?", "target_new": "Ada", "target_old": "Grace"} for n in range(4)]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    common = [sys.executable, "tune/sweep.py", "--benchmark", "file", "--data", str(tmp_path / "facts.jsonl")]
    common += ["--storage", str(tmp_path / "runs"), "--objectives", "efficacy"]
    done = subprocess.run([*common, "--confirm", "2", "--development", "4"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert "nothing is left to confirm the best setting on" in said
    assert "has 4 facts, and all of them are passed over" in said
    large = ["--model", "random:qwen3-14b", "--placement.gpu", "--placement.gpu-memory", "1GiB", "--workers", "2"]
    done = subprocess.run([*common, *large], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "fits in no group of up to 2 workers" in " ".join(done.stderr.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_study_that_goes_on_keeps_its_trials_and_repeats_nothing(tmp_path: Path, sampler: str) -> None:
    made = study(tmp_path, sampler=sampler)
    settings = []
    for score in range(4):
        number, setting = ask(made)
        settings.append(setting)
        if number != 2:  # one is running when the sweep is killed
            made.tell(number, TrialState.COMPLETE, [float(score)], seconds=1.0)
    again = study(tmp_path, sampler=sampler)
    assert [again.setting(trial) for trial in again.trials] == settings
    assert [trial.number for trial in again.unfinished()] == [2]
    for _ in range(4):
        _, setting = ask(again)
        assert setting not in settings
        settings.append(setting)


def test_a_grid_ends_when_all_is_tried(tmp_path: Path) -> None:
    made = study(tmp_path, sampler="grid", rho="0,0.05")
    assert [ask(made)[1]["rho"] for _ in range(2)] == [0.05, 0.0]
    assert made.ask() is None


def test_a_study_of_another_space_is_refused_with_the_difference(tmp_path: Path) -> None:
    study(tmp_path, rho="0.01:0.1")
    with pytest.raises(CorsaError) as refused:
        study(tmp_path, rho="0.01:0.2")
    assert "space.rho: 0.01:0.1 then, 0.01:0.2 now" in str(refused.value)
    study(tmp_path, "other", rho="0.01:0.2")  # under another name it is accepted


def test_plain_optuna_reads_the_study(tmp_path: Path) -> None:
    made = study(tmp_path)
    number, setting = ask(made)
    made.report(number, 2, 0.25)
    made.note(number, label="a", setting=setting)
    made.tell(number, TrialState.COMPLETE, [0.5], seconds=2.0)
    number, _ = ask(made)
    made.tell(number, TrialState.FAIL, failed="a cause")
    backend = JournalFileBackend(str(tmp_path / "studies/s/journal.log"))
    read = optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend))
    first, second = read.trials
    assert (first.value, first.intermediate_values, first.user_attrs["label"]) == (0.5, {2: 0.25}, "a")
    assert first.params["rho"] == 0.05
    assert (second.state, second.user_attrs["failed"]) == (TrialState.FAIL, "a cause")
    assert read.best_trial.number == 0
