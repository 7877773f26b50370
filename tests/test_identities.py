"""The identities of the steps of every scenario, against `identities.json`; and the model that they depend on.

A change that gives an existing configuration another identity makes every store forget its results. If results really
change, raise the `version` of the `Kind`, and write the file again: `python tests/test_identities.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
from code_files import task, update, write_lines
from safetensors.numpy import save_file

from corsa.config import EvaluationConfig, LoraConfig, ModelConfig, StepConfig, TrainingConfig
from corsa.data.benchmarks import Source
from corsa.data.edit import Edit, to_table
from corsa.editing.history import FILE, WEIGHTS, History, Line, Update
from corsa.editing.options import EditOptions, EvaluateOptions, UndoOptions
from corsa.editing.plan import plan_edit, plan_evaluation, plan_undo
from corsa.experiments.code.base import CodeExperiment
from corsa.experiments.planner import Planner
from corsa.experiments.runner import Branches
from corsa.flow import Step, Store, Task
from corsa.flow.step import topological
from corsa.models import registry
from corsa.tuning.sweep import planner_of

ROOT = Path(__file__).parents[1]
KNOWN = Path(__file__).with_name("identities.json")
MODEL = ModelConfig(name="random:tiny-llama")
COMMON: dict[str, Any] = {"model": MODEL, "limit": 4}
LARGER: dict[str, Any] = {
    "model": ModelConfig(name="random:tiny-qwen3", dtype="bfloat16", template="chat"),
    "seeds": (0, 1),
    "offset": 2,
    "on_bad_record": "skip",
    "on_contradiction": "keep-first",
    "lora": LoraConfig(rank=8, alpha=16, targets=("q_proj",), layers=(0,)),
    "corsa": StepConfig.model_validate({"lambda": 0.5, "perturb_every": 2, "pcgrad": "authors"}),
    "training": TrainingConfig(epochs=2, batch=4, answer_end="turn"),
    "evaluation": EvaluationConfig(protocol="paper", match="exact"),
}
"""Settings that differ from their defaults."""


def planned(scenario: Callable[..., Step | Branches], experiment: Any, *more: Any) -> Step | Branches:
    return scenario(Planner.of(experiment, "command"), *more)


def scenarios() -> Iterator[tuple[str, Step | Branches]]:
    """Every scenario, with the options that make other steps. Files are in the current directory."""
    single, paper, code, sizes, tune = map(import_module, ("single_update", "paper", "code_update", "scaling", "sweep"))
    small = {"temporal": "world_facts", "rounds": 2, "parts": 2, "fractions": (0.5, 1.0), "development": 3}
    other = {"then": "file", "then_data": "facts.jsonl"}
    yield "paper", planned(paper.paper, paper.Paper(**COMMON, **small, **other))
    methods = ("lora", "memit", "f-learning", "corsa-published", "corsa-no-sam", "corsa-no-pcgrad")
    larger = single.SingleUpdate(**LARGER, methods=methods, mmlu="mmlu", mmlu_limit=1)
    yield "single update, other settings", planned(single.single_update, larger)
    programs = {"data": "arena.jsonl", "humaneval": "humaneval.jsonl", "allow_code_execution": True}
    yield "code update", planned(code.code_update, CodeExperiment(model=MODEL, **programs))
    yield "scaling", planned(sizes.scaling, sizes.Scaling(**COMMON, models=("random:tiny-llama", "random:tiny-qwen3")))
    search = tune.Sweep(**COMMON, confirm=1, development=3, rounds=2, objectives=("generality", "forgetting"))
    yield "sweep", planned(tune.sweep, search)
    yield "confirmation", planned(tune.confirmation, search, {"rho": 0.1})
    edit = {"edits": "facts.jsonl", "model": MODEL.name, "out": "new"}
    yield "edit", plan_edit(EditOptions.model_validate(edit)).report
    more = {"edits": "more.jsonl", "adapter": "line", "method": "f-learning", "out": "new"}
    yield "edit of a line", plan_edit(EditOptions.model_validate(more)).report
    yield "undo", plan_undo(UndoOptions(adapter="line", edit=("facts/0",), out="new")).report
    yield "evaluate a line", plan_evaluation(EvaluateOptions(adapter="line"))[1]
    yield "evaluate a file", plan_evaluation(EvaluateOptions(edits="facts.jsonl", adapter="line"))[1]
    yield "evaluate a benchmark", plan_evaluation(EvaluateOptions(benchmark="world_facts", model=MODEL.name))[1]


def files() -> None:
    """Writes what the scenarios read into the current directory."""
    facts = [{"prompt": f"Who leads {n}?", "target_new": "Ada", "target_old": "Bo"} for n in ("Acme", "Umbrella")]
    write_lines(Path("facts.jsonl"), facts)
    write_lines(Path("more.jsonl"), [{"prompt": "Where is Acme?", "target_new": "Rome"}])
    write_lines(Path("arena.jsonl"), [update("sin", 2), update("cos", 2)])
    write_lines(Path("humaneval.jsonl"), [task(0), task(1)])
    for part in ("test", "dev"):
        Path("mmlu", part).mkdir(parents=True)
        Path("mmlu", part, f"anatomy_{part}.csv").write_text("What?,one,two,three,four,A\n")
    Path("line").mkdir()
    save_file({"lora_A.weight": np.ones((4, 8), np.float32)}, Path("line", WEIGHTS))
    settings = {"base_model_name_or_path": MODEL.name, "r": 4, "lora_alpha": 8}
    Path("line", "adapter_config.json").write_text(json.dumps(settings))
    edit = Edit.build(id="1/facts/0", prompt="Who leads Acme?", target_new="Ada", target_old="Bo")
    pq.write_table(to_table([edit]), "line/edits.parquet")
    Path("line", "predictions.parquet").touch()
    known: dict[str, Any] = {"kind": "edit", "facts": 1, "method": "corsa", "created": "", "directory": "line"}
    history = History(model=MODEL, updates=(Update(number=1, fingerprint="f", sha256="0", **known),))
    Path("line", FILE).write_text(history.model_dump_json())


def identities() -> dict[str, dict[str, str]]:
    """{scenario: {step: its identity}}. What data files hold, and how this pyarrow writes them, is left out."""
    found = {}
    with (
        TemporaryDirectory() as folder,
        chdir(folder),
        patch.object(Source, "digest", lambda self: f"content of {self.prefix}"),
        patch.object(Line, "digest", lambda self: "content of the line"),
        patch.object(sys, "path", [str(ROOT / "pipelines"), str(ROOT / "tune"), *sys.path]),
    ):
        files()
        for name, made in scenarios():
            found[name] = {step.name: step.fingerprint[:16] for step in steps_of(made)}
    return found


def test_no_step_has_another_identity_than_before() -> None:
    assert identities() == json.loads(KNOWN.read_text())


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories that are hashed as models, in a current directory with the scenarios' files and one model."""
    monkeypatch.chdir(tmp_path)
    for folder in ("pipelines", "tune"):
        monkeypatch.syspath_prepend(ROOT / folder)
    files()
    Path("model").mkdir()
    Path("model", "config.json").write_text("{}")
    found: list[Path] = []
    digest = registry._digest

    def counted(directory: Path) -> str:
        found.append(directory)
        return digest(directory)

    monkeypatch.setattr(registry, "_digest", counted)
    return found


