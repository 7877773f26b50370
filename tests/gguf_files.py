"""Tiny models and tokenizers, and GGUF files of them, written with the `gguf` package as llama.cpp's converter does
(convert_hf_to_gguf.py: names, llama's interleaved heads, Gemma's norms plus one).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedModel,
    Qwen2Tokenizer,
)

CHAT = "{% for m in messages %}[{{m.role}}]{{m.content}}{% endfor %}{% if add_generation_prompt %}[model]{% endif %}"
TEXT = (Path(__file__).parents[1] / "LICENSE").read_text()
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
AFTER_ATTENTION = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}


@dataclass
class Original:
    """A model with its tokenizer, and what its GGUF file says beside the weights."""

    family: str
    model: PreTrainedModel
    tokenizer: Any
    metadata: dict[str, Any]

    @property
    def end_ids(self) -> set[int]:
        """The end tokens of its generation config."""
        ends = self.model.generation_config.eos_token_id  # type: ignore[union-attr]
        return set(ends) if isinstance(ends, list) else {ends}  # type: ignore[arg-type]


def original(family: str, **change: Any) -> Original:
    """A tiny random model of the family: llama, qwen2, qwen3 or gemma3."""
    tokenizer, metadata = {"llama": _llama, "gemma3": _gemma}.get(family, _qwen)()
    kind = "gemma3_text" if family == "gemma3" else family
    more: dict[str, Any] = {"query_pre_attn_scalar": 16, "sliding_window": 4} if family == "gemma3" else {}
    if family in ("llama", "qwen2"):
        more["tie_word_embeddings"] = family == "qwen2"
    config = AutoConfig.for_model(kind, **{**SHAPE, "vocab_size": len(tokenizer), **more, **change})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        for name, weight in model.named_parameters():
            size = 0.3 if weight.dim() == 2 and "embed" not in name else 0.05
            weight.add_(size * torch.randn(weight.shape))  # norms and biases too: none stays one or zero
    ends = [tokenizer.eos_token_id]
    ends += [token for text, token in tokenizer.get_added_vocab().items() if text == "<|endoftext|>"]
    model.generation_config.eos_token_id = list(dict.fromkeys(ends))  # type: ignore[union-attr]
    return Original(family, model.eval().requires_grad_(False), tokenizer, metadata)


def write(
    path: Path,
    original: Original,
    *,
    quantised: bool = False,
    without: str = "",
    more: dict[str, np.ndarray] | None = None,
    architecture: str | None = None,
    **metadata: Any,
) -> Path:
    """Writes a GGUF file. `without` leaves out one tensor, `more` adds some, `metadata` adds values for the
    architecture. `quantised`: the matrices as Q8_0, which the original model then has as well.
    """
    config, family = original.model.config, original.family
    writer = gguf.GGUFWriter(path, architecture or family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if family == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if family in ("qwen3", "gemma3"):
        writer.add_key_length(config.head_dim)
    if family == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    for name, value in metadata.items():
        writer.add_key_value(f"{family}.{name.replace('__', '.')}", value, _type(value))
    _write_tokenizer(writer, original.tokenizer, original.metadata)
    tensors = _tensors(original, quantised)
    for name, (value, kind) in {**tensors, **{n: (v, None) for n, v in (more or {}).items()}}.items():
        if name != without:
            writer.add_tensor(name, value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_factors(theta: float, size: int, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """The factor of each frequency, as llama.cpp's converter computes them from a config.json of Llama 3."""
    found = []
    for i in range(0, size, 2):
        wave = 2 * math.pi * theta ** (i / size)
        if wave < original / high:
            found.append(1.0)
        elif wave > original / low:
            found.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


def _type(value: Any) -> Any:
    kinds = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
    return kinds[type(value)]


def _tensors(original: Original, quantised: bool) -> dict[str, tuple[np.ndarray, Any]]:
    gemma = original.family == "gemma3"
    names = NAMES | (GEMMA_NORMS if gemma else AFTER_ATTENTION)
    config, found = original.model.config, {}
    state = dict(original.model.named_parameters())  # a tied output is there once
    for full, weight in state.items():
        name, suffix = full.rsplit(".", 1)
        block = ""
        if name.startswith("model.layers."):
            number, name = name.removeprefix("model.layers.").split(".", 1)
            block = f"blk.{number}."
        value = weight.detach().numpy().copy()
        kind = None
        if quantised and value.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(value, kind)
            weight.data.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))
            value = packed
        if original.family == "llama" and names[name] in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if names[name] == "attn_q" else config.num_key_value_heads
            value = value.reshape(heads, 2, value.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
        if gemma and name.endswith("norm"):
            value = value + 1
        found[f"{block}{names[name]}.{suffix}"] = (value, kind)
    return found


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, metadata: dict[str, Any]) -> None:
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    tokens = [token for token, _ in by_id]
    special = set(tokenizer.all_special_tokens)

    def kind(token: str) -> int:
        if token in special:
            return gguf.TokenType.CONTROL
        return gguf.TokenType.BYTE if token.startswith("<0x") else gguf.TokenType.NORMAL

    writer.add_tokenizer_model(metadata["model"])
    writer.add_tokenizer_pre(metadata["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types([kind(token) for token in tokens])
    if metadata["model"] == "llama":
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        writer.add_add_space_prefix(metadata["space"])
        writer.add_unk_token_id(tokenizer.unk_token_id)
    else:
        writer.add_token_merges(metadata["merges"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(metadata["model"] == "llama")
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _qwen() -> tuple[Any, dict[str, Any]]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    vocabulary, merges = _trained(backend, pre_tokenizers.ByteLevel.alphabet(), [])
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        vocabulary[token] = len(vocabulary)
    none: Any = None  # as the published tokenizers have it
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=none,
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHAT
    return tokenizer, {"model": "gpt2", "pre": "qwen2", "merges": [" ".join(merge) for merge in merges]}


def _llama() -> tuple[Any, dict[str, Any]]:
    vocabulary, merges = _sentencepiece(["<unk>", "<s>", "</s>"], prefix=True)
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    tokenizer.chat_template = CHAT
    return tokenizer, {"model": "llama", "pre": "default", "space": True}


def _gemma() -> tuple[Any, dict[str, Any]]:
    vocabulary, merges = _sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], prefix=False)
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    return tokenizer, {"model": "llama", "pre": "default", "space": False}


def _sentencepiece(special: list[str], prefix: bool) -> tuple[dict[str, int], list[Any]]:
    """A vocabulary with a token for each byte, in the order in which it was merged."""
    backend = Tokenizer(models.BPE())
    scheme = "always" if prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _trained(backend, [], [*special, *(f"<0x{byte:02X}>" for byte in range(256))])


def _trained(backend: Any, alphabet: list[str], special: list[str]) -> tuple[dict[str, int], list[Any]]:
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(TEXT.splitlines(), trainer)
    found = json.loads(backend.to_str())["model"]
    return found["vocab"], [tuple(merge) for merge in found["merges"]]
