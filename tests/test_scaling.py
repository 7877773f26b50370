"""Scaling: the fit of the trend, the resources in each model's plan, and the refusal of models that cannot fit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from code_files import update, write_lines
from rich.console import Console

from corsa.config import LoraConfig, ModelConfig, Placement
from corsa.config.steps import RoundConfig
from corsa.errors import CorsaError
from corsa.experiments.base import Experiment
from corsa.experiments.code.base import CodeExperiment, code_report
from corsa.experiments.groups import placement_of
from corsa.experiments.planner import Planner
from corsa.experiments.scaling import fits
from corsa.flow.step import topological
from corsa.planning import plan as planning
from corsa.planning.preflight import refuse_what_memory_cannot_hold
from corsa.planning.rehearsal import Footprint
from corsa.report.sizes import page_of_sizes, sizes_table
from pipelines.scaling import Scaling, scaling


def point(parameters: int, method: str = "corsa", **measures: Any) -> dict[str, Any]:
    share = {"value": 0.5, "low": 0.4, "high": 0.6}
    point = {"model": f"m{parameters}", "benchmark": "b", "method": method, "parameters": parameters, "gpu": False}
    return point | {"generality": share, "forgetting": share, "training_s": 1.0, "worker_hours": 1.0} | measures


def growing(sizes: list[int]) -> list[dict[str, Any]]:
    """Generality gains 20 points for ten times the size, and memory grows as its square root."""
    shares = {10**7: 0.2, 10**8: 0.4, 10**9: 0.6}
    return [
        point(s, generality={"value": shares[s], "low": None, "high": None}, peak_memory=int(s**0.5)) for s in sizes
    ]


def test_a_trend_is_a_straight_line_against_the_logarithm_of_the_size() -> None:
    found = {fit["measure"]: fit for fit in fits(growing([10**7, 10**8, 10**9]))}
    assert found["generality"]["slope"] == pytest.approx(0.2)
    assert found["generality"]["intercept"] == pytest.approx(0.2 - 7 * 0.2)
    assert found["generality"]["r2"] == pytest.approx(1.0)
    assert found["peak_memory"]["slope"] == pytest.approx(0.5, abs=1e-3)
    assert found["training_s"]["slope"] == pytest.approx(0.0)


def test_two_sizes_have_no_trend_and_methods_are_fitted_apart() -> None:
    assert fits(growing([10**7, 10**8])) == []
    both = [*growing([10**7, 10**8, 10**9]), *(point(s, "lora", peak_memory=None) for s in (10**7, 10**8, 10**9))]
    assert {fit["method"] for fit in fits(both)} == {"corsa", "lora"}
    assert not any(fit["method"] == "lora" and fit["measure"] == "peak_memory" for fit in fits(both))


def test_what_is_missing_is_said_beside_what_is_there() -> None:
    points = growing([10**7, 10**8, 10**9])
    found = {"points": points, "fits": fits(points), "missing": {"big on b": "out of memory"}}
    page = page_of_sizes(found)
    assert len(page["rows"]) == 3
    assert [len(figure.plots) for figure in page["figures"]] == [5]
    assert any("+20.0 points for ten times the parameters" in sentence for sentence in page["trends"])
    console = Console(width=140, record=True, file=StringIO())
    console.print(sizes_table(found))
    assert "missing: big on b (out of memory)" in console.export_text()


def test_models_share_edits_but_no_worker_group() -> None:
    experiment = Scaling(models=("random:tiny-llama", "random:tiny-llama-64"), limit=3)
    steps = topological(scaling(Planner.of(experiment, "command")).reports.values())
    assert sum(step.kind.name == "edits" for step in steps) == 1
    rounds = [step for step in steps if isinstance(step.config, RoundConfig)]
    groups = {step.config.model.name: step.placement for step in rounds if isinstance(step.config, RoundConfig)}
    assert len(groups) == 2
    assert len({str(placement) for placement in groups.values()}) == 2


def test_a_report_without_a_branch_is_another_report() -> None:
    experiment = Scaling(models=("random:tiny-llama", "random:tiny-llama-64"), limit=3)
    planned = scaling(Planner.of(experiment, "command"))
    whole = planned.join(planned.reports, {})
    name, *_ = planned.reports
    rest = {other: step for other, step in planned.reports.items() if other != name}
    assert planned.join(rest, {name: "out of memory"}).fingerprint != whole.fingerprint
    assert planned.join(planned.reports, {}).fingerprint == whole.fingerprint


# The resources in a model's plan. The rehearsal is replaced by fixed values: 28 GB of base, 10 GB for the rest.

GB = 10**9


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> Footprint:
    items = {"base": 28 * GB, "lora": GB // 2, "optimizer": GB, "sam": GB // 2, "gradients": 3 * GB}
    found = Footprint(items | {"activations": 4 * GB, "logits": GB, "working": 0}, 0, 10**12, 14 * GB, GB, 0, 0)
    small = replace(found, items=found.items | {"activations": GB})
    monkeypatch.setattr(planning, "rehearse", lambda *args, checkpointing, **_: small if checkpointing else found)
    return found


def experiment(**placement: Any) -> Experiment:
    return Experiment(model=ModelConfig(name="random:qwen3-14b", dtype="bfloat16"), placement=Placement(**placement))


@pytest.mark.parametrize(
    ("memory", "workers", "stage"),
    [("80GB", 1, 0), ("24GB", 2, 3), ("12GB", 1, 3)],
    ids=["roomy", "tight", "least"],
)
def test_each_model_gets_the_smallest_group_that_holds_it(
    rehearsed: Footprint, memory: str, workers: int, stage: int
) -> None:
    asked = experiment(gpu=True, workers=8, gpu_memory=memory)
    found = placement_of(asked.model, asked)
    assert found.sharding.zero_stage == stage
    assert found.workers <= max(workers, 2)
    assert found.gpu


def test_what_no_group_holds_is_refused(rehearsed: Footprint) -> None:
    asked = experiment(gpu=True, workers=2, gpu_memory="4GB")
    with pytest.raises(CorsaError, match="no group of up to 2 workers"):
        placement_of(asked.model, asked)


def rounds_of(asked: Experiment) -> list[Any]:
    planner = Planner.of(asked, "")
    taught = planner.facts()
    return [planner.round("corsa", 0, taught, planner.schedule(taught))]


def test_a_run_that_cannot_fit_is_refused_with_the_table(rehearsed: Footprint) -> None:
    asked = experiment(gpu=True, gpu_memory="24GB")
    console = Console(width=140, record=True, file=StringIO())
    with pytest.raises(CorsaError, match=r"needs .* GiB on a GPU that has 22\.4 GiB.*--placement\.force"):
        refuse_what_memory_cannot_hold(rounds_of(asked), console)
    assert "stage 3, offload base" in console.export_text()


def test_adapters_that_are_trained_together_are_counted(rehearsed: Footprint, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def rehearse(shape: Any, dtype: Any, lora: LoraConfig, step: Any, triplets: Any, **_: Any) -> Footprint:
        seen.append((lora.rank, len(triplets)))
        return rehearsed

    monkeypatch.setattr(planning, "rehearse", rehearse)
    for pack in (3, 1):
        asked = experiment(gpu=True, gpu_memory="80GB", pack=pack)
        refuse_what_memory_cannot_hold(rounds_of(asked), Console(file=StringIO()))
    assert seen[0] == (3 * seen[-1][0], 3 * seen[-1][1])


@pytest.mark.usefixtures("one_thread")
def test_a_small_model_that_learns_long_programs_is_planned(tmp_path: Path) -> None:
    arena = write_lines(tmp_path / "arena.jsonl", [update("sin", 2), update("cos", 2)])
    asked = CodeExperiment.model_validate({"data": str(arena), "methods": ("corsa",), "allow_code_execution": True})
    steps = [
        s for s in topological([code_report(Planner.of(asked, ""), primary=())]) if isinstance(s.config, RoundConfig)
    ]
    placement = Placement(gpu=True, gpu_memory="512MiB")
    steps = [replace(step, placement=placement) for step in steps]
    console = Console(width=140, record=True, file=StringIO())
    with pytest.raises(CorsaError, match=r"smollm2-135m under .* GiB on a GPU that has 0\.50 GiB"):
        refuse_what_memory_cannot_hold(steps, console)
    assert "2 updates, counted with the tokenizer of smollm2-135m" in " ".join(console.export_text().split())


@pytest.mark.process
@pytest.mark.parametrize("placement", [{"gpu_memory": "80GB"}, {"gpu_memory": "24GB", "force": True}, {}])
def test_what_fits_or_is_forced_or_unknown_is_not(rehearsed: Footprint, placement: dict[str, Any]) -> None:
    asked = experiment(gpu=True, **placement)
    refuse_what_memory_cannot_hold(rounds_of(asked), Console(file=StringIO()))


def test_a_small_model_is_planned_without_torch() -> None:
    code = (
        "import sys; from rich.console import Console; import corsa.experiments.runner as launch; "
        "from corsa.experiments.base import Experiment; from corsa.experiments.planner import Planner; "
        "planner = Planner.of(Experiment(), ''); taught = planner.facts(); schedule = planner.schedule(taught); "
        "round = planner.round('corsa', 0, taught, schedule); "
        "launch.refuse_what_memory_cannot_hold([round], Console()); "
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
