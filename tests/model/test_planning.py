"""The plan of a run: the rehearsed step against the real step, byte for byte, and the arithmetic of the settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from synthetic_run import predictions
from tiny import FAMILIES, LORA, tiny_model, triplets
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from corsa.algorithm.batch import Batch, MicroBatch, counts
from corsa.algorithm.objectives import losses
from corsa.algorithm.packing import Triplet, pack
from corsa.algorithm.row_settings import RowSettings
from corsa.cli.main import main
from corsa.config import STEPS, LoraConfig, ModelConfig, ShardingConfig, StepConfig
from corsa.config.amounts import as_bytes
from corsa.errors import CorsaError
from corsa.evaluation.metrics import compute
from corsa.lora.flat import Lora
from corsa.models.activation_checkpointing import recompute_activations
from corsa.models.shapes import architecture
from corsa.planning import plan as planning
from corsa.planning.memory import hold, settings
from corsa.planning.plan import Job, Plan, plan
from corsa.planning.rates import Rate
from corsa.planning.rehearsal import Footprint, observed, peaks, rehearse
from corsa.planning.tables import tables

pytestmark = pytest.mark.usefixtures("one_thread")

EDITS = triplets(6, long=[2])  # packed rows and plain ones
RATE = Rate(tflops=1.0, link=10.0, source="stated: a test")


def rehearsed(
    family: str, method: str, *, checkpointing: bool = False, dtype: torch.dtype = torch.float32
) -> Footprint:
    step = STEPS[method](StepConfig())
    return rehearse(tiny_model(family).config, dtype, LORA, step, EDITS, checkpointing=checkpointing)


CASES = [*((family, "corsa", False) for family in FAMILIES), ("llama", "corsa", True), ("qwen3", "lora", False)]


@pytest.mark.parametrize(("family", "method", "checkpointing"), CASES)
def test_a_rehearsed_step_holds_what_a_real_one_holds(family: str, method: str, checkpointing: bool) -> None:
    """Every item at the peak, in bytes, of a step on real tensors, and its arithmetic."""
    model = tiny_model(family)
    if checkpointing:
        recompute_activations(model)
    ledger = observed(model, Lora(model, LORA), pack(EDITS), EDITS, STEPS[method](StepConfig()))
    found = rehearsed(family, method, checkpointing=checkpointing)
    assert tuple(found.items.values()) == max(peaks(ledger), key=sum)
    assert found.flops == ledger.flops
    assert found.saved == ledger.saved
    assert found.kept == {kind: tuple(bytes_) for kind, bytes_ in ledger.kept.items()}
    assert sum(bytes_ for bytes_, _ in found.kept.values()) == found.saved


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_tensors_are_counted_exactly(family: str) -> None:
    """Compared with torch's hooks on a real forward pass: every storage counts once, existing tensors not at all."""
    model = tiny_model(family)
    lora = Lora(model, LORA)
    part = MicroBatch(pack(EDITS), torch.zeros(2, len(EDITS)))
    batch = Batch([part], len(EDITS), counts([EDITS], "cpu"))
    held = [*model.parameters(), *model.buffers(), lora.phi, batch.counts[0].tokens]
    there = {t.untyped_storage().data_ptr() for t in held}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in there:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is reused
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        losses(model, part, batch, RowSettings.of([STEPS["lora"](StepConfig())], "cpu"))
    assert rehearsed(family, "lora").saved == sum(t.untyped_storage().nbytes() for t in saved.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_gradients_and_state_are_counted_exactly(family: str) -> None:
    model = tiny_model(family)
    lora = Lora(model, LORA)
    found = rehearsed(family, "lora")
    own = [*model.parameters(), *model.buffers()]
    optimizer = torch.optim.AdamW([lora.phi])
    lora.phi.grad = torch.zeros_like(lora.phi)
    optimizer.step()
    assert found.items["base"] == sum({t.data_ptr(): t.untyped_storage().nbytes() for t in own}.values())
    assert found.items["lora"] == lora.phi.nbytes
    assert found.items["optimizer"] == sum(t.nbytes for t in optimizer.state[lora.phi].values())
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.trained == lora.phi.numel()


def test_two_gradients_in_one_backward_pass_take_more_than_one() -> None:
    """`is_grads_batched`: the gradients in the layers exist twice, at phi and at phi + e."""
    one, two = rehearsed("llama", "lora"), rehearsed("llama", "corsa")
    assert two.items["gradients"] == 4 * two.items["lora"]
    assert two.items["logits"] > 1.5 * one.items["logits"]  # the gradient of the logits, for each objective
    assert two.items["sam"] == two.items["lora"]
    assert one.items["sam"] == 0
    assert 2.9 < two.flops / one.flops < 3.1  # 2 x (forward + two backward) against forward + backward


def test_a_bfloat16_base_is_half_and_lora_remains_float32() -> None:
    half, whole = rehearsed("qwen3", "corsa", dtype=torch.bfloat16), rehearsed("qwen3", "corsa")
    assert half.items["lora"] == whole.items["lora"]
    assert half.items["base"] == pytest.approx(whole.items["base"] / 2, rel=0.01)
    assert whole.items["activations"] / 2 < half.items["activations"] < whole.items["activations"]


def test_layers_of_a_bfloat16_base_keep_little_more_than_they_must() -> None:
    """By arithmetic from the shapes: the inputs of norms and of linear layers, what the products of the MLP need, and
    the narrow float32 products of LoRA.
    """
    edits = triplets(6)
    found = rehearse(tiny_model("qwen3").config, torch.bfloat16, LORA, StepConfig(), edits)
    shape = tiny_model("qwen3").config
    tokens = pack(edits)[0].input_ids.numel()
    heads = shape.head_dim * (shape.num_attention_heads + shape.num_key_value_heads)
    layers, hidden, inner = shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size
    # the last norm is one more, and the first has no gradient: the embeddings are frozen
    assert found.kept["norms"] == (2 * tokens * layers * (2 * hidden + heads),) * 2
    assert found.kept["MLP"] == (2 * tokens * layers * 3 * inner,) * 2
    bytes_, least = found.kept["LoRA"]
    narrow = tokens * layers * 7 * LORA.rank
    assert bytes_ - least == 2 * narrow  # float32 instead of bfloat16
    attention = shape.head_dim * shape.num_attention_heads
    assert least - 2 * narrow <= 2 * tokens * layers * (2 * hidden + attention + inner)


@pytest.mark.long
@pytest.mark.parametrize(("family", "checkpointing"), [("qwen3", False), ("gemma", True)])
def test_a_deep_model_is_continued_from_two_shallow_ones_exactly(family: str, checkpointing: bool) -> None:
    """Gemma's layers alternate between two kinds."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 5 + ["sliding_attention"], "sliding_window": 6}
    model = tiny_model(family, num_hidden_layers=11, **(kinds if family == "gemma" else {}))
    if checkpointing:
        recompute_activations(model)
    ledger = observed(model, Lora(model, LORA), pack(EDITS), EDITS, StepConfig())
    found = rehearse(model.config, torch.float32, LORA, StepConfig(), EDITS, checkpointing=checkpointing)
    assert tuple(found.items.values()) == max(peaks(ledger), key=sum)
    assert found.flops == ledger.flops


RESIDENT = """
import json, sys
import torch, transformers
from corsa.config import ModelConfig, StepConfig, LoraConfig
from corsa.algorithm.packing import Triplet, pack
from corsa.algorithm.batch import Batch, MicroBatch, counts
from corsa.algorithm.row_settings import RowSettings
from corsa.algorithm.step import corsa_step
from corsa.models.loading import load_model
from corsa.lora.flat import Lora

def resident(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024

torch.set_num_threads(1)
edits = [Triplet(range(100, 112), [1, 2, 3, 4], [5, 6, 7, 8])] * 8
before = resident("VmRSS")
model = load_model(ModelConfig())
lora = Lora(model, LoraConfig())
optimizer = torch.optim.AdamW([lora.phi], weight_decay=0.0)
batch = Batch([MicroBatch(pack(edits), torch.zeros(2, 8))], 8, counts([edits], "cpu"))
settings = RowSettings.of([StepConfig()], "cpu")
for _ in range(2):
    corsa_step(model, lora.phi, batch, settings, optimizer, 1.0, lambda tensor: tensor)
print(json.dumps(resident("VmHWM") - before))
"""


@pytest.mark.long
def test_resident_memory_of_the_embedded_model_is_within_15_percent(encoder: object) -> None:
    """A real training step in a separate process: its peak memory minus the resident memory before loading."""
    ran = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True, env=os.environ)
    measured = json.loads(ran.stdout.splitlines()[-1])
    edits = [Triplet(range(100, 112), [1, 2, 3, 4], [5, 6, 7, 8])] * 8
    shape = architecture(ModelConfig())
    footprint = rehearse(shape, torch.float32, LoraConfig(), StepConfig(), edits)
    planned = hold(footprint, ShardingConfig(), workers=1, gpu=False, element=4, passes=4).total
    assert planned == pytest.approx(measured, rel=0.15)


# Settings

GIB = 1 << 30
WHOLE = Footprint(
    items={"base": 28 * GIB, "lora": GIB, "optimizer": 2 * GIB, "sam": GIB, "gradients": 6 * GIB}
    | {"activations": 5 * GIB, "logits": GIB, "working": 0},
    saved=0,
    flops=10**12,
    parameters=14 * GIB,
    trained=GIB // 4,
    activations=5 * GIB,
    logits=GIB,
)


@pytest.mark.parametrize("sharding", list(settings(4, gpu=True)), ids=str)
def test_what_each_stage_shares_out(sharding: ShardingConfig) -> None:
    held = hold(WHOLE, sharding, workers=4, gpu=True, element=2, passes=4)
    items, stage = held.items, sharding.zero_stage
    state = 3 * GIB // 4  # two moments and a master copy; one of four workers' share
    assert items["optimizer"] == (2 * GIB if stage == 0 else 0 if sharding.offload_optimizer else state)
    assert items["base"] == (28 * GIB if stage < 3 else 0 if sharding.offload_parameters else 7 * GIB)
    assert (items["gathered"] > 0) == (stage == 3)
    assert held.host == 7 * GIB * sharding.offload_parameters + state * sharding.offload_optimizer
    assert held.gathers == (0 if stage < 3 else 4 * 28 * GIB if sharding.offload_parameters else 4 * 21 * GIB)
    for name in ("lora", "sam", "gradients", "activations", "logits"):
        assert items[name] == WHOLE.items[name]


def test_alone_nothing_is_shared_out_and_without_a_gpu_nothing_offloaded() -> None:
    assert list(settings(1, gpu=False)) == [ShardingConfig()]
    assert not any(s.offload_parameters or s.offload_optimizer for s in settings(2, gpu=False))
    assert {s.zero_stage for s in settings(2, gpu=False)} == {0, 1, 2, 3}


def planned(monkeypatch: pytest.MonkeyPatch, memory: int | None, workers: int = 4, host: int | None = None) -> Plan:
    """The plan of a model as large as `WHOLE`; checkpointing removes nearly all of its activations."""
    small = replace(WHOLE, items=WHOLE.items | {"activations": GIB // 2})
    monkeypatch.setattr(planning, "rehearse", lambda *args, checkpointing: small if checkpointing else WHOLE)
    model = ModelConfig(name="random:tiny-qwen3", dtype="bfloat16")
    job = Job(model, StepConfig(), LORA, [(12, 4, 4)], 30, 2, 16, 16, workers, True)
    return plan(job, RATE, memory, host)


def test_the_fastest_setting_that_fits_is_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    roomy = planned(monkeypatch, 80 * GIB)
    assert roomy.recommended is roomy.choice(ShardingConfig())
    assert roomy.recommended is not None
    assert roomy.steps == 4
    needed = roomy.recommended.holding.total
    tight = planned(monkeypatch, needed - 1)
    assert tight.recommended is not None
    assert tight.recommended.holding.total < needed
    assert not tight.choice(ShardingConfig()).fits
    unknown = planned(monkeypatch, None)
    assert unknown.recommended is not None
    assert "not given" in unknown.why


def test_where_nothing_fits_the_least_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = planned(monkeypatch, 1 << 20)
    assert nothing.recommended is None
    assert "no setting fits" in nothing.why
    assert "GPUs" in nothing.why
    console = Console(width=120, record=True, file=StringIO())
    for part in tables(nothing, "corsa", "20 tokens"):
        console.print(part)
    text = console.export_text()
    assert "error: no setting fits" in text
    assert "options" not in text


def test_what_cpu_memory_cannot_hold_is_not_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(c.fits == (c.holding.host == 0) for c in planned(monkeypatch, 80 * GIB, host=0).choices)


@pytest.mark.parametrize(
    ("text", "expected"), [("48GiB", 48 << 30), ("80GB", 80 * 10**9), ("24", 24 << 30), ("512 MiB", 512 << 20)]
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert as_bytes(text, "--gpu-memory") == expected


@pytest.mark.parametrize("text", ["", "lots", "0", "48 parsecs", "-3GiB"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(CorsaError, match="--gpu-memory"):
        as_bytes(text, "--gpu-memory")


def test_the_command_plans_a_model_that_is_nowhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An alias of a hub model, without a network: its architecture is known."""
    words = ["plan", "--model", "random:tiny-qwen3", "--gpus", "2", "--gpu-memory", "1GiB", "--edits", "32"]
    rates = tmp_path / "gpu.json"
    rates.write_text(json.dumps({"rows": [{"tflops": 7.0}]}))
    assert main([*words, "--epochs", "1", "--measured", str(rates), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 2
    assert found["rate"]["tflops"] == 7.0
    assert found["recommended"] == ShardingConfig().canonical()
    assert {tuple(s["sharding"].values()) for s in found["settings"]} >= {
        (0, False, False, False),
        (3, True, True, True),
    }
    for setting in found["settings"]:
        assert setting["total"] == sum(setting["bytes"].values())
    assert all(0 <= kept["least"] <= kept["bytes"] for kept in found["kept"].values())
    assert main([*words, "--tflops", "5"]) == 0
    shown = capsys.readouterr().out
    assert "stated: --tflops" in shown
    assert "kept for the backward pass" in shown
    assert "take: stage 0" in shown
    assert main(["plan"]) == 2
    assert "--detect POINTS" in capsys.readouterr().err
    assert main(["plan", "--model", "random:tiny-qwen4"]) == 2
    assert "tiny-qwen3" in capsys.readouterr().err
    for words in (["--edits", "0"], ["--micro-batch", "0"], ["--gpus", "-1"], ["--tflops", "0"]):
        assert main(["plan", "--model", "random:tiny-qwen3", *words]) == 2
        assert capsys.readouterr().err.startswith(f"error: {' '.join(words)}: give ")


def test_a_plan_is_whole_in_eighty_columns_and_when_piped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The largest model: every setting, and hundreds of GiB."""
    monkeypatch.setenv("COLUMNS", "40")
    words = ["plan", "--model", "qwen3-14b", "--gpus", "4", "--gpu-memory", "48GiB", "--tflops", "5"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "rehearsing a step of qwen3-14b" in shown.err
    assert "…" not in shown.out
    lines = [line for line in shown.out.splitlines() if line.startswith((" stage ", " base ", " activations "))]
    rows = [line.split() for line in lines]
    assert len(rows) == 9 + 2
    for stage in rows[:9]:
        assert float(stage[-6]) > 1  # total held
    base = next(row for row in rows if row[0] == "base")
    assert len(base) == 1 + 9
    assert float(base[1]) == pytest.approx(27.5, abs=0.1)  # 14.8 billion parameters of two bytes
    assert all(len(line) <= 80 for line in lines)


def test_the_command_says_how_many_facts_and_seeds_show_a_difference(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["plan", "--detect", "5"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Facts and seeds to show a difference of 5 points" in shown
    assert "2 points from run to run" in shown
    assert main(["plan", "--detect", "5", "--json"]) == 0
    default = {need["seeds"]: need["facts"] for need in json.loads(capsys.readouterr().out)["needs"]}
    assert main(["plan", "--detect", "5", "--run-sd", "0.5", "--json"]) == 0
    steady = {need["seeds"]: need["facts"] for need in json.loads(capsys.readouterr().out)["needs"]}
    assert steady[5] < default[5]

    assert main(["plan", "--detect", "5", "--run-sd", "0"]) == 0  # a narrow table: the text keeps its own width
    assert "Facts and seeds to show a difference of 5 points\n" in capsys.readouterr().out

    report = tmp_path / "metrics.json"
    report.write_text(json.dumps(compute(predictions(chains=8, seeds=2), primary=("generality",))))
    assert main(["plan", "--detect", "5", "--like", str(report), "--json"]) == 0
    assert "lora and corsa on generality" in json.loads(capsys.readouterr().out)["source"]
    report.write_text(json.dumps(compute(predictions(chains=8), primary=("generality",))))
    assert main(["plan", "--detect", "5", "--like", str(report)]) == 2
    assert "two seeds or more" in capsys.readouterr().err
    assert main(["plan", "--detect", "-1"]) == 2
    assert "above 0" in capsys.readouterr().err


def test_the_real_14b_is_planned_from_its_shape() -> None:
    shape = architecture(ModelConfig(name="qwen3-14b"))
    found = rehearse(shape, torch.bfloat16, LoraConfig(), StepConfig(), [Triplet([1] * 12, [1] * 4, [1] * 4)] * 4)
    assert found.parameters == 14_768_307_200  # as published: 14.8B
    assert found.items["base"] == pytest.approx(2 * found.parameters, rel=1e-6)
    assert found.trained == 128_450_560
