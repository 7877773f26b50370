"""What the scenarios declare before a run: primary metrics, development splits, and MMLU for every seed."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corsa.config.code_steps import CodeReportConfig
from corsa.config.steps import EditsConfig, ReportConfig, Shown
from corsa.data.edit import Edit, to_table
from corsa.evaluation import mmlu, specificity
from corsa.evaluation.metrics import METRICS
from corsa.experiments.code.steps import RATES
from corsa.experiments.planner import Planner
from corsa.experiments.steps import _by_method, _cases, _told_once
from corsa.flow import Step
from corsa.flow.step import topological

PIPELINES = Path(__file__).parents[1] / "pipelines"
NAMES = sorted(path.stem for path in PIPELINES.glob("*.py") if path.stem != "paper")  # it combines the others


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """paper.py imports the scenarios as files in its own directory."""
    monkeypatch.syspath_prepend(str(PIPELINES))


@pytest.mark.parametrize("name", NAMES)
def test_every_scenario_names_few_primary_metrics(name: str) -> None:
    primary = import_module(name).PRIMARY
    assert len(primary) <= 2
    assert set(primary) <= (RATES if name == "code_update" else METRICS).keys()
    assert bool(primary) == (name != "sensitivity")  # a page that chooses values makes no claims


def reports(step: Step) -> dict[str, Step]:
    return {
        s.name.removeprefix("report/"): s
        for s in topological([step])
        if isinstance(s.config, ReportConfig | CodeReportConfig)
    }


def facts_of(step: Step) -> set[tuple[int, int | None]]:
    """(offset, limit) of the facts in a report."""
    return {(s.config.offset, s.config.limit) for s in topological([step]) if isinstance(s.config, EditsConfig)}


def test_a_report_carries_the_primary_metrics_of_its_scenario() -> None:
    paper = import_module("paper")
    scenarios = ("single", "ablation", "sensitivity", "temporal", "routing")
    found = reports(paper.paper(Planner.of(paper.Paper(scenarios=scenarios, limit=4), "command")))
    primary = {name: step.config.primary for name, step in found.items()}  # type: ignore[attr-defined]
    assert primary == {
        "single update": ("edit_success", "generality"),
        "ablation": ("generality",),
        "sensitivity": (),
        "continual": ("efficacy", "forgetting"),
        "routing": ("generality",),
    }


def test_values_are_chosen_on_facts_that_no_scenario_reports() -> None:
    paper, alone = import_module("paper"), import_module("sensitivity")
    experiment = alone.Sensitivity(offset=10, development=20, limit=5)
    assert facts_of(alone.sensitivity(Planner.of(experiment, "command"))) == {(10, 20)}
    asked = paper.Paper(scenarios=("single", "sensitivity", "temporal"), offset=10, development=20, limit=5)
    found = {name: facts_of(step) for name, step in reports(paper.paper(Planner.of(asked, "command"))).items()}
    assert found == {"single update": {(30, 5)}, "sensitivity": {(10, 20)}, "continual": {(30, 5)}}
    elsewhere = asked.model_copy(update={"temporal": "atoke", "temporal_data": str(PIPELINES / "paper.py")})
    found = {name: facts_of(step) for name, step in reports(paper.paper(Planner.of(elsewhere, "command"))).items()}
    assert found["continual"] == {(10, 5)}
    without = asked.model_copy(update={"scenarios": ("single",)})
    assert facts_of(paper.paper(Planner.of(without, "command"))) == {(10, 5)}


def test_every_seed_is_asked_mmlu(tmp_path: Path) -> None:
    for part in ("test", "dev"):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"anatomy_{part}.csv").write_text("What?,one,two,three,four,A\n")
    single = import_module("single_update")
    experiment = single.SingleUpdate(methods=("lora", "corsa"), seeds=(0, 3), mmlu=str(tmp_path), limit=2)
    config = single.single_update(Planner.of(experiment, "command")).config
    shown = [(one.method, one.seed) for one in config.specificity]
    assert shown == [("base", 0), ("lora", 0), ("lora", 3), ("corsa", 0), ("corsa", 3)]
    assert len({one.answers for one in config.specificity}) == 5


def test_mmlu_of_a_report_is_the_mean_over_seeds_beside_the_base(tmp_path: Path) -> None:
    right = {"base": [1, 1, 0, 0], "lora/0": [1, 0, 0, 0], "lora/1": [1, 1, 1, 0]}
    inputs: dict[str, Any] = {}
    for name, answers in right.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        rows = [
            {"subject": "anatomy", "index": i, "correct": bool(a), "shots_dropped": 0} for i, a in enumerate(answers)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "answers.parquet")
        inputs[name] = SimpleNamespace(local=folder.joinpath)
    shown = [Shown(answers=n, method=n.partition("/")[0], seed=int(n.partition("/")[2] or 0)) for n in right]
    task: Any = SimpleNamespace(inputs=inputs)
    found = _by_method(task, shown, mmlu.accuracy)
    assert found["lora"]["overall"]["value"] == pytest.approx(4 / 8)
    assert found["lora"]["overall"]["difference"]["value"] == pytest.approx(0.0)
    assert found["base"]["overall"]["difference"] is None
    json.dumps(found, allow_nan=False)


def test_every_seed_answers_the_everyday_questions() -> None:
    single = import_module("single_update")
    experiment = single.SingleUpdate(methods=("lora", "in-context"), seeds=(0, 3), everyday=True, limit=2)
    report = single.single_update(Planner.of(experiment, "command"))
    shown = [(one.method, one.seed) for one in report.config.everyday]
    assert shown == [("base", 0), ("lora", 0), ("lora", 3)]  # in-context changes nothing about other questions
    asked = [report.inputs[one.answers] for one in report.config.everyday]
    assert [sorted(step.inputs) for step in asked] == [[], ["adapter"], ["adapter"]]
    assert asked[2].inputs["adapter"].name == "world_facts/lora/seed3/round1"


def test_everyday_answers_are_right_or_as_before() -> None:
    """Four questions, two seeds: by hand, right are 2 and 1 of 4; as before or still right 3 and 1 of 4."""

    def rows(*answers: tuple[str, bool]) -> list[dict[str, Any]]:
        return [{"question": str(i), "output": output, "right": right} for i, (output, right) in enumerate(answers)]

    base = rows(("Paris", True), ("gold", True), ("seven", False), ("Nile", True))
    first = rows(("in Paris", True), ("tin", False), ("seven", False), ("Nile", True))
    second = rows(("Rome", False), ("tin", False), ("eight", True), ("Nile", True))
    found = specificity.everyday({0: first, 1: second}, base)
    assert found["right"]["value"] == pytest.approx((2 + 2) / 8)
    assert found["right"]["difference"]["value"] == pytest.approx(4 / 8 - 3 / 4)
    assert found["kept"]["value"] == pytest.approx((3 + 1) / 8)
    own = specificity.everyday({0: base})
    assert own["right"]["value"] == pytest.approx(3 / 4)
    assert own["kept"] is None
    json.dumps(found, allow_nan=False)


def test_what_several_steps_say_is_told_once() -> None:
    said = [("a/seed0/round2", "looked back"), ("a/seed0/round3", "stopped"), ("a/seed1/round2", "looked back")]
    assert _told_once(said) == ["a/seed0/round2 and 1 more: looked back.", "a/seed0/round3: stopped."]


def test_answers_know_the_case_of_their_edit(tmp_path: Path) -> None:
    edits = [
        Edit.build(id=f"m/7/{n}", case="m/7", prompt=f"Who leads {n}?", target_new="A", target_old="B") for n in (1, 2)
    ]
    pq.write_table(to_table(edits), tmp_path / "edits.parquet")
    step = SimpleNamespace(inputs={"edits/m": SimpleNamespace(kind=SimpleNamespace(name="edits"))})
    task: Any = SimpleNamespace(step=step, inputs={"edits/m": SimpleNamespace(local=tmp_path.joinpath)})
    cases = _cases(task)
    assert cases is not None
    assert [(row["edit"], row["case"]) for row in cases.to_pylist()] == [("m/7/1", "m/7"), ("m/7/2", "m/7")]
