"""A base in 4 bits: how it is loaded, where it is refused, and what it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from corsa.config import LoraConfig, ModelConfig, Placement, ShardingConfig, StepConfig
from corsa.config.steps import RoundsConfig
from corsa.errors import CorsaError
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Planner
from corsa.lora.flat import linear_layers
from corsa.methods import METHODS
from corsa.models import four_bit, loading
from corsa.models.four_bit import bytes_in_4_bits, quantization, refuse_without_gpu
from corsa.models.registry import ARCHITECTURES
from corsa.models.shapes import skeleton
from corsa.planning.plan import Job, Plan, plan
from corsa.planning.rates import Rate
from corsa.planning.tables import tables

BASE = ModelConfig(name="HuggingFaceTB/SmolLM2-135M-Instruct", dtype="nf4")


def linear_weights(name: str) -> list[int]:
    return [layer.weight.numel() for _, layer in linear_layers(skeleton(ModelConfig(name=name)))]


def job(dtype: Any, workers: int = 1) -> Job:
    model = ModelConfig(name="random:tiny-llama", dtype=dtype)
    how: dict[str, Any] = {"edits": 100, "epochs": 1, "batch": 4 * workers, "micro_batch": 4, "gpu": True}
    how["workers"] = workers
    return Job(model=model, step=StepConfig(), lora=LoraConfig(rank=8), tokens=[(8, 4, 4)], **how)


def planned(dtype: Any, workers: int = 1) -> Plan:
    return plan(job(dtype, workers), Rate(100.0, 25.0, "assumed"), 24 << 30, None)


def test_a_matrix_takes_half_a_byte_a_weight_and_its_constants() -> None:
    assert bytes_in_4_bits(64 * 256) == 64 * 128 + 256 + 4
    assert bytes_in_4_bits(65) == 33 + 2 + 4


def test_the_linear_layers_of_a_model_are_counted_by_hand() -> None:
    shape = ARCHITECTURES["qwen3-8b"]
    hidden, inner, heads, keys = shape["hidden_size"], shape["intermediate_size"], 32, 8
    rows = [heads * 128, keys * 128, keys * 128]  # q, k, v
    layer = [*(hidden * n for n in rows), heads * 128 * hidden, *[hidden * inner] * 3]
    assert linear_weights("qwen3-8b") == layer * shape["num_hidden_layers"]
    # all are multiples of 64 * 256: 1/2 byte a weight, 1 byte per 64, 4 bytes per 64 * 256
    assert sum(map(bytes_in_4_bits, layer)) == sum(n // 2 + n // 64 + n // (64 * 256) * 4 for n in layer)


def test_the_plan_counts_the_base_in_4_bits() -> None:
    four, half = planned("nf4"), planned("bfloat16")
    (items, before), weights = (p.choices[0].holding.items for p in (four, half)), linear_weights("random:tiny-llama")
    rest = half.parameters - sum(weights)  # embeddings and norms, in bfloat16
    buffers = before["base"] - 2 * half.parameters
    assert 0 <= buffers < 1024
    assert (
        items["base"] == sum(-(-n // 2) + -(-n // 64) + 4 * -(-n // (64 * 256)) for n in weights) + 2 * rest + buffers
    )
    assert items["working"] - before["working"] == 2 * max(weights)
    assert {name for name in items if items[name] != before[name]} == {"base", "working", "allocator"}
    assert "unpack 4-bit weights, which was not measured" in str(list(tables(four, "corsa", "assumed"))[-1])


def test_no_plan_shards_a_base_in_4_bits() -> None:
    assert {c.holding.sharding.zero_stage for c in planned("nf4", workers=2).choices} == {0, 1, 2}


def test_transformers_is_given_nf4_blocks_that_compute_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Loaded(torch.nn.Module):
        def to(self, *args: Any) -> Any:
            raise AssertionError("weights in 4 bits are loaded on their device, and not moved")

    def load(place: Any, **options: Any) -> Loaded:
        given.update(options)
        return Loaded()

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(loading, "read_architecture", lambda place, revision: None)
    monkeypatch.setattr(four_bit, "find_spec", lambda name: object())
    loading.load_model(BASE, "cuda")
    found = given["quantization_config"].to_dict()
    assert {name: found[name] for name in ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")} == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    assert given["quantization_config"].bnb_4bit_compute_dtype == given["dtype"] == torch.bfloat16
    assert given["device_map"] == {"": torch.device("cuda")}
    assert quantization().quantization_method() == "nf4"
    given.clear()
    with pytest.raises(AssertionError, match="not moved"):
        loading.load_model(ModelConfig(name=BASE.name), "cpu")
    assert "quantization_config" not in given


@pytest.mark.parametrize(
    ("device", "how", "message"),
    [
        ("cpu", {}, "holds the base in 4 bits on a GPU, and this model is loaded on the cpu: .* --dtype bfloat16"),
        ("cuda", {}, r"needs bitsandbytes: pip install 'corsa\[four-bit\]'"),
        ("cuda", {"sharded": True}, "is not sharded among workers"),
        ("cuda", {"random": True}, "a random: model has none"),
    ],
)
def test_where_a_base_cannot_be_held_in_4_bits(
    monkeypatch: pytest.MonkeyPatch, device: str, how: dict[str, bool], message: str
) -> None:
    monkeypatch.setattr(four_bit, "find_spec", lambda name: object() if how else None)
    with pytest.raises(CorsaError, match=message) as refused:
        refuse_without_gpu(device, **how)
    assert "\n" not in str(refused.value)


def experiment(**placement: Any) -> Experiment:
    return Experiment(model=BASE.model_copy(update={"name": "qwen3-8b"}), placement=Placement(**placement))


def test_a_run_without_gpus_or_with_a_sharded_base_is_refused_when_it_is_planned() -> None:
    with pytest.raises(CorsaError, match=r"--dtype nf4 holds the base in 4 bits on a GPU: add --placement\.gpu"):
        Planner.of(experiment(), "")
    with pytest.raises(CorsaError, match=r"leave --sharding\.zero-stage 3 out"):
        Planner.of(experiment(gpu=True, sharding=ShardingConfig(zero_stage=3)), "")


def test_methods_that_write_into_weights_refuse_a_base_in_4_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner.of(experiment(gpu=True), "")
    taught = planner.facts()
    schedule = planner.schedule(taught, RoundsConfig(rounds=1))
    refused = {name for name, method in METHODS.items() if "4 bits" in method.refuses}
    assert refused == {"memit", "alphaedit", "locft"}
    for name in refused:
        with pytest.raises(CorsaError, match=f"{name} cannot edit a base in 4 bits: it writes into weights"):
            planner.round(name, 0, taught, schedule)
    assert planner.round("corsa", 0, taught, schedule).config.canonical()["model"]["dtype"] == "nf4"
