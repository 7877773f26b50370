"""Adapters as factors: attached to a model, on disk with any ranks, merged and truncated; compared with PEFT and with
dense matrices.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LORA, shaken, tiny_model
from torch import Tensor

from corsa.errors import CorsaError
from corsa.lora.arithmetic import MERGES, check_same_base, compress, merge, norm
from corsa.lora.attached import Attached, attached
from corsa.lora.factors import Adapter, Factors
from corsa.lora.flat import Lora, linear_layers
from corsa.lora.peft_format import PREFIX, load_adapter, read_factors, save_adapter, write_factors

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]

IDS = torch.tensor([[5, 17, 300, 41, 8], [9, 9, 77, 1000, 2]])
QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SHAPES = {QUERY: (32, 32), DOWN: (32, 64)}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def random_adapter(seed: int, rank: int = 4, shapes: dict[str, tuple[int, int]] | None = None) -> Adapter:
    """Random factors, so small that the tiny model's logits keep their size."""
    g = torch.Generator().manual_seed(seed)
    shapes = SHAPES if shapes is None else shapes
    return {
        name: Factors(0.3 * torch.randn(rank, i, generator=g), 0.3 * torch.randn(o, rank, generator=g))
        for name, (o, i) in shapes.items()
    }


def dense(adapter: Adapter) -> dict[str, Tensor]:
    return {name: factors.b.double() @ factors.a.double() for name, factors in adapter.items()}


