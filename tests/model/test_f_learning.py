"""F-Learning: the subtracted part, the learnt part, and the adapter that combines them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from one_worker import taken
from tiny import EDITS, Bench, round_config, triplets

from corsa.algorithm.packing import Triplet
from corsa.config import STEPS, FLearningConfig, StepConfig
from corsa.config.steps import ReportConfig
from corsa.experiments.planner import Planner
from corsa.flow.step import topological
from corsa.lora.attached import attached
from corsa.lora.factors import Adapter
from corsa.methods.base import Round, Taught
from corsa.methods.f_learning import FLearningRoundConfig
from corsa.methods.f_learning.teach import teach
from corsa.training.rounds import take_rounds
from pipelines.sensitivity import Sensitivity, sensitivity

pytestmark = pytest.mark.usefixtures("one_thread")

RANK = 4


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(triplets(EDITS))


def taught(bench: Bench, folder: Path, before: Adapter | None = None, **settings: Any) -> tuple[Adapter, Any, Any]:
    """A round of F-Learning on the bench's edits."""
    plain = dict(round_config(epochs=4)) | {"step": STEPS["lora"](StepConfig())}
    config = FLearningRoundConfig(**plain, f_learning=FLearningConfig(**settings))
    found = bench.teach(teach, config, folder, before)
    return cast(Adapter, found.change), found.curves, dict(found.metrics)


def delta(adapter: Adapter) -> torch.Tensor:
    return torch.cat([factors.delta().flatten() for factors in adapter.values()])


def test_with_nothing_subtracted_it_is_plain_lora(bench: Bench, tmp_path: Path) -> None:
    adapter, _, metrics = taught(bench, tmp_path / "f", alpha=0.0)
    lora = bench.loaded.lora
    with torch.no_grad():
        lora.initialise(3)
    bench.start.copy_(lora.phi.detach())
    bench.train(round_config(step=STEPS["lora"](StepConfig()).canonical(), epochs=4), tmp_path / "lora")
    torch.testing.assert_close(delta(adapter), delta(lora.adapter()), atol=1e-6, rtol=1e-4)
    assert metrics["rank"] == 2 * lora.config.rank


def test_both_phases_count_as_training_time(bench: Bench, tmp_path: Path) -> None:
    seconds: dict[str, float] = {}

    def timed(round_: Round) -> Taught:
        def train(examples: Sequence[Triplet], name: str, phi: torch.nn.Parameter | None = None, /) -> Any:
            curves = round_.train(examples, name, phi)
            seconds[name] = sum(step["seconds"] for step in curves)
            return curves

        return teach(replace(round_, train=train))

    plain = dict(round_config(epochs=4)) | {"step": STEPS["lora"](StepConfig())}
    config = FLearningRoundConfig(**plain, f_learning=FLearningConfig())
    metrics = bench.teach(timed, config, tmp_path).metrics
    assert seconds.keys() == {"forgetting", "learning"}
    assert metrics["training_s"] == pytest.approx(sum(seconds.values()), abs=1e-3)


def test_what_is_subtracted_makes_the_old_answers_less_likely(bench: Bench, tmp_path: Path) -> None:
    before = [taught(bench, tmp_path / str(alpha), alpha=alpha)[1][0]["logp_old"] for alpha in (0.0, 0.5, 1.0)]
    assert before[0] > before[1] > before[2]  # when the learning begins


def test_a_round_goes_on_from_the_adapter_before_it(bench: Bench, tmp_path: Path) -> None:
    first, *_ = taught(bench, tmp_path / "first", alpha=0.5)
    second, curves, metrics = taught(bench, tmp_path / "second", before=first, alpha=0.0)
    assert metrics["rank"] == 4 * bench.loaded.lora.config.rank
    _, fresh, _ = taught(bench, tmp_path / "fresh", alpha=0.0)
    assert curves[0]["loss_sft"] < fresh[0]["loss_sft"], "it has learnt these answers before"
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad(), bench.loaded.lora.off():
        with attached(bench.loaded.model, second):
            one = bench.loaded.model(input_ids=ids).logits
        with attached(bench.loaded.model, {n: f.delta() for n, f in second.items()}):
            dense = bench.loaded.model(input_ids=ids).logits
    torch.testing.assert_close(one, dense, atol=1e-4, rtol=1e-4)


def test_the_adapter_can_be_cut_to_a_rank_and_says_what_that_costs(bench: Bench, tmp_path: Path) -> None:
    whole, _, _ = taught(bench, tmp_path / "whole", alpha=0.5)
    cut, _, metrics = taught(bench, tmp_path / "cut", alpha=0.5, rank=RANK)
    assert metrics["rank"] == RANK
    lost = (delta(cut) - delta(whole)).norm() / delta(whole).norm()
    assert 0 < metrics["cut_error"] < 1
    assert metrics["cut_error"] == pytest.approx(float(lost), rel=1e-3)


def test_an_interrupted_round_does_not_train_again_what_is_done(bench: Bench, tmp_path: Path) -> None:
    once, curves, _ = taught(bench, tmp_path, alpha=0.5)
    again, same, _ = taught(bench, tmp_path, alpha=0.5)  # both checkpoints are at the end of their stage
    assert torch.equal(delta(once), delta(again))
    assert curves == same


def test_the_sensitivity_scenario_sweeps_alpha() -> None:
    experiment = Sensitivity(seeds=(0, 1), alphas=(0.05, 0.1, 1.0))
    found = topological([sensitivity(Planner.of(experiment, ""))])
    trained = {
        (step.config.f_learning.alpha, step.config.seed)
        for step in found
        if isinstance(step.config, FLearningRoundConfig)
    }
    assert trained == {(alpha, seed) for alpha in (0.05, 0.1, 1.0) for seed in (0, 1)}
    report = found[-1].config
    assert isinstance(report, ReportConfig)
    (axis,) = [axis for axis in report.axes if axis.name == "alpha"]
    assert axis.points == {f"f-learning alpha={alpha:g}": ("f-learning", alpha) for alpha in (0.05, 0.1, 1.0)}
    assert FLearningConfig().alpha in Sensitivity().alphas


class Lines:
    """A `Progress` that keeps every line."""

    def __init__(self) -> None:
        self.posted: list[dict[str, Any]] = []

    def post(self, line: Mapping[str, Any]) -> None:
        self.posted.append(dict(line))


def test_the_line_of_a_phase_says_nothing_of_the_phase_before(tmp_path: Path) -> None:
    lines = Lines()
    taken(
        tmp_path,
        lambda planner, facts, schedule: planner.chain("f-learning", 0, facts, schedule, rounds=(1, 2)),
        take=lambda tasks, context: take_rounds(tasks, context, lines),
    )
    phases = [[*group] for _, group in groupby(lines.posted, key=itemgetter("phase"))]
    round_ = ["loading", "training", "forgetting", "training", "evaluating"]
    assert [group[0]["phase"] for group in phases] == [*round_, "done", *round_, "done"]
    assert all(group[0].keys() == {"chain", "phase", "round", "rounds"} for group in phases)
    assert [group[-1].get("step") for group in phases[:5]] == [None, None, 6, 6, None]  # 3 epochs of 2 batches
