"""Adapters trained together on one copy of the base learn the same as when trained separately, in any combination."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import END, Bench, round_config, tiny_model, triplets, with_reference
from torch import Tensor

from corsa.algorithm.packing import Triplet, pack
from corsa.algorithm.row_settings import RowSettings
from corsa.config import ModelConfig, Placement, StepConfig
from corsa.config.steps import RoundConfig
from corsa.errors import CorsaError
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Planner
from corsa.flow import Store
from corsa.flow.task import Task
from corsa.training.loop import RoundFailedError, RoundRun, train_together
from corsa.training.mixing import Material
from corsa.training.rounds import _together

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: list[dict[str, Any]] = [
    {},
    {"step": {"lambda": 0.0, "rho": 0.1}, "seed": 8},
    {"step": {"lambda": 2.5, "rho": 0.0, "beta": 0.4}, "learning_rate": 1e-3},
    {"step": {"lambda": 0.0, "rho": 0.0, "pcgrad": "off"}, "seed": 5},
]
"""The default, no DPO, no SAM, and plain LoRA: beside one another in one pack."""


def rounds(**common: Any) -> list[RoundConfig]:
    made = []
    for setting in SETTINGS:
        rate = {k: v for k, v in setting.items() if k == "learning_rate"}
        config = round_config(step={**setting.get("step", {}), **common}, **rate)
        made.append(config.model_copy(update={"seed": setting.get("seed", 3)}))
    return made


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(triplets(7, opposed=2, long=(2,)))  # one edit runs as two plain rows, the others packed


def together(
    bench: Bench,
    configs: Sequence[RoundConfig],
    folder: Path,
    *,
    edits: Sequence[Triplet] | None = None,
    post: Any = lambda line: None,
    **placement: Any,
) -> tuple[Tensor, list[Any]]:
    """The final rows of phi, and the result of each round."""
    lora = bench.loaded.lora
    lora.resize(len(configs))
    with torch.no_grad():
        lora.phi.copy_(bench.start.expand(len(configs), -1))
    round_runs = [RoundRun(config, (Store(folder), f"partial/{i}")) for i, config in enumerate(configs)]
    try:
        context = bench.context(Placement(**placement))
        found = train_together(
            round_runs, Material(bench.edits if edits is None else edits), bench.loaded, context, post
        )
        return lora.phi.detach().clone(), found
    finally:
        lora.resize(1)


@pytest.mark.parametrize("common", [{}, {"reduction": "sequence"}, {"scope": "microbatch", "microbatch": 2}])
def test_each_row_ends_as_it_does_alone(bench: Bench, tmp_path: Path, common: dict[str, Any]) -> None:
    configs = rounds(**common)
    phi, found = together(bench, configs, tmp_path / "together")
    for row, curves, config in zip(phi, found, configs, strict=True):
        alone = bench.train(config, tmp_path / f"{config.seed}-{config.step.rho}-{config.step.lambda_}")
        # Adam turns rounding in an entry without gradient into +-lr, so the bound is on the norm of the whole change.
        assert float((row - alone.phi[0]).norm()) <= 1e-3 * float((alone.phi[0] - bench.start[0]).norm())
        assert [c["step"] for c in curves] == [c["step"] for c in alone.curves]
        for mine, theirs in zip(curves, alone.curves, strict=True):
            for name in ("loss_sft", "loss_dpo", "logp_new", "logp_old", "cosine", "grad_norm", "learning_rate"):
                expected = theirs[name]
                assert mine[name] == (expected if expected is None else pytest.approx(expected, rel=1e-3, abs=1e-4))
            assert (mine["sharpness"] is None) == (theirs["sharpness"] is None)
    assert float((phi[0] - phi[1]).abs().max()) > 1e-4  # otherwise the rows could have been mixed up


def test_small_micro_batches_of_each_adapter_change_nothing(bench: Bench, tmp_path: Path) -> None:
    configs = rounds()
    whole, _ = together(bench, configs, tmp_path / "whole")
    cut, _ = together(bench, configs, tmp_path / "cut", micro_batch=1)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-5)


def test_a_row_that_diverges_leaves_the_others_alone(bench: Bench, tmp_path: Path) -> None:
    good, bad = round_config(epochs=8), round_config(epochs=8, step={"rho": 1e30})
    phi, found = together(bench, [good, bad, good.model_copy(update={"seed": 9})], tmp_path)
    assert isinstance(found[1], RoundFailedError)
    assert "6 of 6 steps had a non-finite gradient" in str(found[1])
    assert torch.equal(phi[1], bench.start[0])  # none of its steps was taken
    for row, config in ((0, good), (2, good.model_copy(update={"seed": 9}))):
        alone = bench.train(config, tmp_path / f"alone{row}")
        torch.testing.assert_close(phi[row], alone.phi[0], rtol=0, atol=1e-5)
        assert not any(c["skipped"] for c in found[row])


def test_one_bad_edit_skips_the_steps_of_the_rows_that_meet_it(bench: Bench, tmp_path: Path) -> None:
    edits = [replace(bench.edits[0], reference=(math.nan, 0.0)), *bench.edits[1:]]
    configs = [round_config(), round_config(step={"lambda": 0.0}), round_config().model_copy(update={"seed": 4})]
    _, found = together(bench, configs, tmp_path, edits=edits)
    assert [sum(c["skipped"] for c in curves) for curves in found] == [3, 0, 3]  # without DPO it is not a bad edit
    assert [c["skipped"] for c in found[0]] != [c["skipped"] for c in found[2]]  # each in its own order


# What one pack cannot train


MIXED: dict[str, list[dict[str, Any]]] = {
    "pcgrad": [{}, {"pcgrad": "off"}],
    "pcgrad, the first without DPO": [{"lambda": 0.0}, {"pcgrad": "off"}],
    "pcgrad, one of three": [{"lambda": 0.0}, {}, {"pcgrad": "authors"}],
    "scope": [{}, {"scope": "microbatch"}],
    "microbatch": [{"scope": "microbatch"}, {"scope": "microbatch", "microbatch": 2}],
    "reduction": [{"reduction": "sequence"}, {}],
    "eps": [{}, {"eps": 1e-8}],
    "perturb_every": [{}, {"perturb_every": 2}],
}


@pytest.mark.parametrize("what", MIXED)
def test_settings_that_a_pack_would_mix_are_refused(bench: Bench, tmp_path: Path, what: str) -> None:
    configs = [round_config(step=step) for step in MIXED[what]]
    with pytest.raises(CorsaError, match=rf"must have the same {what.split(',')[0]}.*--pack 1"):
        RowSettings.of([config.step for config in configs], "cpu")
    with pytest.raises(CorsaError, match="--pack 1"):
        together(bench, configs, tmp_path)


def test_every_field_of_a_step_is_each_row_s_own_or_compared() -> None:
    """A field added later is compared unless it is listed in `StepConfig.per_row`."""
    other: dict[str, Any] = {
        "pcgrad": "off",
        "scope": "microbatch",
        "microbatch": 2,
        "reduction": "sequence",
        "eps": 1e-8,
        "perturb_every": 2,
        "reuse": 0.5,
        "radius": "adaptive",
        "perturbation": "random",
    }
    assert {*other, *StepConfig.per_row()} == StepConfig.model_fields.keys()
    before = {"microbatch": {"scope": "microbatch"}, "reuse": {"perturb_every": 2}}  # they have no effect without these
    for name, value in other.items():
        plain = StepConfig.model_validate(before.get(name, {}))
        with pytest.raises(CorsaError):
            RowSettings.of([plain, plain.model_copy(update={name: value})], "cpu")


def test_an_approximation_is_not_packed(bench: Bench, tmp_path: Path) -> None:
    configs = [round_config(step={"perturb_every": 2, "rho": rho}) for rho in (0.05, 0.1)]
    with pytest.raises(CorsaError, match="perturb_every 2 uses one adapter's perturbation again"):
        together(bench, configs, tmp_path)


@pytest.mark.parametrize("training", [{"epochs": 4}, {"batch": 3}, {"clip": 0.5}, {"first_rate": "zero"}])
def test_rounds_that_are_trained_in_other_ways_are_refused(
    bench: Bench, tmp_path: Path, training: dict[str, Any]
) -> None:
    with pytest.raises(CorsaError, match="must have the same training: train them apart"):
        together(bench, [round_config(), round_config(**training)], tmp_path)


def tasks_of(*methods: str, **corsa: Any) -> list[Task]:
    """The first rounds of some methods, as an experiment plans them."""
    model = ModelConfig.model_validate({"name": "random:tiny-llama", "template": "chat"})
    experiment = Experiment(model=model, limit=4, corsa=StepConfig.model_validate(corsa))
    planner = Planner.of(experiment, "")
    taught = planner.facts()
    schedule = planner.schedule(taught)
    return [Task(planner.round(method, 0, taught, schedule), Store("nowhere")) for method in methods]


def packs(tasks: list[Task], most: int) -> list[list[str]]:
    """Which methods are trained together, in training order."""
    found = []
    while tasks:
        members = _together(tasks, {}, most)
        tasks = [task for task in tasks if task not in members]
        found.append([task.name.split("/")[1] for task in members])
    return found


EVERY = ("lora", "corsa", "corsa-no-pcgrad", "corsa-no-sam", "corsa-no-dpo", "corsa-published", "f-learning")


def test_packs_share_one_key() -> None:
    for order in permutations(EVERY[:3]):
        found = {frozenset(members) for members in packs(tasks_of(*order), 3)}
        assert found == {frozenset({"lora", "corsa"}), frozenset({"corsa-no-pcgrad"})}
    assert packs(tasks_of(*EVERY), 9) == [
        ["lora", "corsa", "corsa-no-sam", "corsa-no-dpo"],
        ["corsa-no-pcgrad"],
        ["corsa-published"],
        ["f-learning"],
    ]
    assert packs(tasks_of(*EVERY), 2)[:2] == [["lora", "corsa"], ["corsa-no-pcgrad"]]
    assert packs(tasks_of("lora", "corsa", perturb_every=2), 9) == [["lora"], ["corsa"]]


def test_methods_in_packs_end_as_they_do_alone(bench: Bench, tmp_path: Path) -> None:
    """What `--methods lora,corsa,corsa-no-pcgrad --pack 3` trains."""
    named = {task.name.split("/")[1]: round_config(step=task.config.step.canonical()) for task in tasks_of(*EVERY[:3])}
    ends: dict[str, Tensor] = {}
    edits = with_reference(tiny_model(), triplets(7))  # all in conflict: without PCGrad the adapter differs
    for members in packs(tasks_of(*EVERY[:3]), 3):
        phi, _ = together(bench, [named[method] for method in members], tmp_path / members[0], edits=edits)
        ends |= dict(zip(members, phi, strict=True))
    learnt = {}
    for method, config in named.items():
        alone = bench.train(config, tmp_path / "alone" / method, edits=edits).phi[0]
        learnt[method] = float((alone - bench.start[0]).norm())
        assert float((ends[method] - alone).norm()) <= 1e-3 * learnt[method]
    for one, other in combinations(named, 2):
        assert float((ends[one] - ends[other]).norm()) > 0.05 * learnt[one]


# Interruptions


class LostError(Exception):
    """The exception that interrupts a pack."""


def test_a_pack_goes_on_from_its_checkpoints_even_where_one_is_ahead(bench: Bench, tmp_path: Path) -> None:
    configs = rounds()[:3]
    expected, curves = together(bench, configs, tmp_path / "undisturbed")

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 4:
            raise LostError

    with pytest.raises(LostError):
        together(bench, configs, tmp_path / "lost", post=stop, checkpoint_every=2)
    round_runs = [RoundRun(configs[1], (Store(tmp_path / "lost"), "partial/1"))]
    context = bench.context(Placement(checkpoint_every=1))
    material = Material(bench.edits)
    with pytest.raises(LostError):  # only the second round gets one step further
        train_together(round_runs, material, bench.loaded, context, lambda line: stop({"step": line["step"] - 1}))
    phi, found = together(bench, configs, tmp_path / "lost", checkpoint_every=2)
    torch.testing.assert_close(phi, expected, rtol=0, atol=1e-5)
    assert [[c["step"] for c in own] for own in found] == [[c["step"] for c in own] for own in curves]


def test_adapters_with_unequal_rows_are_evened_with_blank_ones() -> None:
    short, long = Triplet([5, 6, 7, 8], [9, END], [10, END]), Triplet([5], [9] * 20, [10] * 20)
    packed, plain = pack([short, short, short, long], adapters=2)
    for rows in (packed, plain):
        assert len(rows.input_ids) % 2 == 0
        half = len(rows.input_ids) // 2
        own = rows.keep.nonzero()[:, 0][rows.index] >= half  # is each answer token predicted in the second's rows?
        assert ((rows.answer % 4 >= 2) == own).all()
