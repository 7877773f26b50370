"""Models in GGUF files: weights, tokenizer and end tokens against the original's, identity, and refused files."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf_files
import numpy as np
import pytest
import torch
from gguf_files import Original, llama3_factors, original, write

from corsa.config import ModelConfig
from corsa.errors import CorsaError
from corsa.evaluation.generation import end_tokens
from corsa.models import gguf_file
from corsa.models.loading import load_model, load_tokenizer
from corsa.models.registry import Source, locate, pin
from corsa.models.shapes import architecture
from corsa.models.templates import render

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
IDS = torch.tensor([[7, 300, 12, 410, 33, 5, 280, 281, 90, 400, 8, 301]])
TEXTS = (
    "Who grants the License?",
    "in 2024, 1,234 works  under   the terms\n\n of this License's \t notice",
    "Straße café 東京 🙂",
    "Cafe\u0301",
    "<|im_end|> and </s> and <eos> in a text",
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of its own."""
    before = os.environ.get("CORSA_CACHE")
    os.environ["CORSA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield Path(os.environ["CORSA_CACHE"])
    os.environ.pop("CORSA_CACHE")
    if before is not None:
        os.environ["CORSA_CACHE"] = before


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Original, ModelConfig]:
    """A model of a family, and the name of its GGUF file."""
    made = original(request.param)
    path = write(tmp_path_factory.mktemp(request.param) / "tiny.gguf", made)
    return made, ModelConfig(name=str(path))


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Original, Path]:
    """A llama and its file."""
    made = original("llama")
    return made, write(tmp_path / "tiny.gguf", made)


def same_logits(made: Original, path: Path) -> None:
    found = load_model(ModelConfig(name=str(path)))
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, made.model(IDS).logits, rtol=1e-4, atol=1e-4)


# What a file holds


def test_the_model_of_a_file_computes_what_the_original_does(pair: tuple[Original, ModelConfig]) -> None:
    made, config = pair
    assert made.model(IDS).logits.std() > 0.1
    same_logits(made, Path(config.name))
    found = load_model(config)
    assert type(found) is type(made.model)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in found.parameters())


def test_its_tokenizer_gives_the_original_s_ids(pair: tuple[Original, ModelConfig]) -> None:
    made, config = pair
    found = load_tokenizer(config)
    for text in TEXTS:
        for split in (False, True):
            ids = made.tokenizer(text, split_special_tokens=split)["input_ids"]
            assert found(text, split_special_tokens=split)["input_ids"] == ids
            assert found.decode(ids, skip_special_tokens=True) == made.tokenizer.decode(ids, skip_special_tokens=True)
    assert (found.eos_token_id, found.bos_token_id) == (made.tokenizer.eos_token_id, made.tokenizer.bos_token_id)
    assert len(found) == len(made.tokenizer)


def test_its_chat_template_and_end_tokens_are_the_original_s(pair: tuple[Original, ModelConfig]) -> None:
    made, config = pair
    found = load_tokenizer(config)
    assert found.chat_template == made.tokenizer.chat_template
    if found.chat_template:
        turns = [[{"role": "user", "content": "Who?"}]]
        assert render(found, turns, add_generation_prompt=True) == ["[user]Who?[model]"]
    ends = end_tokens(load_model(config), found).nonzero()[:, 0].tolist()
    assert set(ends) == made.end_ids
    assert len(ends) == (2 if made.family.startswith("qwen") else 1)


def test_quantised_weights_are_dequantised(tmp_path: Path) -> None:
    made = original("qwen3")
    before = made.model(IDS).logits
    path = write(tmp_path / "q8.gguf", made, quantised=True)
    assert not torch.equal(made.model(IDS).logits, before)
    same_logits(made, path)