def steps_of(made: Step | Branches) -> list[Step]:
    return topological([made.join(made.reports, {}) if isinstance(made, Branches) else made])


@pytest.mark.parametrize("name", ["paper", "single_update", "code_update", "scaling", "sweep"])
def test_planning_a_scenario_hashes_its_model_once(hashed: list[Path], name: str) -> None:
    module = import_module(name)
    kinds = {"paper": "Paper", "single_update": "SingleUpdate", "scaling": "Scaling", "sweep": "Sweep"}
    settings: dict[str, Any] = {"model": ModelConfig(name="model")}
    if name == "paper":
        settings |= {"then": "world_facts"}
    if name == "scaling":
        settings = {"models": ("model",), "benchmarks": ("file", "atoke"), "files": ("facts.jsonl",) * 2}
    if name == "code_update":
        experiment: Any = CodeExperiment(**settings, data="arena.jsonl", allow_code_execution=True)
    else:
        experiment = getattr(module, kinds[name]).model_validate(settings)
    found = steps_of(planned(getattr(module, name), experiment))
    assert hashed == [Path("model").absolute()]
    models = [value for step in found for _, value in step.config if isinstance(value, ModelConfig)]
    assert models
    assert all(m == registry.pin(ModelConfig(name="model")) for m in models), "every step depends on the resolved model"


def test_planning_an_update_hashes_its_model_once(hashed: list[Path]) -> None:
    plan_edit(EditOptions(edits="more.jsonl", model="model", out="new"))
    assert hashed == [Path("model").absolute()]
    plan_evaluation(EvaluateOptions(edits="facts.jsonl", model="model"))
    assert hashed == [Path("model").absolute()] * 2


def test_trials_of_a_sweep_have_the_model_of_its_reference_column(hashed: list[Path]) -> None:
    """A sweep that runs later does not hash the model again: its trials use the weights that it was planned with."""
    tune = import_module("sweep")
    sweep = planned(tune.sweep, tune.Sweep(model=ModelConfig(name="model"), limit=4))
    assert isinstance(sweep, Step)
    hashed.clear()
    planner = planner_of(Task(sweep, Store("runs")))
    reference = sweep.inputs["reference"].config
    assert planner.model == reference.model  # type: ignore[attr-defined]
    assert planner.experiment.model == ModelConfig(name="model")
    assert hashed == []


if __name__ == "__main__":
    KNOWN.write_text(json.dumps(identities(), indent=1) + "\n")
