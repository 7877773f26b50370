"""Sharding changes only memory: two gloo workers compared with one process without DeepSpeed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
from sharded import CASES, asked
from sharded import bench as made_on
from tiny import CPU, ROUNDS, Bench, Trained, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM
from worker_processes import two_workers

from corsa.config import ModelConfig, Placement, ShardingConfig
from corsa.errors import CorsaError
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Planner
from corsa.models.activation_checkpointing import recompute_activations
from corsa.models.loading import load_model
from corsa.training.worker_group import WorkerGroup

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(600)]

TOLERANCE = 1e-5
LARGE = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16}
"""A llama of 162 MiB: large enough for a whole copy of it to show in a worker's memory."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("sharding")
    tiny_model().save_pretrained(found / "base")
    shape = AutoConfig.for_model("llama", **LARGE, num_attention_heads=8, num_key_value_heads=8, head_dim=64)
    AutoModelForCausalLM.from_config(shape).save_pretrained(found / "large")
    return found


@pytest.fixture(scope="module")
def group(folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two workers of a gloo group, started before they are needed."""
    # Matrices of a real model are mapped one by one and unmapped when they go; glibc keeps smaller ones in a heap full
    # of holes, which would be measured instead of what is held.
    with two_workers(sharded, folder, MALLOC_MMAP_THRESHOLD_=str(1 << 17)) as workers:
        yield workers


@pytest.fixture(scope="module")
def found(group: list[subprocess.Popen[str]], folder: Path) -> list[dict[str, Any]]:
    """The final state of each of the two workers."""
    for worker in group:
        said = worker.communicate(timeout=500)[0]
        assert worker.returncode == 0, said
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def bench(folder: Path, group: list[subprocess.Popen[str]]) -> Bench:
    """The same base, whole, on one process."""
    return made_on(folder, WorkerGroup(0, 1, CPU))


@pytest.fixture(scope="module")
def alone(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Trained]:
    """The result of the round on one process, by micro-batch size."""
    folder = tmp_path_factory.mktemp("alone")
    return {size: bench.train(ROUNDS["corsa"], folder / str(size), micro_batch=size) for size in (1, 16)}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


# The same adapter


@pytest.mark.parametrize(("stage", "again", "size"), CASES)
def test_every_stage_ends_with_the_adapter_of_one_process(
    stage: int, again: bool, size: int, found: list[dict[str, Any]], alone: dict[int, Trained], bench: Bench
) -> None:
    """With and without activation checkpointing, in one micro-batch and in several, unequal among workers."""
    phi = found[0][f"{stage} {again} {size}"]
    assert distance(phi, alone[size].phi) <= TOLERANCE
    assert distance(phi, bench.start) > 30 * TOLERANCE, "nothing was learnt, so nothing was compared"
    assert torch.equal(phi, found[1][f"{stage} {again} {size}"])


def test_the_compared_round_has_conflicts(alone: dict[int, Trained]) -> None:
    assert sum(row["conflict"] for row in alone[16].curves) >= 3
    assert not all(row["conflict"] for row in alone[16].curves)


def test_a_worker_without_edits_takes_part(found: list[dict[str, Any]], bench: Bench, tmp_path: Path) -> None:
    name = "fewer edits than workers"
    assert distance(found[0][name], bench.train(ROUNDS[name], tmp_path).phi) <= TOLERANCE


def test_a_worker_without_a_perturbation_takes_part(found: list[dict[str, Any]], bench: Bench, tmp_path: Path) -> None:
    """AdamW makes a full step even of a gradient that is only rounding: one element of 4096 here."""
    name = "one perturbation per two edits"
    apart = (found[0][name] - bench.train(ROUNDS[name], tmp_path).phi).abs()
    assert (apart > TOLERANCE).float().mean() <= 1e-3
    assert apart.max() < ROUNDS[name].training.learning_rate


def test_offloaded_shards_end_with_the_same_adapter(found: list[dict[str, Any]], alone: dict[int, Trained]) -> None:
    assert distance(found[0]["offloaded"], alone[16].phi) <= TOLERANCE


def relative(a: torch.Tensor, b: torch.Tensor, start: torch.Tensor) -> float:
    """The distance between two results, relative to the distance from the start."""
    return float((a - b).norm() / (b - start).norm())


def test_a_bfloat16_base_ends_as_near_as_its_rounding_allows(
    found: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    """Stages 1 and 2 change only the rounding of AdamW's own kernel. Stage 3 sums the same gradients in another order
    (DeepSpeed's hooks); in bfloat16 this has the same effect as another micro-batch size.
    """
    base = made_on(folder, WorkerGroup(0, 1, CPU), "bfloat16")
    one = {size: base.train(ROUNDS["corsa"], tmp_path / str(size), micro_batch=size).phi for size in (1, 16)}
    noise = relative(one[1], one[16], base.start)
    assert noise < 0.1
    for size in (1, 16):
        phis = {stage: found[0][f"bfloat16 {stage} {size}"] for stage in range(4)}
        assert distance(phis[1], phis[0]) <= TOLERANCE
        assert distance(phis[2], phis[0]) <= TOLERANCE
        assert relative(phis[0], one[size], base.start) <= 2 * noise
        assert relative(phis[3], one[size], base.start) <= 2 * noise


def test_a_bfloat16_base_is_perturbed_as_was_meant(found: list[dict[str, Any]]) -> None:
    for worker in found:
        for stage in range(4):
            assert worker[f"dtypes {stage}"] == (torch.bfloat16, torch.float32)
            assert len(worker[f"cosines {stage}"]) == 2 * 6  # two rounds of six steps
            assert min(worker[f"cosines {stage}"]) > 0.9999


def test_phi_in_float32_takes_a_perturbation_of_the_size_it_has_at_8b() -> None:
    """Elements of 0.05 / sqrt(87 million parameters) on factors of 1 / sqrt(4096): bfloat16 would lose nine tenths."""
    generator = torch.Generator().manual_seed(0)
    phi = (torch.rand(10**6, generator=generator) * 2 - 1) / 4096**0.5
    e = torch.randn(10**6, generator=generator) * 0.05 / 87e6**0.5

    def cosine(dtype: torch.dtype) -> float:
        applied = (phi.to(dtype) + e.to(dtype)).double() - phi.to(dtype).double()
        return float(torch.cosine_similarity(applied, e.double(), dim=0))

    assert cosine(torch.float32) > 0.9999
    assert cosine(torch.bfloat16) < 0.5


# Evaluation


def test_workers_with_unequal_shares_answer_under_stage_3(found: list[dict[str, Any]], bench: Bench) -> None:
    """One worker asks all questions, the other none; also with an adapter attached by hooks."""
    expected = asked(bench, slice(0, 4))
    for name in ("plain", "attached"):
        assert found[0]["asked"][name] == expected[name]
        assert found[0]["asked"][f"{name} logp"].numpy() == pytest.approx(expected[f"{name} logp"].numpy(), rel=1e-5)
        assert found[1]["asked"][name] == []
    assert not torch.equal(expected["plain logp"], expected["attached logp"])


# Checkpoints


def test_a_round_goes_on_from_sharded_state(
    found: list[dict[str, Any]], alone: dict[int, Trained], bench: Bench, folder: Path
) -> None:
    """Resumes on the workers that wrote it, and on one process without DeepSpeed."""
    assert torch.equal(found[0]["resumed"], found[0]["3 False 16"])
    steps: list[int] = []
    resumed = bench.train(ROUNDS["corsa"], folder / "left", post=lambda line: steps.append(line["step"]))
    assert steps == [5, 6]
    assert distance(resumed.phi, alone[16].phi) <= TOLERANCE


def test_a_checkpoint_holds_the_adapter_and_its_optimizer_alone(folder: Path, bench: Bench) -> None:
    size = (folder / "3False16" / "partial" / "x").stat().st_size
    phi = 4 * bench.start.numel()
    assert 3 * phi < size < 3 * phi + 10_000  # phi and two moments; the base would be four times as large


# Memory and gathering


@pytest.mark.parametrize("again", [False, True])
def test_a_base_at_rest_is_in_shards(again: bool, found: list[dict[str, Any]]) -> None:
    for worker in found:
        held = worker[f"resident {again}"]
        assert held["shards"] == held["all"] // 2
        assert held["whole"] == held["vectors"] < held["all"] / 100


@pytest.mark.parametrize("source", ["saved", "random"])
def test_a_base_is_never_whole_on_a_worker_while_it_is_loaded(
    source: str, found: list[dict[str, Any]], folder: Path
) -> None:
    name = str(folder / "large") if source == "saved" else f"random:{folder / 'large'}"
    whole = load_model(ModelConfig(name=name))
    for worker in found:
        peak, held, _ = worker[source]
        mebibytes = held["all"] * 4 / 2**20
        assert held["all"] == sum(p.numel() for p in whole.parameters())
        assert peak < 0.65 * mebibytes, f"{peak:.0f} MiB at most, of {mebibytes:.0f} MiB"
    total = float(sum(p.double().sum() for p in whole.parameters()))  # type: ignore[misc]
    assert sum(worker[source][2] for worker in found) == pytest.approx(total, rel=1e-9)


def test_the_base_is_gathered_at_most_four_times_a_step(found: list[dict[str, Any]]) -> None:
    """Gathers forward and backward, at phi and at phi + e. Recomputation uses what the layer's backward gathered."""
    for again, most in ((False, 4), (True, 6)):
        counts = found[0][f"counts {again}"]
        assert len(counts) == 6
        assert min(counts) > 1
        assert max(counts) <= most, counts


def test_saving_an_adapter_gathers_nothing(found: list[dict[str, Any]], folder: Path) -> None:
    assert found[0]["gathers of saving"] == 0
    assert (folder / "adapter0" / "adapter_model.safetensors").is_file()


# Refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"offload_parameters": True, "zero_stage": 2}, "stage 2 does not shard that: set zero_stage 3"),
        ({"offload_optimizer": True}, "stage 0 does not shard it: set zero_stage 1, 2 or 3"),
        ({"zero_stage": 4}, "less than or equal to 3"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ShardingConfig(**settings)


def test_memit_is_refused_under_stage_3_before_anything_starts() -> None:
    def planned(stage: int) -> Any:
        placement = Placement(sharding=ShardingConfig(zero_stage=stage))
        experiment = Experiment(model=ModelConfig(name="random:tiny-llama"), limit=2, placement=placement)
        planner = Planner.of(experiment, "")
        taught = planner.facts()
        return planner.round("memit", 0, taught, planner.schedule(taught))

    assert planned(2).name == "world_facts/memit/seed0/round1"
    with pytest.raises(CorsaError, match="no worker has them whole: leave memit out of --methods"):
        planned(3)


def test_how_a_step_is_sharded_is_no_part_of_its_identity() -> None:
    def step(sharding: ShardingConfig) -> Any:
        placement = Placement(sharding=sharding)
        experiment = Experiment(model=ModelConfig(name="random:tiny-llama"), limit=2, placement=placement)
        planner = Planner.of(experiment, "")
        taught = planner.facts()
        return planner.round("corsa", 0, taught, planner.schedule(taught))

    sharded_step = step(ShardingConfig(zero_stage=3, activation_checkpointing=True))
    assert sharded_step.fingerprint == step(ShardingConfig()).fingerprint


def test_deepspeed_is_imported_only_for_a_stage_above_0() -> None:
    code = "import sys, corsa.training.rounds, corsa.training.reference; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_activations_are_recomputed_only_where_a_gradient_is_wanted() -> None:
    model = tiny_model()
    recompute_activations(model)
    ids = torch.tensor([[5, 6, 7]])
    layer = model.model.layers[0]  # type: ignore[union-attr, index]
    calls: list[bool] = []
    layer.input_layernorm.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with torch.no_grad():
        assert model(input_ids=ids, use_cache=True).past_key_values.get_seq_length() == 3
    assert calls == [False]
    states = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=states, use_cache=False).logits.sum().backward()
    assert calls == [False, True, True]  # forward, and again in the backward pass