def total(adapters: list[Adapter], weights: list[float]) -> dict[str, Tensor]:
    """The weighted sum of the dense changes, in float64."""
    changes = [dense(a) for a in adapters]
    return {
        name: torch.stack([w * change[name] for w, change in zip(weights, changes, strict=True)]).sum(0)
        for name in changes[0]
    }


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative error over all layers."""
    assert set(found) == set(expected)
    lost = sum(float((found[n] - expected[n]).square().sum()) for n in expected)
    return (lost / sum(float(e.square().sum()) for e in expected.values())) ** 0.5


def with_merged(change: dict[str, Tensor]) -> Any:
    """The tiny Llama with the changes merged into its weights."""
    model = tiny_model()
    layers = dict(linear_layers(model))
    with torch.no_grad():
        for name, delta in change.items():
            layers[name].weight += delta.float()
    return model


# Attached to a model


def test_attached_changes_add_up_to_merged_weights_and_go_again() -> None:
    model = tiny_model()
    base = logits(model)
    one, two = random_adapter(1), random_adapter(2, rank=2)
    delta = {DOWN: 0.3 * torch.randn(32, 64, generator=torch.Generator().manual_seed(3))}
    expected = total([one, two], [1.0, 1.0])
    expected[DOWN] = expected[DOWN] + delta[DOWN]
    with attached(model, one, delta, two):
        torch.testing.assert_close(logits(model), logits(with_merged(expected)), rtol=1e-4, atol=1e-4)
        assert float((logits(model) - base).abs().max()) > 0.1
    assert torch.equal(logits(model), base)
    with pytest.raises(ValueError, match="lost"), attached(model, one):
        raise ValueError("lost")
    assert torch.equal(logits(model), base)
    attachment = Attached(model, [one])
    assert not torch.equal(logits(model), base)
    attachment.remove()
    assert torch.equal(logits(model), base)


def test_attached_composes_with_lora_in_outputs_and_gradients() -> None:
    change = random_adapter(1)
    model, merged = tiny_model(), with_merged(dense(change))
    lora, reference = shaken(Lora(model, LORA)), shaken(Lora(merged, LORA))
    found, expected = [], []
    with attached(model, change):
        for m, to in ((model, found), (merged, expected)):
            out = m(input_ids=IDS, use_cache=False).logits
            out.logsumexp(-1).sum().backward()
            to.append(out.detach())
        with lora.off(), reference.off():  # the adapter off leaves the change
            found.append(logits(model))
            expected.append(logits(merged))
    assert lora.phi.grad is not None
    assert float(lora.phi.grad.abs().max()) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lora.phi.grad, reference.phi.grad, rtol=1e-3, atol=1e-4)
    assert all(f.a.grad is None and not f.a.requires_grad for f in change.values())


def test_attached_keeps_the_dtype_of_a_half_precision_base() -> None:
    model = tiny_model().to(torch.bfloat16)  # type: ignore[arg-type]
    with attached(model, random_adapter(1)):
        assert logits(model).dtype == torch.bfloat16


def test_a_change_of_another_model_is_refused() -> None:
    model = tiny_model()
    for change, text in (
        ({QUERY: torch.zeros(32, 64)}, rf"{QUERY} is \(32, 64\).*is \(32, 32\)"),
        (random_adapter(1, shapes={DOWN: (64, 32)}), rf"{DOWN} is \(64, 32\).*is \(32, 64\)"),
        (
            {"model.layers.9.mlp.down_proj": torch.zeros(32, 64)},
            r"Llama\S* has no linear layer model\.layers\.9\S* for this change",
        ),
        ({"lm_head": torch.zeros(1024, 32)}, "has no linear layer lm_head"),
    ):
        with pytest.raises(CorsaError, match=text), attached(model, random_adapter(2), change):
            pass
        assert not any(m._forward_hooks for m in model.modules())


def test_factors_of_different_ranks_are_refused() -> None:
    with pytest.raises(CorsaError, match=r"a \(2, 5\) and b \(7, 3\)"):
        Factors(torch.zeros(2, 5), torch.zeros(7, 3))


# On disk


def peft_model(directory: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns about missing and unexpected tensors
        return PeftModel.from_pretrained(tiny_model(), str(directory))


def test_peft_loads_factors_of_several_ranks(tmp_path: Path) -> None:
    adapter = random_adapter(1) | random_adapter(2, rank=2, shapes={DOWN: (32, 64)})
    write_factors(adapter, tmp_path, "base")
    model = tiny_model()
    with attached(model, adapter):
        expected = logits(model)
    assert float((expected - logits(model)).abs().max()) > 0.1
    torch.testing.assert_close(logits(peft_model(tmp_path)), expected, rtol=0, atol=1e-5)
    read, base = read_factors(tmp_path)
    assert base == "base"
    assert set(read) == set(adapter)
    for name, factors in adapter.items():
        assert torch.equal(read[name].a, factors.a)
        assert torch.equal(read[name].b, factors.b)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"1\..*down_proj": 6}, "alpha_pattern": {"down_proj": 1}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_the_scale_of_an_adapter_that_peft_saved_is_folded(settings: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **settings)
    theirs: Any = get_peft_model(tiny_model(), config).eval()
    theirs.save_pretrained(str(tmp_path))
    adapter, _ = read_factors(tmp_path)
    model = tiny_model()
    with attached(model, adapter):
        torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-4)
    assert float((logits(model) - logits(theirs)).abs().max()) > 0.1


def test_a_saved_adapter_reads_as_the_factors_of_its_lora(tmp_path: Path) -> None:
    lora = shaken(Lora(tiny_model(), LORA))
    save_adapter(lora, tmp_path / "saved", "base")
    read, _ = read_factors(tmp_path / "saved")
    for site, a, b in zip(lora.sites, lora.factors()[0::2], lora.factors()[1::2], strict=True):
        assert torch.equal(read[site.name].a, a[0].detach())
        torch.testing.assert_close(read[site.name].b, 2.0 * b[0].detach())
    write_factors(read, tmp_path / "written", "base")
    with pytest.raises(CorsaError, match=r"scaled by 4/4, the run by 8/4"):
        load_adapter(lora, tmp_path / "written")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"bias": "all"}, "bias is all"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is pissa_niter_4, which changes the base"),
        ({"rank_pattern": {"down_proj": 3}}, rf"{DOWN} have shapes .* where adapter_config.json says rank 3"),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_refused(settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    write_factors(random_adapter(1), tmp_path, "base")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(CorsaError, match=text) as caught:
        read_factors(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_tensors_that_are_no_pair_of_factors_are_refused(tmp_path: Path) -> None:
    write_factors(random_adapter(1), tmp_path, "base")
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    save_file(whole | {f"{PREFIX}{QUERY}.lora_magnitude_vector": torch.zeros(32)}, file)
    with pytest.raises(CorsaError, match="lora_magnitude_vector is no factor"):
        read_factors(tmp_path)
    save_file({k: v for k, v in whole.items() if k != f"{PREFIX}{DOWN}.lora_A.weight"}, file)
    with pytest.raises(CorsaError, match=f"{DOWN} has lora_B without the other factor"):
        read_factors(tmp_path)
    with pytest.raises(CorsaError, match="nothing to write"):
        write_factors({}, tmp_path, "base")


# Merged


def test_sum_is_the_sum_of_the_changes_whatever_the_ranks() -> None:
    adapters = [random_adapter(1, rank=2), random_adapter(2, rank=3), random_adapter(3, rank=1)]
    merged, report = merge(adapters, "sum", weights=[1.0, -0.5, 2.0])
    assert distance(dense(merged), total(adapters, [1.0, -0.5, 2.0])) < 1e-6
    assert report == {"rank": 6, "error": 0.0}
    assert distance(dense(merge(adapters, "sum")[0]), total(adapters, [1.0] * 3)) < 1e-6
    assert distance(dense(merge(adapters, "average")[0]), total(adapters, [1 / 3] * 3)) < 1e-6


@pytest.fixture(scope="module")
def pefts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Adapter]]:
    """A PEFT model with two adapters of scale 3, and the same adapters as factors."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model: Any = get_peft_model(tiny_model(), config, adapter_name="one")
        model.add_adapter("two", config)
    folder = tmp_path_factory.mktemp("pefts")
    model.save_pretrained(str(folder))
    return model, [read_factors(folder / name)[0] for name in ("one", "two")]


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -1.6]])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_factorwise_merges_equal_pefts(pefts: tuple[Any, list[Adapter]], method: str, weights: list[float]) -> None:
    theirs, adapters = pefts
    merged, report = merge(adapters, method, weights=weights, density=0.3)
    name = f"{method} {weights}".replace(".", "_")
    theirs.add_weighted_adapter(["one", "two"], weights, name, combination_type=method, density=0.3)
    layers = dict(theirs.base_model.model.named_modules())
    expected = {n: layers[n].get_delta_weight(name).detach().double() for n in merged}
    assert distance(dense(merged), expected) < 1e-6
    assert report["rank"] == 4
    assert report["error"] > 0.1  # the cross terms


