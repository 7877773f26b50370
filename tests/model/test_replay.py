"""Rounds that look back: batches with facts of earlier rounds, what that changes, and what it depends on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from tiny import Bench, round_config, triplets

from corsa.algorithm.logprobs import answer_logprobs
from corsa.algorithm.packing import EARLIER, Triplet, pack
from corsa.config import TrainingConfig
from corsa.config.steps import RoundsConfig
from corsa.data.schedule import ROUNDS, held_before
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Planner
from corsa.flow import Step
from corsa.methods import METHODS, looks_back
from corsa.report.findings import LOOKS_BACK, marked
from corsa.training.mixing import Material, drawn, in_role
from corsa.training.tokens import batch_order

PLAIN = {"lambda": 0.0, "rho": 0.0, "pcgrad": "off"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(triplets(8, opposed=9))


# Batches


@pytest.mark.parametrize(("pool", "count"), [(7, 3), (4, 4), (12, 5), (1, 1)])
def test_earlier_facts_are_drawn_evenly(pool: int, count: int) -> None:
    """Any so many draws in a row hold each fact as often as any other, give or take one."""
    places = np.concatenate([drawn(pool, count, step, seed=1, round_=2) for step in range(3 * pool)])
    assert len(places) == 3 * pool * count
    for passes in range(1, 3 * count):
        assert Counter(places[: passes * pool].tolist()) == dict.fromkeys(range(pool), passes)


def test_a_small_pool_is_drawn_whole_and_none_of_an_empty_one() -> None:
    assert sorted(drawn(2, 5, 3, seed=1, round_=2)) == [0, 1]
    assert len(drawn(0, 5, 3, seed=1, round_=2)) == 0


def test_draws_follow_from_seed_and_round() -> None:
    def draws(seed: int, round_: int) -> list[int]:
        return np.concatenate([drawn(20, 4, step, seed=seed, round_=round_) for step in range(5)]).tolist()

    assert draws(1, 2) == draws(1, 2)
    assert len({tuple(draws(*key)) for key in ((1, 2), (2, 2), (1, 3))}) == 3


def test_a_batch_holds_its_share_of_earlier_facts_beside_its_own() -> None:
    own, earlier = triplets(5, seed=1), triplets(9, seed=2)
    config = round_config(batch=6, replay=0.5)
    material = Material(own, earlier)
    for epoch in range(3):
        batches = material.batches(config, epoch)
        plain = batch_order(5, 3, seed=config.seed, round_=1, epoch=epoch)
        assert [[i for i in batch if i < 5] for batch in batches] == [batch.tolist() for batch in plain]
        assert [sum(i >= 5 for i in batch) for batch in batches] == [3, 3]
    first = Material(own).batches(config, 0)
    assert [len(batch) for batch in first] == [3, 2]  # a first round has nothing to look back at


def test_without_replay_the_batches_are_as_before() -> None:
    config = round_config(batch=4)
    found = Material(triplets(9)).batches(config, 1)
    expected = batch_order(9, 4, seed=config.seed, round_=1, epoch=1)
    assert [batch.tolist() for batch in found] == [batch.tolist() for batch in expected]


def test_a_batch_without_room_for_its_own_edits_is_refused() -> None:
    with pytest.raises(ValidationError, match="no room for the round's own edits"):
        TrainingConfig(batch=1, replay=0.4)
    assert (TrainingConfig(batch=4, replay=0.75).own, TrainingConfig(batch=16, replay=0.01).replayed) == (1, 1)
    assert "replay" not in TrainingConfig().canonical()


# Training


def test_a_replayed_fact_counts_like_an_own_one(bench: Bench, tmp_path: Path) -> None:
    """If a batch holds all own and all earlier facts, the round equals one that is taught them all."""
    own, earlier = bench.edits[:5], bench.edits[5:]
    mixed = bench.train(round_config(batch=8, replay=0.375), tmp_path / "mixed", edits=own, earlier=earlier)
    whole = bench.train(round_config(batch=8), tmp_path / "whole")
    assert len(mixed.curves) == len(whole.curves) == 3
    assert float((mixed.phi - whole.phi).abs().max()) <= 1e-5
    without = bench.train(round_config(batch=8), tmp_path / "without", edits=own)
    assert float((without.phi - whole.phi).abs().max()) > 1e-3


def test_a_second_round_forgets_less_with_replay(bench: Bench, tmp_path: Path) -> None:
    first, second = bench.edits[:4], bench.edits[4:]
    start = bench.start
    bench.start = bench.train(round_config(step=PLAIN, epochs=30, learning_rate=1e-2), tmp_path / "1", edits=first).phi

    def logp(edits: list[Triplet]) -> float:
        with torch.no_grad():
            return float(answer_logprobs(bench.loaded.model, pack(edits), len(edits))[0].mean())

    try:
        learnt = logp(first)
        lost, new = [], []
        for replay in (0.0, 0.5):
            training: dict[str, Any] = {"epochs": 20, "learning_rate": 1e-2, "batch": 4, "replay": replay}
            bench.train(round_config(step=PLAIN, **training), tmp_path / f"{replay}", edits=second, earlier=first)
            lost.append(learnt - logp(first))
            new.append(logp(second))
    finally:
        bench.start = start
    assert lost[0] > 1.0, "nothing was forgotten, so nothing was compared"
    assert lost[1] < 0.5 * lost[0]
    assert new[1] > new[0] - 1.0


def test_earlier_facts_can_be_an_objective_of_their_own(bench: Bench, tmp_path: Path) -> None:
    """A step of LoRA with `replay-pcgrad`: g = P(g_own; g_earlier) + w P(g_earlier; g_own), each a mean over tokens."""
    own, earlier, weight = bench.edits[:3], bench.edits[3:5], 0.5
    step = PLAIN | {"pcgrad": "symmetric", "replay": weight}
    config = round_config(step=step, epochs=1, batch=5, replay=0.4, warmup=0, clip=1e9)
    lora = bench.loaded.lora
    with torch.no_grad():
        lora.phi.copy_(bench.start)
    means, gradients = [], []
    for edits in (own, earlier):
        logp = answer_logprobs(bench.loaded.model, pack(edits), len(edits))[0]
        means.append(-logp.sum() / sum(len(edit.new) for edit in edits))
        gradients.append(torch.autograd.grad(means[-1], [lora.phi])[0])
    (a, b), inner = gradients, (gradients[0] * gradients[1]).sum()
    if inner < 0:
        a, b = a - inner / b.norm() ** 2 * b, b - inner / a.norm() ** 2 * a
    expected = a + weight * b
    row = bench.train(config, tmp_path, edits=own, earlier=in_role(earlier, EARLIER)).curves[0]
    assert row["loss_sft"] == pytest.approx(means[0].item(), rel=1e-5)
    assert row["loss_replay"] == pytest.approx(means[1].item(), rel=1e-5)
    assert row["conflict"] is bool(inner < 0)
    assert row["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-4)


def test_a_first_round_runs_without_the_objective(bench: Bench, tmp_path: Path) -> None:
    step = PLAIN | {"pcgrad": "symmetric", "replay": 1.0}
    alone = bench.train(round_config(step=step, batch=8, replay=0.5), tmp_path / "first")
    plain = bench.train(round_config(step=PLAIN, batch=4), tmp_path / "plain")
    assert float((alone.phi - plain.phi).abs().max()) <= 1e-6


# What still holds


def test_what_a_round_looks_back_at_still_holds_and_is_not_revised() -> None:
    rows = [("a1", "a", 1), ("b1", "b", 1), ("c1", "c", 1), ("a2", "a", 2), ("d2", "d", 2), ("b3", "b", 3)]
    names = ("edit", "chain", "learnt")
    schedule = pa.Table.from_pylist([dict(zip(names, row, strict=True)) | {"part": "update"} for row in rows], ROUNDS)
    found = {number: [row["edit"] for row in held_before(schedule, number)] for number in (1, 2, 3, 4)}
    assert found == {1: [], 2: ["b1", "c1"], 3: ["a2", "c1", "d2"], 4: ["a2", "b3", "c1", "d2"]}


# Identities and reports


def file_of_facts(path: Path, count: int, answer: str = "Oslo") -> str:
    rows = [
        {"prompt": f"Where is firm {i} of {path.stem}?", "target_new": answer if i == 0 else f"Town {i}"}
        | {"target_old": f"Old {i}"}
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def experiment(data: str, **training: Any) -> Experiment:
    model: Any = "random:tiny-llama"
    return Experiment(model=model, benchmark="file", data=data, training=TrainingConfig(**training))


@pytest.mark.parametrize("method", ["replay", "joint"])
def test_a_round_that_looks_back_depends_on_the_earlier_facts(tmp_path: Path, method: str) -> None:
    """Facts of the same table, and facts of another one that the chain began with."""

    def second(first_answer: str, method: str) -> tuple[Step, Step]:
        own = Planner.of(experiment(file_of_facts(tmp_path / "own.jsonl", 4)), "")
        other = Planner.of(experiment(file_of_facts(tmp_path / "other.jsonl", 3, first_answer)), "")
        known, new = other.facts(), own.facts()
        schedule = own.schedule(new, RoundsConfig(rounds=1, first=2))
        alone = own.round(method, 0, new, schedule, number=2, known=(known, other.schedule(known)))
        rounds = other.chain(method, 0, known, other.schedule(known, RoundsConfig(rounds=3)), rounds=(1, 2))
        return alone, rounds[-1]

    for one, two in zip(second("Oslo", method), second("Bergen", method), strict=True):
        assert one.fingerprint != two.fingerprint
    assert "known_reference" in second("Oslo", method)[0].inputs
    assert "known_reference" not in second("Oslo", "lora")[0].inputs
    assert second("Oslo", "lora")[0].fingerprint == second("Bergen", "lora")[0].fingerprint


def test_joint_training_does_not_go_on_from_the_round_before(tmp_path: Path) -> None:
    planner = Planner.of(experiment(file_of_facts(tmp_path / "own.jsonl", 4)), "")
    taught = planner.facts()
    schedule = planner.schedule(taught, RoundsConfig(rounds=2))
    for method, continues in (("joint", False), ("replay", True), ("lora", True)):
        assert ("previous" in planner.chain(method, 0, taught, schedule, rounds=(1, 2))[1].inputs) is continues


def test_reports_mark_methods_that_look_back() -> None:
    plain = experiment("x.jsonl")
    found = {name: looks_back(METHODS[name].round_config(plain, 0, 2)) for name in METHODS}
    backwards = {"replay", "corsa-replay", "replay-pcgrad", "replay-ridge", "joint", "in-context"}
    assert {name for name, back in found.items() if back} == backwards
    assert looks_back(METHODS["lora"].round_config(experiment("x.jsonl", replay=0.25), 0, 2))
    metrics = {"looks_back": ["replay"]}
    assert (marked("replay", metrics), marked("lora", metrics)) == ("LoRA with replay *", "LoRA")
    assert LOOKS_BACK.startswith("* looks back")
