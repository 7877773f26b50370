"""LoRA whose A reads little of everyday questions: its initial values, and what training B alone changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_replay import experiment, file_of_facts
from tiny import FAMILIES, LORA, Bench, round_config, tiny_model, triplets
from torch import Tensor

from corsa.algorithm.logprobs import answer_logprobs
from corsa.algorithm.packing import Triplet, pack
from corsa.config import RIDGE_GAIN, TrainingConfig
from corsa.config.steps import RoundsConfig
from corsa.experiments.planner import Planner
from corsa.flow import Step
from corsa.lora.flat import Lora
from corsa.lora.ridge_start import read_little

PLAIN = {"lambda": 0.0, "rho": 0.0, "pcgrad": "off"}
ROWS = [[5, 17, 300, 41, 8, 2], [9, 77, 1000], [31, 4, 15, 92]]

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(model: Any, names: list[str]) -> dict[str, Tensor]:
    """What each module reads of `ROWS`, row by row without padding: (tokens, d), float64."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(lambda module, args, name=name: found[name].append(args[0][0]))
        for name in names
    ]
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=torch.tensor([row]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_is_multiplied_by_the_regularised_inverse_of_the_second_moment(family: str) -> None:
    model, ridge = tiny_model(family), 0.05
    lora = Lora(model, LORA, seed=3, adapters=2)
    lora.initialise(3, 4)
    before = [a.detach().clone().double() for a in lora.factors()[0::2]]
    read_little(model, lora, ROWS, ridge)
    with lora.off():
        read = inputs(model, [site.name for site in lora.sites])
    for site, old, new in zip(lora.sites, before, lora.factors()[0::2], strict=True):
        x = read[site.name]
        moment = x.T @ x / len(x)
        inverse = torch.linalg.inv(moment + ridge * moment.trace() / site.inputs * torch.eye(site.inputs))
        for row in range(2):
            expected = old[row] @ inverse
            expected *= RIDGE_GAIN * old[row].norm() / expected.norm()
            found = new[row].detach().double()
            assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert not any(b.any() for b in lora.factors()[1::2])


def test_only_b_is_trained(bench: Bench, tmp_path: Path) -> None:
    lora = bench.loaded.lora
    trained = bench.train(round_config(step=PLAIN, ridge=0.01), tmp_path / "b")
    with torch.no_grad():
        lora.phi.copy_(trained.phi - bench.start)
    moved = [bool(factor.any()) for factor in lora.factors()]
    assert moved == [False, True] * len(lora.sites)
    both = bench.train(round_config(step=PLAIN), tmp_path / "both")  # the next round without it trains both
    with torch.no_grad():
        lora.phi.copy_(both.phi - bench.start)
    assert all(bool(factor.any()) for factor in lora.factors())


def test_facts_are_learnt_as_well_and_everyday_answers_stay(bench: Bench, tmp_path: Path) -> None:
    own, everyday = bench.edits[:4], bench.edits[4:6]
    lora, model = bench.loaded.lora, bench.loaded.model

    def logp(edits: list[Triplet]) -> Tensor:
        with torch.no_grad():
            return answer_logprobs(model, pack(edits), len(edits))[0]

    moved, learnt = [], []
    for ridge in (None, 0.01):
        lora.initialise(0)
        before, kept = logp(own), logp(everyday)
        if ridge:
            read_little(model, lora, [[*t.prompt, *t.new] for t in everyday], ridge)
        bench.start = lora.phi.detach().clone()
        config = round_config(step=PLAIN, epochs=30, learning_rate=1e-2, ridge=ridge)
        bench.train(config, tmp_path / str(ridge), edits=own)
        learnt.append(float((logp(own) - before).mean()))
        moved.append(float((logp(everyday) - kept).abs().mean()))
    assert moved[0] > 1.0, "nothing moved, so nothing was compared"
    assert learnt[1] > 0.9 * learnt[0] > 5.0
    assert moved[1] < 0.1 * moved[0]


@pytest.fixture
def bench() -> Bench:
    return Bench(triplets(8, opposed=9))


def test_a_new_adapter_with_a_ridge_depends_on_the_everyday_questions(tmp_path: Path) -> None:
    data = file_of_facts(tmp_path / "own.jsonl", 4)

    def rounds(method: str, **training: Any) -> list[Step]:
        planner = Planner.of(experiment(data, **training), "")
        taught = planner.facts()
        return planner.chain(method, 0, taught, planner.schedule(taught, RoundsConfig(rounds=2)), rounds=(1, 2))

    first, second = rounds("lora", ridge=0.01)
    assert first.inputs["anchors"].name == "base/anchors"
    assert "anchors" not in second.inputs  # it keeps the A of the first
    assert first.fingerprint != rounds("lora", ridge=0.02)[0].fingerprint
    for method in ("f-learning", "joint"):
        assert rounds(method, ridge=0.01)[1].fingerprint == rounds(method)[1].fingerprint
    assert "ridge" not in TrainingConfig().canonical()


def test_the_method_with_a_ridge_is_replay_with_it_at_the_rate_of_the_others(tmp_path: Path) -> None:
    """The change of a step is B's, times A: A is `RIDGE_GAIN` times as large, so the rate is that much smaller."""
    data = file_of_facts(tmp_path / "own.jsonl", 4)

    def first(method: str, **training: Any) -> Step:
        planner = Planner.of(experiment(data, **training), "")
        taught = planner.facts()
        return planner.chain(method, 0, taught, planner.schedule(taught, RoundsConfig(rounds=1)), rounds=(1,))[0]

    as_edit = {"replay": 0.5, "ridge": 0.01, "learning_rate": 5e-4}
    assert first("replay-ridge", learning_rate=2e-3).config == first("lora", **as_edit).config
    assert first("replay-ridge", **as_edit).config == first("lora", **as_edit).config
    assert first("replay-ridge", ridge=0.1).config == first("replay", ridge=0.1).config
