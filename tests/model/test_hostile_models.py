"""Malicious adapters and models: each is refused quickly, with one line and no traceback."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LORA, tiny_model

from corsa.config import ModelConfig
from corsa.editing.history import open_line
from corsa.editing.merging import merge as merge_directories
from corsa.errors import CorsaError
from corsa.lora.arithmetic import compress, merge
from corsa.lora.factors import Adapter, Factors
from corsa.lora.flat import Lora
from corsa.lora.peft_format import load_adapter, read_factors, write_factors
from corsa.lora.peft_settings import alpha_and_rank
from corsa.models.loading import load_model, load_tokenizer
from corsa.models.shapes import architecture

LAYER = "model.layers.0.mlp.down_proj"
OTHER = "model.layers.1.mlp.down_proj"


def adapter(seed: int = 0, rank: int = 2) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shapes = {LAYER: (32, 64), OTHER: (32, 64)}
    return {
        name: Factors(torch.randn(rank, i, generator=generator), torch.randn(o, rank, generator=generator))
        for name, (o, i) in shapes.items()
    }


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_factors(adapter(), tmp_path / "adapter", "base")
    return tmp_path / "adapter"


def one_line(error: BaseException, place: Path) -> None:
    text = str(error)
    assert "\n" not in text, text
    assert len(text) < 700 + len(str(place))
    assert str(place) in text


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "holds no settings of an adapter, but a list"),
        ("null", "but a NoneType"),
        ('"text"', "but a str"),
        ("{", "is damaged"),
        ("\\xff", "is damaged"),
        (DEEP, "nested too deeply|is damaged"),
        ('{"r": ' + "9" * 5000 + "}", "is damaged"),
        ('{"x": "' + "x" * (5 << 20) + '"}', "more than 4 MiB"),
    ],
    ids=["list", "null", "text", "broken", "no JSON", "deep", "a long integer", "large"],
)
def test_a_configuration_that_is_none_is_refused(directory: Path, content: str, said: str) -> None:
    (directory / "adapter_config.json").write_text(content)
    for reader in (read_factors, open_line):
        with pytest.raises(CorsaError, match=said) as caught:
            reader(directory)
        one_line(caught.value, directory)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": "8"}, "r: Input should be a valid integer"),
        ({"r": 2.5}, "r: Input"),
        ({"r": 0}, "r: Input should be greater than or equal to 1"),
        ({"r": 10**9}, "r: Input should be less"),
        ({"r": True}, "r: Input"),
        ({"r": [2]}, "r: Input"),
        ({"lora_alpha": 1e300}, "lora_alpha: Input should be less"),
        ({"lora_alpha": -4}, "lora_alpha: Input should be greater"),
        ({"lora_alpha": None}, "lora_alpha: Input"),
        ({"lora_alpha": float("nan")}, "lora_alpha: Input"),
        ({"rank_pattern": ["down_proj"]}, "rank_pattern: Input should be a valid dict"),
        ({"rank_pattern": {"down_proj": "2"}}, "rank_pattern.down_proj: Input"),
        ({"alpha_pattern": {"down_proj": {}}}, "alpha_pattern.down_proj: Input"),
        ({"alpha_pattern": {"x" * 5000: 1}}, "alpha_pattern"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path: Input"),
        ({"bias": {"a": 1}}, "bias: Input"),
        ({"init_lora_weights": [1]}, "init_lora_weights"),
        ({"use_rslora": "perhaps"}, "use_rslora: Input"),
        ({"peft_type": 3}, "peft_type: Input"),
    ],
)
def test_a_setting_of_the_wrong_type_is_named(directory: Path, settings: dict[str, Any], said: str) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    for reader in (read_factors, open_line, lambda d: load_adapter(Lora(tiny_model(), LORA), d)):
        with pytest.raises(CorsaError, match=said) as caught:
            reader(directory)
        one_line(caught.value, directory)


@pytest.mark.parametrize(
    "pattern", [r"(a+)+$", r"((a|a)*)*b", r"(.*.*.*.*.*.*.*.*)*x", r"([a-z._0-9]+)*!", r"(model|mode|mod|m.*)*(l.*)*z"]
)
def test_a_pattern_is_matched_in_linear_time(pattern: str) -> None:
    of = alpha_and_rank({"rank_pattern": {pattern: 3}, "r": 5}, Path("file"))
    began = time.perf_counter()
    assert of("a" * 5_000 + "." + "a" * 5_000) in ((8, 5), (8, 3))
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize("pattern", [r"(?=x)", r"(a)\1", "(", "a{1000}{1000}{1000}", "(" * 500])
def test_a_pattern_that_cannot_be_matched_so_is_refused(directory: Path, pattern: str, capfd: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rank_pattern": {pattern: 3}}))
    with pytest.raises(CorsaError, match="cannot be matched in linear time: give the names of layers") as caught:
        read_factors(directory)
    one_line(caught.value, directory)
    assert "Error parsing" not in capfd.readouterr().err


def test_patterns_match_as_those_of_the_standard_library_do() -> None:
    """PEFT's rule, written with `re`, on common patterns."""
    names = [LAYER, OTHER, "model.layers.11.self_attn.q_proj", "lm_head", "q_proj"]
    for pattern in (
        "q_proj",
        "down_proj",
        r"1\..*down_proj",
        r"layers\.1\.mlp\.down_proj",
        r"^model\.layers\.0",
        ".*",
        "proj",
    ):
        of = alpha_and_rank({"alpha_pattern": {pattern: 3.0}}, Path("file"))
        for name in names:
            assert (of(name)[0] == 3.0) == bool(re.match(rf"(.*\.)?({pattern})$", name)), (pattern, name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_that_is_not_finite_is_refused_by_everything_that_reads_it(
    directory: Path, tmp_path: Path, bad: float, whole: bool
) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    key = sorted(tensors)[1]
    tensors[key] = torch.full_like(tensors[key], bad) if whole else tensors[key].index_fill(1, torch.tensor([0]), bad)
    save_file(tensors, file)
    write_factors(adapter(1), tmp_path / "other", "base")
    for deed in (
        lambda: read_factors(directory),
        lambda: load_adapter(Lora(tiny_model(), LORA), directory),
        lambda: merge_directories([directory, tmp_path / "other"], tmp_path / "out"),
        lambda: merge_directories([tmp_path / "other", directory], tmp_path / "out", method="svd", rank=1),
    ):
        with pytest.raises(CorsaError, match="values that are not finite") as caught:
            deed()
        one_line(caught.value, directory)
    assert not (tmp_path / "out").exists()


def test_arithmetic_refuses_what_is_not_finite_and_what_overflows() -> None:
    bad = adapter()
    bad[LAYER].b.fill_(float("nan"))
    for method, rank in (("sum", None), ("average", None), ("svd", 1), ("ties", None), ("linear", None)):
        with pytest.raises(CorsaError, match=f"adapter 2: the change to {LAYER} has values that are not finite"):
            merge([adapter(), bad], method, rank=rank)
    with pytest.raises(CorsaError, match="not finite"):
        compress(bad, 1)
    huge = {name: Factors(f.a, f.b * 1e37) for name, f in adapter().items()}
    with pytest.raises(CorsaError, match=r"the adapters' sum: .* beyond float32"):
        merge([huge, huge], "sum", weights=[1e6, 1.0])
    for seed in (-1, 1 << 63, 10**40):
        with pytest.raises(CorsaError, match="the seed is"):
            merge([adapter(), adapter(1)], "dare_linear", seed=seed)


def test_a_scale_that_overflows_is_refused(directory: Path) -> None:
    file, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 1e6}))
    save_file({name: tensor * 1e36 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(CorsaError, match=r"scaled by 1e\+06/2, are beyond float32"):
        read_factors(directory)


def test_weights_that_are_none_are_refused(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    for content in (b"", b"\x00" * 8, b"\xff" * 100, (1 << 60).to_bytes(8, "little") + b"{}"):
        file.write_bytes(content)
        with pytest.raises(CorsaError, match="holds no readable PEFT adapter") as caught:
            read_factors(directory)
        one_line(caught.value, directory)


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, where a whole number from 1 to 1000 can be"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000"),
        ({"vocab_size": 10**15}, "vocab_size"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"text_config": {"num_hidden_layers": 10**7}}, r"text_config\.num_hidden_layers"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings is 1000"),
        ({"num_attention_heads": 5}, "could not be loaded"),
        ({"hidden_act": "no_such_function"}, "could not be loaded"),
        ({"rope_scaling": {"rope_type": "no such"}}, "could not be loaded"),
        ({"torch_dtype": "no_such_type"}, "could not be loaded"),
        ({"model_type": "no_such_model"}, "could not be loaded"),
        ({"model_type": ["llama"]}, "could not be loaded"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "could not be loaded"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "could not be loaded"),
        ({"quantization_config": [1]}, "could not be loaded"),
    ],
)
def test_a_model_that_cannot_be_is_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | settings))
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    began = time.perf_counter()
    with pytest.raises(CorsaError, match=said) as caught:
        load_model(ModelConfig(name=str(tmp_path)))
    one_line(caught.value, tmp_path)
    if "_size" in said or "layers" in said or "max_" in said:
        for deed in (
            lambda: load_model(ModelConfig(name=f"random:{tmp_path}")),
            lambda: architecture(ModelConfig(name=str(tmp_path))),
        ):
            with pytest.raises(CorsaError, match=said) as caught:
                deed()
            one_line(caught.value, tmp_path)
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("content", ["[]", "{", DEEP, '{"vocab_size": ' + "9" * 5000 + "}", "\x00"])
def test_a_config_json_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    for name in (str(tmp_path), f"random:{tmp_path}"):
        with pytest.raises(CorsaError) as caught:
            load_model(ModelConfig(name=name))
        one_line(caught.value, tmp_path)
    with pytest.raises(CorsaError) as caught:
        architecture(ModelConfig(name=str(tmp_path)))
    one_line(caught.value, tmp_path)


@pytest.mark.parametrize(
    "content",
    ["[]", "{", "{}", '{"model": 1}', '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": [["a"]]}}'],
)
def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(CorsaError) as caught:
        load_tokenizer(ModelConfig(name=str(tmp_path)))
    one_line(caught.value, tmp_path)