def test_dare_drops_as_pefts_does_with_the_same_seed() -> None:
    from peft.utils.merge_utils import dare_linear, dare_ties

    adapters = [random_adapter(s, shapes={DOWN: (32, 64)}) for s in (1, 2)]
    root = torch.tensor([0.5, 2.0]).sqrt()
    for method, theirs in (("dare_linear", dare_linear), ("dare_ties", dare_ties)):
        merged, _ = merge(adapters, method, weights=[0.5, 2.0], density=0.3, seed=11)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            a = theirs([x[DOWN].a for x in adapters], root, 0.3)
            b = theirs([x[DOWN].b for x in adapters], root, 0.3)
        torch.testing.assert_close(merged[DOWN].a, a)
        torch.testing.assert_close(merged[DOWN].b, b)
        again, _ = merge(adapters, method, weights=[0.5, 2.0], density=0.3, seed=11)
        other, _ = merge(adapters, method, weights=[0.5, 2.0], density=0.3, seed=12)
        assert torch.equal(again[DOWN].a, merged[DOWN].a)
        assert not torch.equal(other[DOWN].a, merged[DOWN].a)


def test_svd_loses_what_the_dense_svd_loses() -> None:
    adapters = [random_adapter(1, rank=3), random_adapter(2, rank=5)]
    merged, report = merge(adapters, "svd", weights=[1.0, 0.5], rank=4)
    expected = total(adapters, [1.0, 0.5])
    values = {name: torch.linalg.svdvals(delta) for name, delta in expected.items()}
    lost = sum(float(s[4:].square().sum()) for s in values.values())
    error = (lost / sum(float(s.square().sum()) for s in values.values())) ** 0.5
    assert 0.05 < error < 0.9
    assert report["rank"] == 4
    assert report["error"] == pytest.approx(error, rel=1e-6)
    assert distance(dense(merged), expected) == pytest.approx(error, rel=1e-6)
    full, report = merge(adapters, "svd", weights=[1.0, 0.5], rank=8)
    assert distance(dense(full), expected) < 1e-6
    assert report["error"] < 1e-6


