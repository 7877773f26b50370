"""LocFT-BF: one matrix trained as a plain loop of torch and transformers trains it; its rounds and its layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from one_worker import taken
from tiny import EDITS, Bench, round_config, tiny_model, triplets
from transformers import AutoConfig, get_linear_schedule_with_warmup

from corsa.config import STEPS, LocFtConfig, StepConfig
from corsa.errors import CorsaError
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Facts, Planner
from corsa.flow import Step
from corsa.lora.weight_deltas import load_delta
from corsa.methods import METHODS
from corsa.methods.locft import LocFtRoundConfig
from corsa.methods.locft.teach import layer_for, teach
from corsa.training.tokens import batch_order

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(triplets(EDITS))


def config_of(**training: Any) -> LocFtRoundConfig:
    plain = dict(round_config(first_rate="zero", learning_rate=5e-3, epochs=8, **training))
    plain |= {"step": STEPS["lora"](StepConfig())}
    return LocFtRoundConfig(**plain, locft=LocFtConfig(layer=1))


def literal(bench: Bench, config: LocFtRoundConfig, start: torch.Tensor | None = None) -> torch.Tensor:
    """Fine-tunes the weight of an equal model on the loss of transformers, one edit a forward pass."""
    training = config.training
    model: Any = tiny_model()
    weight: torch.Tensor = model.get_submodule(NAME).weight.requires_grad_()
    if start is not None:
        weight.data += start
    before = weight.detach().clone()
    adam = torch.optim.Adam([weight], lr=training.learning_rate)
    per_epoch = -(-len(bench.edits) // training.batch)
    schedule = get_linear_schedule_with_warmup(adam, training.warmup, per_epoch * training.epochs)
    for epoch in range(training.epochs):
        for chosen in batch_order(len(bench.edits), training.batch, seed=config.seed, round_=config.round, epoch=epoch):
            edits = [bench.edits[i] for i in chosen]
            tokens = sum(len(edit.new) for edit in edits)
            adam.zero_grad()
            for edit in edits:
                ids = torch.tensor([[*edit.prompt, *edit.new]])
                labels = torch.tensor([[*[-100] * len(edit.prompt), *edit.new]])
                (model(input_ids=ids, labels=labels).loss * len(edit.new) / tokens).backward()
            torch.nn.utils.clip_grad_norm_([weight], training.clip)
            adam.step()
            schedule.step()
    return weight.detach() - before


def mean_loss(curves: list[dict[str, Any]], epoch: int) -> float:
    losses = [row["loss_sft"] for row in curves if row["epoch"] == epoch]
    return sum(losses) / len(losses)


def test_it_is_plain_fine_tuning_of_one_matrix(bench: Bench, tmp_path: Path) -> None:
    config = config_of()
    found = bench.teach(teach, config, tmp_path / "1")
    assert list(found.change) == [NAME]
    first, expected = found.change[NAME], literal(bench, config)
    assert isinstance(first, torch.Tensor)
    assert first.shape == expected.shape
    assert (first - expected).abs().max() <= 1e-5
    assert expected.abs().max() > 5e-3, "nothing was learnt, so nothing was compared"
    assert torch.linalg.matrix_rank(first) > 8, "no adapter of a small rank"
    assert found.curves is not None
    assert mean_loss(found.curves, 8) < mean_loss(found.curves, 1) - 0.3
    # a second round goes on from the first, with a new optimizer
    second = bench.teach(teach, config, tmp_path / "2", found.change)
    whole = second.change[NAME]
    assert isinstance(whole, torch.Tensor)
    assert (whole - first - literal(bench, config, first)).abs().max() <= 1e-5
    assert second.curves is not None
    assert mean_loss(second.curves, 1) < mean_loss(found.curves, 1) - 0.3


def test_an_interrupted_round_goes_on_from_its_checkpoint(bench: Bench, tmp_path: Path) -> None:
    once = bench.teach(teach, config_of(), tmp_path)
    again = bench.teach(teach, config_of(), tmp_path)  # the checkpoint is at the end
    assert torch.equal(once.change[NAME], again.change[NAME])  # pyright: ignore[reportArgumentType]
    assert once.curves == again.curves


def architecture(family: str, depth: int) -> Any:
    return AutoConfig.for_model(family, num_hidden_layers=depth, layer_types=None)


def test_the_layer_is_the_published_one_or_at_the_same_share_of_the_depth() -> None:
    """ICT-STAR/LocFT, hparams: llama3-8b.yaml and qwen2.5-7b.yaml."""
    assert layer_for(architecture("llama", 32), None) == (22, "Llama-3-8B, llama3-8b.yaml")
    assert layer_for(architecture("qwen2", 28), None) == (6, "Qwen2.5-7B, qwen2.5-7b.yaml")
    assert layer_for(architecture("llama", 30), None) == (21, "Llama-3-8B, llama3-8b.yaml, scaled to 30 layers")
    assert layer_for(architecture("qwen3", 36), None)[0] == 8
    assert layer_for(architecture("llama", 2), None)[0] == 1
    assert layer_for(architecture("llama", 32), 3) == (3, "as configured")
    with pytest.raises(CorsaError, match=r"--locft.layer 32 does not exist: the model has layers 0 to 31"):
        layer_for(architecture("llama", 32), 32)


def chains(planner: Planner[Experiment], taught: Facts, schedule: Step) -> list[Step]:
    return planner.chain("locft", 0, taught, schedule, rounds=(1, 2))


def test_rounds_leave_a_delta_and_answers(tmp_path: Path) -> None:
    store, steps, failed = taken(tmp_path, chains)
    assert failed == {}
    first, second = (store.artifact(step.fingerprint) for step in steps)
    assert first.metrics["module"] == NAME
    assert first.metrics["steps"] == first.metrics["steps_planned"] > 1
    changes = [load_delta(found.local("delta"))[NAME] for found in (first, second)]
    assert (changes[1] - changes[0]).norm() > 0.01 * changes[0].norm()
    assert second.local("predictions.parquet").exists()


def test_its_identity_depends_on_its_own_rate_and_on_nothing_of_lora() -> None:
    def fingerprint(**settings: Any) -> str:
        experiment = Experiment.model_validate({"model": "random:tiny-llama", "limit": 2, **settings})
        planner = Planner.of(experiment, "")
        taught = planner.facts()
        return planner.round("locft", 0, taught, planner.schedule(taught)).fingerprint

    assert fingerprint() == fingerprint(lora={"rank": 3}) == fingerprint(training={"learning_rate": 1.0})
    assert len({fingerprint(), fingerprint(locft={"learning_rate": 1e-3}), fingerprint(locft={"layer": 0})}) == 3


def test_it_refuses_what_it_cannot_do() -> None:
    assert set(METHODS["locft"].refuses) == {"adapter", "programs", "4 bits"}
