"""AlphaEdit: what the null space preserves, its settings, and the keys that its rounds hand on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from one_worker import MODEL, taken
from safetensors.torch import load_file
from tiny import tiny_model
from torch import Tensor
from transformers import AutoConfig

from corsa.config import AlphaEditConfig, Placement, ShardingConfig
from corsa.errors import CorsaError
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Facts, Planner
from corsa.flow import Step, Store
from corsa.lora.weight_deltas import load_delta
from corsa.methods import METHODS
from corsa.methods.alphaedit.null_space import alphaedit, null_space, projected_form
from corsa.methods.alphaedit.settings import settings_for
from corsa.methods.base import STATE
from corsa.methods.memit.algorithm import closed_form
from corsa.methods.memit.key_statistics import KeyStatistics
from corsa.models.loading import load_model
from corsa.models.registry import pin

pytestmark = pytest.mark.usefixtures("one_thread")

INPUTS, OUTPUTS, PRESERVED = 24, 6, 10


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def preserved_keys() -> Tensor:
    """Keys (inputs, tokens) that have only some of the directions."""
    return random(INPUTS, PRESERVED, seed=1) @ random(PRESERVED, 200, seed=2)


def basis() -> Tensor:
    keys = preserved_keys()
    return null_space(keys @ keys.mT / keys.shape[1], 1e-6)


def test_a_change_has_no_effect_on_the_preserved_keys() -> None:
    assert basis().shape == (INPUTS, INPUTS - PRESERVED)
    keys, residuals = random(INPUTS, 3, seed=3), random(OUTPUTS, 3, seed=4)
    delta = projected_form(basis(), keys[:, :0], keys, residuals, 1e-3)
    assert (delta @ preserved_keys()).norm() < 1e-9 * preserved_keys().norm()
    assert (delta @ keys - residuals).norm() < 0.01 * residuals.norm()
    free = closed_form(1e-3 * torch.eye(INPUTS, dtype=torch.float64), keys, residuals)
    assert (free @ preserved_keys()).norm() > 0.1 * preserved_keys().norm(), "without the projection it has one"


def test_a_change_has_little_effect_on_the_keys_of_earlier_edits() -> None:
    keys, residuals, before = random(INPUTS, 3, seed=3), random(OUTPUTS, 3, seed=4), random(INPUTS, 4, seed=5)
    alone = projected_form(basis(), keys[:, :0], keys, residuals, 1e-3)
    delta = projected_form(basis(), before, keys, residuals, 1e-3)
    assert (delta @ before).norm() < 0.02 * (alone @ before).norm()
    assert (delta @ keys - residuals).norm() < 0.02 * residuals.norm()


def test_it_minimises_the_objective_of_the_paper() -> None:
    """|Delta K - R|^2 + |Delta K_p|^2 + L2 |Delta|^2 over changes Delta = D P (Eq. 12 and 13)."""
    keys, residuals, before = random(INPUTS, 3, seed=3), random(OUTPUTS, 3, seed=4), random(INPUTS, 4, seed=5)
    p = basis() @ basis().mT
    d = projected_form(basis(), before, keys, residuals, 0.7).requires_grad_()
    change = d @ p
    assert (change - d).norm() < 1e-9 * d.norm()
    cost = (change @ keys - residuals).square().sum() + (change @ before).square().sum() + 0.7 * change.square().sum()
    (slope,) = torch.autograd.grad(cost, d)
    assert slope.norm() < 1e-8 * residuals.norm()


def architecture(family: str, depth: int) -> Any:
    return AutoConfig.for_model(family, num_hidden_layers=depth, layer_types=None)


def test_settings_are_the_published_ones_of_the_family() -> None:
    """EasyEdit, hparams/AlphaEdit/llama3-8b.yaml and qwen2.5-7b.yaml."""
    for family, depth, l2, rate, decay, clamp in (("llama", 32, 10, 0.1, 0.5, 0.75), ("qwen2", 28, 1, 0.5, 1e-3, 4)):
        found = settings_for(architecture(family, depth), AlphaEditConfig())
        assert (found.layers, found.threshold) == ((4, 5, 6, 7, 8), 0.02)
        assert (found.l2, found.learning_rate, found.weight_decay, found.clamp_norm_factor) == (l2, rate, decay, clamp)
        assert (found.gradient_steps, found.kl_factor) == (25, 0.0625)
    assert settings_for(architecture("qwen3", 36), AlphaEditConfig()).l2 == 1.0
    chosen = settings_for(architecture("llama", 32), AlphaEditConfig(threshold=0.5, l2=3.0, clamp_norm_factor=2.0))
    assert (chosen.threshold, chosen.l2, chosen.clamp_norm_factor, chosen.learning_rate) == (0.5, 3.0, 2.0, 0.1)


def test_a_layer_without_null_space_is_refused() -> None:
    model = tiny_model("llama", 1024, num_hidden_layers=4)
    found = KeyStatistics.empty(model, (1,))
    found.add(model, [torch.randint(10, 1000, (12,)).tolist() for _ in range(40)])
    settings = settings_for(model.config, AlphaEditConfig(layers=(1,), threshold=1e-30))
    with pytest.raises(CorsaError, match=r"layer 1 is below 1e-30, .* raise --alphaedit.threshold"):
        alphaedit(model, None, [], found, {}, settings, seed=0)  # pyright: ignore[reportArgumentType]


# Rounds

SETTINGS: dict[str, Any] = {"layers": (0, 1), "gradient_steps": 4, "prefixes": 1, "prefix_tokens": 2}


def chains(planner: Planner[Experiment], taught: Facts, schedule: Step) -> list[Step]:
    """Two rounds, and the second one without the first."""
    rounds = planner.chain("alphaedit", 0, taught, schedule, rounds=(1, 2))
    return [*rounds, planner.round("alphaedit", 0, taught, schedule, number=2)]


def statistics(store: Store, steps: Sequence[Step]) -> None:
    """Commit the key statistics, of random texts."""
    (step,) = {step.inputs["statistics"].fingerprint: step.inputs["statistics"] for step in steps}.values()
    model = load_model(pin(MODEL), torch.device("cpu"))
    found = KeyStatistics.empty(model, (0, 1))
    found.add(model, torch.randint(10, 1000, (40, 12), generator=torch.Generator().manual_seed(1)).tolist())
    output = store.workspace(step)
    found.save(output / "statistics.safetensors")
    store.commit(step, output, {"tokens": found.tokens, "corpus": "random"}, 0.0)


def test_a_round_hands_the_keys_of_all_edits_to_the_next(tmp_path: Path) -> None:
    settings = AlphaEditConfig(**SETTINGS, threshold=1e9, l2=1e-3)
    store, steps, failed = taken(tmp_path, chains, prepare=statistics, alphaedit=settings)
    assert failed == {}
    first, second, alone = (store.artifact(step.fingerprint) for step in steps)
    keys = [load_file(found.local(STATE)) for found in (first, second, alone)]
    edits = [found.metrics["edits"] for found in (first, second, alone)]
    assert edits[1] == edits[2] > 0
    for layer in ("0", "1"):
        assert [found[layer].shape[1] for found in keys] == [edits[0], edits[0] + edits[1], edits[2]]
        assert torch.equal(keys[1][layer][:, : edits[0]], keys[0][layer])
    assert second.metrics["free"] == 1.0
    changes = [load_delta(found.local("delta")) for found in (first, second, alone)]
    for name, change in changes[1].items():
        own = change - changes[0][name]
        assert own.norm() > 0
        assert (own - changes[2][name]).norm() > 1e-3 * own.norm(), "the second round knew nothing of the first"


def test_it_shares_the_key_statistics_with_memit() -> None:
    planner = Planner.of(Experiment(model=MODEL, limit=2), "")
    taught = planner.facts()
    of = {name: planner.round(name, 0, taught, planner.schedule(taught)).inputs for name in ("memit", "alphaedit")}
    assert of["memit"]["statistics"].fingerprint == of["alphaedit"]["statistics"].fingerprint


def test_it_is_refused_under_stage_3() -> None:
    placement = Placement(sharding=ShardingConfig(zero_stage=3))
    planner = Planner.of(Experiment(model=MODEL, limit=2, placement=placement), "")
    taught = planner.facts()
    with pytest.raises(CorsaError, match="no worker has them whole: leave alphaedit out of --methods"):
        planner.round("alphaedit", 0, taught, planner.schedule(taught))


def test_it_refuses_what_it_cannot_do() -> None:
    assert set(METHODS["alphaedit"].refuses) == {"adapter", "programs", "4 bits"}