def test_compressed_adapters_keep_what_fits(tmp_path: Path) -> None:
    wide = random_adapter(1, rank=40)  # more than the 32 rows of the query
    same, error = compress(wide, 40)
    assert error == 0
    assert same[QUERY].rank == 32
    assert distance(dense(same), dense(wide)) < 1e-6
    cut, error = compress(wide, 3)
    assert {f.rank for f in cut.values()} == {3}
    assert error == pytest.approx(distance(dense(cut), dense(wide)), rel=1e-5)
    turned = {name: Factors(f.b.T, f.a.T) for name, f in cut.items()}  # safetensors refuses such views
    write_factors(turned, tmp_path, "base")
    assert distance(dense(read_factors(tmp_path)[0]), dense(turned)) == 0
    assert norm(wide[DOWN]) == pytest.approx(float(dense(wide)[DOWN].norm()))


@pytest.mark.parametrize("method", sorted(set(MERGES) - {"average"}))
def test_the_reported_error_is_the_dense_one(method: str) -> None:
    adapters = [random_adapter(1), random_adapter(2)]
    merged, report = merge(adapters, method, weights=[1.0, 0.5], rank=2 if method == "svd" else None)
    expected = distance(dense(merged), total(adapters, [1.0, 0.5]))
    assert report["error"] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "tise"}, "unknown merge method 'tise': did you mean 'ties'"),
        ({"method": "ties", "density": 0.0}, "density is 0.0"),
        ({"method": "ties", "density": 1.5}, "density is 1.5"),
        ({"method": "svd"}, "svd needs the rank.*it is None"),
        ({"method": "sum", "rank": 4}, "sum takes no rank"),
        ({"method": "average", "weights": [1.0, 1.0]}, "average weighs each of the 2 adapters 1/2"),
        ({"method": "sum", "weights": [1.0]}, "1 weights for 2 adapters"),
        ({"method": "sum", "weights": [1.0, float("nan")]}, "finite"),
    ],
)
def test_bad_arguments_of_a_merge_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(CorsaError, match=text):
        merge([random_adapter(1), random_adapter(2)], **arguments)


def test_adapters_that_do_not_fit_together_are_refused() -> None:
    whole, part = random_adapter(1), random_adapter(2, shapes={QUERY: SHAPES[QUERY]})
    for adapters, text in (
        ([whole, whole, part], f"adapter 1 changes {DOWN} and adapter 3 does not"),
        ([part, whole], f"adapter 2 changes {DOWN} and adapter 1 does not"),
        ([whole, part | random_adapter(3, shapes={DOWN: (32, 48)})], rf"{DOWN} is \(32, 64\).*\(32, 48\) in adapter 2"),
        ([], "no adapters to merge"),
    ):
        with pytest.raises(CorsaError, match=text):
            merge(adapters, "sum")
    for method in ("linear", "ties", "dare_linear", "dare_ties"):
        with pytest.raises(CorsaError, match=rf"{method} .* ranks must be equal; in {QUERY} they are 4, 2"):
            merge([whole, random_adapter(2, rank=2)], method)
    with pytest.raises(CorsaError, match="rank 0"):
        compress(whole, 0)
    assert check_same_base(["smollm2-135m", "smollm2-135m"]) == "smollm2-135m"
    with pytest.raises(CorsaError, match="first is for 'qwen3-4b', adapter 3 for 'qwen3-8b'"):
        check_same_base(["qwen3-4b", "qwen3-4b", "qwen3-8b"])


def test_a_line_merged_with_its_own_successor_is_named(tmp_path: Path) -> None:
    from corsa.config import ModelConfig
    from corsa.editing.history import FILE, History, Update
    from corsa.editing.merging import merge as merge_directories

    known: dict[str, Any] = {"kind": "edit", "facts": 1, "method": "corsa", "created": "2026-01-01T00:00:00"}
    updates = tuple(Update(number=n, fingerprint=f"f{n}", sha256="0", directory="/x", **known) for n in (1, 2))
    for name, own in {"january": updates[:1], "february": updates, "other": updates[1:]}.items():
        write_factors(random_adapter(1), tmp_path / name, "smollm2-135m")
        history = History(model=ModelConfig(), updates=own)
        (tmp_path / name / FILE).write_text(history.model_dump_json())
    january, february, other = (str(tmp_path / name) for name in ("january", "february", "other"))
    found = merge_directories([january, february], tmp_path / "twice")
    assert found["remarks"] == [
        f"{february} continues {january} and holds its change already: the merged adapter has it twice"
    ]
    assert merge_directories([january, other], tmp_path / "apart")["remarks"] == []
