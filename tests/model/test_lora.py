"""LoRA in one flat tensor, and adapters on disk, compared with PEFT."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, LORA, shaken, tiny_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from corsa.config import LoraConfig
from corsa.errors import CorsaError
from corsa.lora.attached import attached
from corsa.lora.branch import ApplyA, ApplyB
from corsa.lora.flat import Lora, linear_layers
from corsa.lora.peft_format import PREFIX, load_adapter, save_adapter
from corsa.models.recomputed_norms import recompute_norms

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]

IDS = torch.tensor([[5, 17, 300, 41, 8], [9, 9, 77, 1000, 2]])


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def lora() -> Lora:
    """LoRA on the tiny Llama, with all of phi non-zero."""
    return shaken(Lora(tiny_model(), LORA))


def test_every_linear_layer_but_the_head_is_a_site(family: str) -> None:
    model = tiny_model(family)
    lora = Lora(model, LORA)
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert [s.name for s in lora.sites] == [name for name in linear if name != "lm_head"]
    assert len(lora.sites) == 2 * 7
    assert lora.phi.shape == (1, sum(LORA.rank * (s.inputs + s.outputs) for s in lora.sites))
    assert lora.phi.is_leaf
    assert lora.phi.requires_grad
    assert not any(p.requires_grad for p in model.parameters())
    assert "phi" not in dict(model.named_parameters())


def test_it_starts_as_the_base_model(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    Lora(model, LORA, seed=5)
    assert torch.equal(logits(model), before)


def test_initial_values_follow_from_the_seed_alone() -> None:
    lora = Lora(tiny_model(), LORA, seed=5)
    first = lora.phi.detach().clone()
    torch.manual_seed(99)
    lora.initialise(5)
    assert torch.equal(lora.phi.detach(), first)
    lora.initialise(6)
    assert not torch.equal(lora.phi.detach(), first)
    for a, b, site in zip(lora.factors()[0::2], lora.factors()[1::2], lora.sites, strict=True):
        bound = 1 / math.sqrt(site.inputs)
        assert 0.9 * bound < float(a.detach().abs().max()) <= bound
        assert float(a.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.2)
        assert not b.any()


def test_it_adds_the_scaled_product_of_the_factors(family: str) -> None:
    model, merged = tiny_model(family), tiny_model(family)
    lora = shaken(Lora(model, LoraConfig(rank=3, alpha=12.0)))
    layers = dict(linear_layers(merged))
    with torch.no_grad():
        for site, a, b in zip(lora.sites, lora.factors()[0::2], lora.factors()[1::2], strict=True):
            layers[site.name].weight += 4.0 * b[0] @ a[0]
    found = logits(model)
    assert float((found - logits(tiny_model(family))).abs().max()) > 0.1
    torch.testing.assert_close(found, logits(merged), rtol=1e-4, atol=1e-4)


def test_it_can_be_switched_off() -> None:
    model = tiny_model()
    base = logits(model)
    lora = shaken(Lora(model, LORA))
    edited = logits(model)
    with lora.off():
        with lora.off():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), edited)
    with pytest.raises(ValueError, match="lost"), lora.off():
        raise ValueError("lost")
    assert torch.equal(logits(model), edited)
    assert not torch.equal(edited, base)


def test_adapters_trained_together_take_equal_parts_of_the_rows() -> None:
    model = tiny_model()
    lora = shaken(Lora(model, LORA, adapters=2))
    together = logits(model)
    for row in range(2):
        single = tiny_model()
        alone = Lora(single, LORA)
        with torch.no_grad():
            alone.phi.copy_(lora.phi[row : row + 1])
        torch.testing.assert_close(together[row], logits(single, IDS[row : row + 1])[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(lora.phi[0], lora.phi[1])


def test_factors_stay_float32_on_a_half_precision_base() -> None:
    model = tiny_model().to(torch.bfloat16)  # type: ignore[arg-type]
    lora = shaken(Lora(model, LORA))
    out = model(input_ids=IDS, use_cache=False).logits
    assert out.dtype == torch.bfloat16
    out.float().logsumexp(-1).sum().backward()
    assert lora.phi.dtype == torch.float32
    assert lora.phi.grad is not None
    assert lora.phi.grad.dtype == torch.float32
    assert lora.phi.grad.isfinite().all()
    assert float((lora.phi.grad != 0).float().mean()) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_derivative_is_autograd_s_of_the_written_formula_bit_for_bit(dtype: torch.dtype) -> None:
    """Also for two cotangents in one batched backward pass, two adapters, and two sites with one input."""
    draw = torch.Generator().manual_seed(0)
    x, first, second = (torch.randn(4, 3, n, generator=draw).to(dtype).requires_grad_() for n in (8, 6, 5))
    a, c = (torch.randn(2, 2, 8, generator=draw).requires_grad_() for _ in range(2))
    b, d = (torch.randn(2, n, 2, generator=draw).requires_grad_() for n in (6, 5))
    narrow = (0.5 * torch.bmm(x.float().reshape(2, 6, 8), torch.cat([a, c], 1).mT)).split(2, 2)
    written = [
        (output + torch.bmm(part, factor.mT).view(output.shape)).to(dtype)
        for output, part, factor in zip((first, second), narrow, (b, d), strict=True)
    ]
    joint = ApplyA.apply(x, 0.5, a, c)
    found = [ApplyB.apply(joint[0], first, b), ApplyB.apply(joint[1], second, d)]
    cotangents = [torch.randn(2, 4, 3, n, generator=draw).to(dtype) for n in (6, 5)]
    leaves = [x, first, second, a, b, c, d]
    one, other = (torch.autograd.grad(out, leaves, cotangents, is_grads_batched=True) for out in (found, written))
    for mine, autograd_s in zip((*found, *one), (*written, *other), strict=True):
        assert mine.dtype == autograd_s.dtype
        assert torch.equal(mine, autograd_s)


def test_sites_share_a_product_only_where_they_have_one_input(family: str) -> None:
    """A model that gives k another input than q has the outputs of an attached adapter: each site reads its own."""
    model = tiny_model(family)
    lora = shaken(Lora(model, LORA))
    names = [[lora.sites[j].name.rsplit(".", 1)[-1] for j in group] for group in lora._together]
    assert names[:7] == [["q_proj", "k_proj", "v_proj"]] * 3 + [["o_proj"]] + [["gate_proj", "up_proj"]] * 2 + [
        ["down_proj"]
    ]
    layers: Any = model.get_decoder().layers
    for layer in layers:
        layer.self_attn.k_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    changed = logits(model)
    with lora.off():
        base = logits(model)
    with attached(model, lora.adapter()), lora.off():
        torch.testing.assert_close(logits(model), changed, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(base, changed, atol=1e-2)


def test_a_half_precision_base_keeps_no_float32_copy_of_its_activations(family: str) -> None:
    """Sites with the same input (q, k, v; gate, up) keep one tensor; norms keep their input alone."""
    plain, model = (tiny_model(family).to(torch.bfloat16) for _ in range(2))  # type: ignore[arg-type]
    recompute_norms(model)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    out, loras = [], [shaken(Lora(m, LORA)) for m in (plain, model)]
    for m in (plain, model):
        kept.clear()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            out.append(m(input_ids=IDS, use_cache=False).logits)
    assert torch.equal(*out)
    base = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers(), loras[1].phi)}
    own = {t.untyped_storage().data_ptr(): t for t in kept if t.untyped_storage().data_ptr() not in base}
    hidden = IDS.numel() * model.config.hidden_size
    assert max(t.numel() for t in own.values() if t.dtype == torch.float32) < hidden
    inputs = [
        t for t in own.values() if t.dtype == torch.bfloat16 and t.shape == (*IDS.shape, model.config.hidden_size)
    ]
    norms = sum("Norm" in type(m).__name__ for m in model.modules())
    assert len(inputs) <= norms + 3 * model.config.num_hidden_layers  # and the inputs of q, k, v; of gate, up; of o
    cotangents = torch.randn(2, *out[0].shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    one, other = (
        torch.autograd.grad(o, lora.phi, cotangents, is_grads_batched=True)[0]
        for o, lora in zip(out, loras, strict=True)
    )
    assert torch.equal(one, other)
    assert float(one.norm()) > 0


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(CorsaError, match=r"Embedding has no torch\.nn\.Linear layer"):
        Lora(nn.Embedding(3, 3), LORA)


# On disk


def test_peft_loads_a_saved_adapter_with_the_same_logits(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny_model(family)
    lora = shaken(Lora(model, LORA))
    save_adapter(lora, tmp_path, f"random:tiny-{family}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns about missing and unexpected tensors
        theirs = PeftModel.from_pretrained(tiny_model(family), str(tmp_path))
    assert float((logits(model) - logits(tiny_model(family))).abs().max()) > 0.1
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)


def test_an_adapter_that_peft_saved_loads_here(tmp_path: Path) -> None:
    from peft import LoraConfig as Theirs
    from peft import PeftModel, get_peft_model

    config = Theirs(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    theirs = get_peft_model(tiny_model(), config)
    assert isinstance(theirs, PeftModel)
    theirs.eval()
    theirs.save_pretrained(str(tmp_path))
    model = tiny_model()
    load_adapter(Lora(model, LORA), tmp_path)
    assert float((logits(model) - logits(tiny_model())).abs().max()) > 0.1
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-4)


def test_an_adapter_comes_back_bit_for_bit(lora: Lora, tmp_path: Path) -> None:
    save_adapter(lora, tmp_path / "new" / "adapter", "base")
    other = Lora(tiny_model(), LORA, seed=9)
    load_adapter(other, str(tmp_path / "new" / "adapter"))
    assert torch.equal(other.phi.detach(), lora.phi.detach())
    assert other.phi.requires_grad


def test_one_of_several_adapters_is_saved_and_loaded(tmp_path: Path) -> None:
    several = shaken(Lora(tiny_model(), LORA, adapters=3))
    before = several.phi.detach().clone()
    save_adapter(several, tmp_path, "base", row=1)
    load_adapter(several, tmp_path, row=2)
    assert torch.equal(several.phi.detach()[:2], before[:2])
    assert torch.equal(several.phi.detach()[2], before[1])


@pytest.fixture
def saved(lora: Lora, tmp_path: Path) -> Path:
    save_adapter(lora, tmp_path / "adapter", "base")
    return tmp_path / "adapter"


def refused(directory: Path, config: LoraConfig = LORA) -> str:
    with pytest.raises(CorsaError) as caught:
        load_adapter(Lora(tiny_model(), config), directory)
    assert str(directory) in str(caught.value)
    return str(caught.value)


def rewrite(saved: Path, change: Any) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, saved / "adapter_model.safetensors")


A_QUERY = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"


def test_an_adapter_of_another_scale_is_refused(saved: Path) -> None:
    text = refused(saved, LoraConfig(rank=4, alpha=16.0))
    assert "scaled by 8.0/4, the run by 16/4" in text
    assert "--lora.alpha" in text


def test_an_adapter_of_another_rank_is_refused(saved: Path) -> None:
    text = refused(saved, LoraConfig(rank=2, alpha=4.0))  # the same scale
    assert f"{A_QUERY} has shape (4, 32), expected (2, 32)" in text


def test_an_adapter_that_lacks_a_tensor_is_refused(saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors.pop(A_QUERY))
    assert f"{A_QUERY} is absent, expected (4, 32)" in refused(saved)


def test_an_adapter_with_a_tensor_that_has_no_place_is_refused(saved: Path) -> None:
    """Without that tensor the model's answers would differ from those that the adapter's owner saw."""
    rewrite(saved, lambda tensors: tensors.update({f"{PREFIX}lm_head.lora_A.weight": torch.zeros(4, 32)}))
    assert f"{PREFIX}lm_head.lora_A.weight" in refused(saved)


def test_a_corrupt_adapter_is_refused(saved: Path) -> None:
    whole = (saved / "adapter_model.safetensors").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not safetensors"):
        (saved / "adapter_model.safetensors").write_bytes(damaged)
        assert "no readable PEFT adapter" in refused(saved)


def test_a_corrupt_or_absent_configuration_is_refused(saved: Path) -> None:
    (saved / "adapter_config.json").write_text('{"r": 4,')
    assert "adapter_config.json is damaged" in refused(saved)
    (saved / "adapter_config.json").unlink()
    assert "adapter_config.json cannot be read" in refused(saved)
    shutil.rmtree(saved)
    assert "no readable PEFT adapter" in refused(saved)


def test_configuration_names_what_peft_needs(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    projections = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert set(config["target_modules"]) == projections


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (("q_proj", "v_proj"), None),
        (("down_proj",), (1,)),
        (("self_attn.q_proj", "mlp.up_proj"), (0,)),
        (("all-linear",), (1,)),
        (("model.layers.0.mlp.gate_proj",), None),
    ],
)
def test_targets_and_layers_are_those_of_peft(tmp_path: Path, targets: tuple[str, ...], layers: Any) -> None:
    from peft import LoraConfig as Theirs
    from peft import PeftModel, get_peft_model

    asked = list(targets)
    if targets == ("all-linear",):  # PEFT accepts this value only without layers_to_transform
        asked = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    numbers = None if layers is None else list(layers)
    theirs = get_peft_model(
        tiny_model(), Theirs(r=4, target_modules=asked, layers_to_transform=numbers, task_type="CAUSAL_LM")
    )
    expected = {n.removeprefix(PREFIX).partition(".lora_A")[0] for n, _ in theirs.named_parameters() if ".lora_A." in n}
    model = tiny_model()
    lora = shaken(Lora(model, LORA.model_copy(update={"targets": targets, "layers": layers})))
    assert {site.name for site in lora.sites} == expected
    save_adapter(lora, tmp_path / "adapter", "tiny")
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    again = Lora(tiny_model(), lora.config)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again.phi, lora.phi)


def test_targets_that_are_not_there_are_refused() -> None:
    with pytest.raises(CorsaError, match=r"--lora.targets c_attn: .*this model has .*q_proj"):
        Lora(tiny_model(), LORA.model_copy(update={"targets": ("q_proj", "c_attn")}))
    with pytest.raises(CorsaError, match=r"--lora.layers 2: this model has layers 0 to 1"):
        Lora(tiny_model(), LORA.model_copy(update={"layers": (0, 2)}))
    one = {"targets": ("model.layers.0.mlp.up_proj",), "layers": (1,)}
    with pytest.raises(CorsaError, match="choose no layer"):
        Lora(tiny_model(), LORA.model_copy(update=one))


def test_an_adapter_on_all_layers_keeps_its_identity() -> None:
    assert LoraConfig().canonical() == {"rank": 32, "alpha": 64.0}
    chosen = LoraConfig(targets=("q_proj",), layers=(0,)).canonical()
    assert (chosen["targets"], chosen["layers"]) == (["q_proj"], [0])
