"""A round that stops when it is enough: every answer that an epoch taught was above the bound."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import Bench, Mortal, round_config, tiny_model, triplets

from corsa.algorithm.packing import Triplet
from corsa.config import TrainingConfig
from corsa.config.steps import RoundConfig
from corsa.flow import Store
from corsa.report.training import told_training
from corsa.training import loop
from corsa.training.loop import RoundRun, train_together
from corsa.training.mixing import Material
from corsa.training.tokens import batch_order

pytestmark = pytest.mark.usefixtures("one_thread")

FAST: dict[str, Any] = {"epochs": 14, "learning_rate": 1e-2}
PLAIN = {"lambda": 0.0, "rho": 0.0, "pcgrad": "off"}


BOUND = 0.15
"""Below what the field accepts: a model of two layers learns no more."""


def stopping(step: dict[str, Any], **training: Any) -> RoundConfig:
    config = round_config(step=step, **FAST | training)
    return config.model_copy(update={"training": config.training.model_copy(update={"stop_above": BOUND})})


@pytest.fixture(scope="module")
def bench() -> Bench:
    """Edits that the model learns soon: the new answer is one token, its own first choice."""
    model = tiny_model()

    def likeliest(edit: Triplet) -> tuple[int]:
        with torch.no_grad():
            return (int(model(input_ids=torch.tensor([edit.prompt])).logits[0, -1].argmax()),)

    return Bench([replace(edit, new=likeliest(edit)) for edit in triplets(5, opposed=9)])


def logp_new(bench: Bench, edit: Triplet) -> float:
    """Log p of the new answer, from a plain row."""
    ids = torch.tensor([[*edit.prompt, *edit.new]])
    with torch.no_grad():
        logits = bench.loaded.model(input_ids=ids).logits[0, len(edit.prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(edit.new)[:, None]).sum())


@pytest.mark.parametrize("step", [PLAIN, {}], ids=["lora", "corsa"])
def test_a_round_stops_after_the_first_epoch_that_found_every_answer_above_the_bound(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: dict[str, Any]
) -> None:
    found = []

    def watched(model: Any, phi: Any, batch: Any, *rest: Any) -> Any:
        """Compares the step's count with one over the edits of its batch, each asked by itself."""
        chosen = [bench.edits[i] for i in order[len(found)]]
        found.append(sum(logp_new(bench, edit) <= math.log(BOUND) for edit in chosen))
        return real(model, phi, batch, *rest)

    real = loop.corsa_step
    config = stopping(step)
    order = [
        batch for epoch in range(FAST["epochs"]) for batch in batch_order(5, 4, seed=config.seed, round_=1, epoch=epoch)
    ]
    monkeypatch.setattr(loop, "corsa_step", watched)
    stopped = bench.train(config, tmp_path / "stopped")
    assert [row["below"] for row in stopped.curves] == found
    epochs = [sum(found[i : i + 2]) for i in range(0, len(found), 2)]
    assert epochs[-1] == 0
    assert 0 not in epochs[:-1]
    assert len(epochs) < FAST["epochs"]
    monkeypatch.undo()
    whole = bench.train(round_config(step=step, **FAST), tmp_path / "whole")
    assert len(whole.curves) == 2 * FAST["epochs"]
    assert all(row["below"] is None for row in whole.curves)
    for ours, theirs in zip(stopped.curves, whole.curves, strict=False):  # the same steps, only fewer
        assert ours | {"below": None, "seconds": 0} == theirs | {"seconds": 0}


def test_an_interrupted_round_stops_where_an_undisturbed_one_does(bench: Bench, tmp_path: Path) -> None:
    config = stopping(PLAIN)
    undisturbed = bench.train(config, tmp_path / "undisturbed")
    steps = len(undisturbed.curves)
    group = Mortal(0, 1, torch.device("cpu"), sums=2 * (steps - 1))  # in its last step
    with pytest.raises(ConnectionError):
        bench.train(config, tmp_path / "resumed", group=group, checkpoint_every=1)
    for _ in range(2):  # the second time all is done
        again = bench.train(config, tmp_path / "resumed", checkpoint_every=1)
        assert len(again.curves) == steps
        assert torch.equal(again.phi, undisturbed.phi)


def test_a_row_of_a_pack_stops_while_the_others_go_on(bench: Bench, tmp_path: Path) -> None:
    slow, fast = (stopping(PLAIN, learning_rate=rate) for rate in (6e-3, 1e-2))
    alone = [bench.train(config, tmp_path / str(i)) for i, config in enumerate((slow, fast))]
    lora = bench.loaded.lora
    lora.resize(2)
    with torch.no_grad():
        lora.phi.copy_(bench.start.expand(2, -1))
    try:
        runs = [RoundRun(config, (Store(tmp_path), f"partial/{i}")) for i, config in enumerate((slow, fast))]
        curves = train_together(runs, Material(bench.edits), bench.loaded, bench.context(), lambda line: None)
        rows = lora.phi.detach().clone()
    finally:
        lora.resize(1)
    assert len(alone[0].curves) > len(alone[1].curves)
    for row, own, theirs in zip(rows, curves, alone, strict=True):
        assert isinstance(own, list)
        assert len(own) == len(theirs.curves)
        assert float((row - theirs.phi[0]).norm()) <= 1e-3 * float((theirs.phi[0] - bench.start[0]).norm())


def test_a_skipped_step_is_not_enough(bench: Bench, tmp_path: Path) -> None:
    """A loss that is not finite says nothing about what was learnt."""
    edits = [replace(bench.edits[0], reference=(math.nan, 0.0)), *bench.edits[1:]]
    config = stopping({"rho": 0.0}, max_skipped=100)
    assert len(bench.train(config, tmp_path, edits=edits).curves) == 2 * FAST["epochs"]


def test_the_setting_changes_no_identity_unless_it_is_set() -> None:
    assert "stop_above" not in TrainingConfig().canonical()
    assert TrainingConfig(stop_above=0.5).canonical()["stop_above"] == 0.5
    with pytest.raises(ValidationError, match=r"greater than or equal to 0\.5"):
        TrainingConfig(stop_above=0.4)


def test_rounds_that_stop_differently_are_not_trained_together() -> None:
    one, other = round_config(), round_config(stop_above=0.5)
    assert isinstance(one, RoundConfig)
    assert one.shared != other.shared


def test_a_report_says_what_the_training_did() -> None:
    stopping, found = TrainingConfig(stop_above=0.5), {"steps": 6, "steps_planned": 45, "stopped": "learnt"}
    early = "stopped after 6 of 45 steps: every answer it taught was more than 50 % probable"
    assert list(told_training(stopping, found)) == [early]
    (late,) = told_training(stopping, {"steps": 45, "steps_planned": 45, "stopped": "epochs"})
    assert late.startswith("took all 45 steps: not every answer")
    assert list(told_training(TrainingConfig(), {"steps": 45})) == []
    replay = TrainingConfig(batch=8, replay=0.5)
    assert list(told_training(replay, found | {"replayed_from": 0})) == []
    (back,) = told_training(replay, found | {"replayed_from": 10})
    assert back == "looked back at 10 facts of earlier updates, 4 in every step"
