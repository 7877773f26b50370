"""Writes models as GGUF, the format of llama.cpp, Ollama and LM Studio, with the package `gguf`.

The names of tensors and keys are the package's. Two things are added here, which the format's readers expect: the rows
of Llama's query and key matrices are in the order of interleaved rotary positions, and the tokenizer names the rule by
which it splits a text. `transformers` undoes both when it reads the file; a test compares.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from corsa.errors import CorsaError

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Name of the architecture in GGUF by transformers' `model_type`."""

Stored = Literal["float32", "bfloat16", "float16"]

_ELSEWHERE = "write --merged DIR and convert it with llama.cpp's convert_hf_to_gguf.py"

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    ("bytes by words",): "gpt-2",
    ("single digits", "bytes by words"): "smollm",
    (_WORDS % r"\p{N}", "bytes"): "qwen2",
    (_WORDS % r"\p{N}{1,3}", "bytes"): "llama-bpe",
}
"""llama.cpp's name of a tokenizer's way to split a text before the merges (`tokenizer.ggml.pre`)."""


class Layout:
    """Where the weights of one model are in GGUF.

    Raises:
        CorsaError: the package `gguf` is missing, or this project does not know the layout of the architecture.
    """

    def __init__(self, config: Any) -> None:
        if find_spec("gguf") is None:
            raise CorsaError("GGUF needs the package gguf: pip install gguf")
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        if config.model_type not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CorsaError(f"a {config.model_type} model is not written as GGUF here ({known} are): {_ELSEWHERE}")
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise CorsaError(f"a model with sliding windows is not written as GGUF here: {_ELSEWHERE}")
        self.config = config
        self.architecture = ARCHITECTURES[config.model_type]
        number = next(key for key in MODEL_ARCH if MODEL_ARCH_NAMES[key] == self.architecture)
        self._names = get_tensor_name_map(number, config.num_hidden_layers)

    def name(self, parameter: str) -> str:
        """The name in GGUF of a parameter, such as `model.layers.0.mlp.up_proj.weight`."""
        name = self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise CorsaError(f"{parameter} has no place in a GGUF file of architecture {self.architecture}")
        return name

    def rows(self, parameter: str, weight: Tensor) -> Tensor:
        """The rows of a weight, a bias or a factor `b` (outputs, ...) in the order of GGUF.

        Llama's rotary positions turn rows i and i + d/2 of a head together in transformers, and rows 2i and 2i + 1 in
        llama.cpp.
        """
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = heads.get(parameter.rpartition(".")[0].rpartition(".")[2])
        if self.architecture != "llama" or count is None:
            return weight
        return weight.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)

    def rows_back(self, parameter: str, weight: Tensor) -> Tensor:
        """The inverse of `rows`."""
        order = self.rows(parameter, torch.arange(len(weight)))
        return weight[order.argsort()]


def write_model(model: nn.Module, tokenizer: Any, file: Path, stored: Stored) -> None:
    """Writes a model and its tokenizer as one GGUF file. Matrices are stored as `stored`, vectors as float32.

    Raises:
        CorsaError: this project does not know the layout, the tokenizer or the scaled positions of the model.
    """
    config: Any = model.config
    layout = Layout(config)
    from gguf import GGUFWriter, LlamaFileType

    writer = GGUFWriter(file, layout.architecture)
    kinds = {"float32": "ALL_F32", "bfloat16": "MOSTLY_BF16", "float16": "MOSTLY_F16"}
    writer.add_file_type(LlamaFileType[kinds[stored]])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if (scaled := _positions(writer, config, head)) is not None:
        writer.add_tensor("rope_freqs.weight", scaled.numpy())
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    tied = config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            _add_tensor(writer, layout.name(name), layout.rows(name, weight), stored)
    finish(writer)


def finish(writer: GGUFWriter) -> None:
    """Writes the header, the keys and the tensors."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tensor(writer: GGUFWriter, name: str, weight: Tensor, stored: Stored) -> None:
    from gguf import GGMLQuantizationType, quants

    kinds = {
        "float32": GGMLQuantizationType.F32,
        "bfloat16": GGMLQuantizationType.BF16,
        "float16": GGMLQuantizationType.F16,
    }
    kind = kinds[stored] if weight.dim() > 1 else GGMLQuantizationType.F32  # llama.cpp adds vectors in float32 alone
    writer.add_tensor(name, quants.quantize(weight.detach().float().cpu().contiguous().numpy(), kind), raw_dtype=kind)


def _positions(writer: GGUFWriter, config: Any, head: int) -> Tensor | None:
    """Writes the keys of the rotary positions. Returns Llama 3's factors (head / 2,), by which frequencies are divided.

    Raises:
        CorsaError: positions are scaled in another way.
    """
    given: Mapping[str, Any] = config.rope_parameters
    base, kind = float(given["rope_theta"]), given.get("rope_type", "default")
    writer.add_rope_freq_base(base)
    if kind == "default":
        return None
    if kind == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = base ** (-torch.arange(0, head, 2, dtype=torch.float32) / head)
        return plain / scaled
    if kind == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(given["factor"]))
        return None
    raise CorsaError(f"positions scaled by {kind!r} are not written as GGUF here: {_ELSEWHERE}")


def _add_tokenizer(writer: GGUFWriter, tokenizer: Any, rows: int) -> None:
    """Writes the tokenizer; `rows` of the embedding that have no token become unused tokens."""
    from gguf import SpecialVocab, TokenType

    described = json.loads(tokenizer.backend_tokenizer.to_str())
    splits = _splits(described.get("pre_tokenizer"))
    if described["model"]["type"] != "BPE" or splits not in _SPLITS:
        raise CorsaError(
            f"the tokenizer of {tokenizer.name_or_path} splits texts in a way that is not written as GGUF here: "
            f"{_ELSEWHERE}"
        )
    known = {token: number for token, number in tokenizer.get_vocab().items() if number < rows}
    texts = {number: token for token, number in known.items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(rows):
        tokens.append(texts.get(number, f"[PAD{number}]"))
        kind = TokenType.NORMAL if number in texts else TokenType.UNUSED
        if number in added:
            kind = TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED
        types.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_SPLITS[splits])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special = SpecialVocab(folder, load_merges=True, n_vocab=rows)
    begun = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    special.add_special_token = {"bos": begun, "eos": False}
    special.add_to_gguf(writer, quiet=True)


def _splits(described: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The steps of a tokenizer's splitting, in the words of `_SPLITS`; () if one is of another kind."""
    if described is None:
        return ()
    if described["type"] == "Sequence":
        parts = [_splits(part) for part in described["pretokenizers"]]
        return tuple(step for part in parts for step in part) if all(parts) else ()
    if described["type"] == "ByteLevel" and not described["add_prefix_space"]:
        return ("bytes by words" if described["use_regex"] else "bytes",)
    if described["type"] == "Digits" and described["individual_digits"]:
        return ("single digits",)
    if described["type"] == "Split" and described["behavior"] == "Isolated" and not described["invert"]:
        return (described["pattern"].get("Regex", ""),)
    return ()