@pytest.mark.parametrize(
    ("family", "scaling", "written"),
    [
        ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, "yarn"),
        ("gemma3", {"rope_type": "linear", "factor": 8.0}, "linear"),
    ],
)
def test_scaled_positions_are_read(tmp_path: Path, family: str, scaling: dict[str, Any], written: str) -> None:
    more = {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "num_hidden_layers": 6}
    made = original(family, rope_scaling=scaling, **(more if family == "gemma3" else {}))
    values: dict[str, Any] = {"rope__scaling__type": written, "rope__scaling__factor": scaling["factor"]}
    if written == "yarn":
        values["rope__scaling__original_context_length"] = 512
    path = write(tmp_path / "scaled.gguf", made, **values)
    same_logits(made, path)


def test_llama_3_s_positions_are_found_again_from_their_factors(tmp_path: Path) -> None:
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    whole = {"rope_type": "llama3", **scaling, "original_max_position_embeddings": 8192}
    made = original("llama", rope_theta=500000.0, rope_scaling=whole)
    factors = llama3_factors(500000.0, 16, factor=32.0, low=1.0, high=4.0, original=8192)
    assert {1.0, 32.0} < set(factors.tolist())
    same_logits(made, write(tmp_path / "a.gguf", made, more={"rope_freqs.weight": factors}))
    other = write(tmp_path / "b.gguf", made, more={"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)})
    with pytest.raises(CorsaError, match="scales its positions in a way that is not read from GGUF"):
        load_model(ModelConfig(name=str(other)))


def test_its_shape_is_read_without_its_weights(llama: tuple[Original, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(gguf_file, "write_model", never)
    found = architecture(ModelConfig(name=str(llama[1])))
    assert (found.hidden_size, found.num_hidden_layers, found.vocab_size) == (32, 2, len(llama[0].tokenizer))


# Names and identity


def test_a_file_and_a_directory_with_one_are_models(llama: tuple[Original, Path], tmp_path: Path) -> None:
    _, path = llama
    assert locate(str(path)) == locate(str(tmp_path)) == Source("gguf", str(path))
    plain = path.rename(tmp_path / "sha256-1234")  # as some programs keep them
    assert locate(str(plain)) == Source("gguf", str(plain))
    plain.rename(path)
    (tmp_path / "config.json").write_text("{}")  # beside the files in many directories of the hub
    assert locate(str(tmp_path)).kind == "gguf"
    (tmp_path / "model.safetensors").touch()
    assert locate(str(tmp_path)).kind == "directory"


def test_a_directory_with_several_files_is_refused(tmp_path: Path) -> None:
    for name in ("b-q4.gguf", "a-q8.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(CorsaError, match=r"has 2 GGUF files: name one of a-q8\.gguf, b-q4\.gguf$"):
        locate(str(tmp_path))
    with pytest.raises(CorsaError, match=r"there is no model file .*absent\.gguf: workers"):
        locate(str(tmp_path / "absent.gguf"))


def test_a_file_is_known_by_its_digest(
    llama: tuple[Original, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, path = llama
    pinned = pin(ModelConfig(name=str(path), template="chat"))
    assert pinned.revision == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert pinned.name == str(path)
    monkeypatch.chdir(tmp_path)
    assert pin(ModelConfig(name="tiny.gguf", template="chat")) == pin(pinned) == pinned
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    assert pin(ModelConfig(name=str(copy))).revision == pinned.revision
    made.model.get_parameter("model.embed_tokens.weight").data[5] = 0.0
    write(path, made)
    assert pin(ModelConfig(name=str(path))).revision != pinned.revision
    with pytest.raises(CorsaError, match="is another one than asked for"):
        load_model(pinned)
    with pytest.raises(CorsaError, match="is another one than asked for"):
        pin(pinned)


def test_the_digest_of_a_file_that_has_not_changed_is_not_computed_again(
    llama: tuple[Original, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = llama
    first = gguf_file.digest(path)

    def never(*_: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(hashlib, "file_digest", never)
    gguf_file._digest.cache_clear()  # another process
    assert gguf_file.digest(path) == first
    os.utime(path, (0, 0))
    with pytest.raises(AssertionError, match="read again"):
        gguf_file.digest(path)


def test_a_file_is_converted_once_wherever_it_lies(
    llama: tuple[Original, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = llama
    first = gguf_file.converted(path)
    assert first.parent == gguf_file.cache_directory() / "gguf"
    monkeypatch.setattr(gguf_file, "write_model", lambda *_: pytest.fail("converted again"))
    moved = path.rename(tmp_path / "moved.gguf")
    assert gguf_file.converted(moved) == first


# Files that are refused, in one line


def refused(path: Path, said: str) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(CorsaError, match=said) as caught:
            load(ModelConfig(name=str(path)))
        assert "\n" not in str(caught.value)


def test_an_architecture_that_is_not_read_is_named(llama: tuple[Original, Path], tmp_path: Path) -> None:
    path = write(tmp_path / "strange.gguf", llama[0], architecture="rwkv7")
    refused(path, r"the architecture 'rwkv7', which transformers does not read from GGUF \(it reads .*llama.*qwen3")


def test_truncated_and_damaged_files_are_refused(llama: tuple[Original, Path], tmp_path: Path) -> None:
    whole = llama[1].read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (30, 3000, len(whole) // 2, len(whole) - 40):
        cut.write_bytes(whole[:size])
        refused(cut, "is truncated")
    cut.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(cut, "is not a GGUF file")
    cut.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    refused(cut, "is GGUF version 1")


def test_impossible_sizes_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "huge.gguf"
    key = struct.pack("<Q", 3) + b"a.b"
    for value in (
        struct.pack("<IQ", 8, 1 << 60),  # a text
        struct.pack("<IIQ", 9, 8, 1 << 60),  # a list of texts
        struct.pack("<IIQ", 9, 4, 1 << 40),  # a list of numbers
        struct.pack("<IIQ", 9, 9, 1),  # a list of lists
    ):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + value + bytes(64))
        refused(path, "is truncated or damaged")
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + bytes(64))
    refused(path, "is truncated or damaged")


def test_a_file_that_asks_for_an_impossible_model_is_refused(llama: tuple[Original, Path], tmp_path: Path) -> None:
    made, _ = llama
    made.model.config.intermediate_size = 1 << 30
    path = write(tmp_path / "wide.gguf", made)
    with pytest.raises(CorsaError, match="asks for a model that cannot be: intermediate_size"):
        load_model(ModelConfig(name=str(path)))


def test_weights_that_are_missing_or_have_no_place_are_refused(llama: tuple[Original, Path], tmp_path: Path) -> None:
    """Transformers would draw the former at random and leave out the latter."""
    made, _ = llama
    path = write(tmp_path / "less.gguf", made, without="blk.1.ffn_up.weight")
    with pytest.raises(CorsaError, match=r"not a whole LlamaForCausalLM: it has no model\.layers\.1\.mlp\.up_proj"):
        load_model(ModelConfig(name=str(path)))
    bias = {"blk.0.attn_q.bias": np.ones(32, dtype=np.float32)}
    path = write(tmp_path / "more.gguf", made, more=bias)
    with pytest.raises(CorsaError, match=r"not a whole LlamaForCausalLM: 32 of its \d+ weights have no place"):
        load_model(ModelConfig(name=str(path)))


def test_a_part_of_a_split_file_is_refused(llama: tuple[Original, Path], tmp_path: Path) -> None:
    writer = gguf_files.gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(tmp_path / "part.gguf", "is one of 3 parts: join them first")


def test_a_full_disk_is_said_before_the_conversion(
    llama: tuple[Original, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORSA_CACHE", str(tmp_path / "small"))
    monkeypatch.setattr(gguf_file.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(CorsaError, match=r"the converted model takes .* GiB, and .*small.* has 0\.0 GiB free"):
        load_model(ModelConfig(name=str(llama[1])))


def test_without_the_gguf_package_it_says_what_to_install(
    llama: tuple[Original, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORSA_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    refused(llama[1], "GGUF files need `pip install gguf`")
