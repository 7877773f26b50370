"""Models in GGUF files, of any architecture that transformers reads from GGUF. A file is dequantised once, to float32
safetensors in the cache directory under the file's digest, with its tokenizer, chat template and end tokens.

A lock keeps two processes from converting at once. An interrupted conversion is started again. Nothing here imports
torch or transformers before a conversion: planning needs the digest alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from filelock import FileLock

from corsa.errors import CorsaError
from corsa.models.gguf_header import Header, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<end_of_utterance>",
)
"""Texts of tokens that end an answer in a chat, as llama.cpp knows them (src/llama-vocab.cpp): a GGUF file names one
end token, and a model's generation config often more."""

_TWENTY_SEVEN_BILLION = {"gemma2": 46, "gemma3": 62}
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def cache_directory() -> Path:
    """Where converted models are kept: $CORSA_CACHE, or ~/.cache/corsa."""
    return Path(os.environ.get("CORSA_CACHE", Path.home() / ".cache" / "corsa"))


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """A directory in the cache. `make` fills it unless it is complete."""
    target = cache_directory() / name
    if (target / "complete").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "complete").exists():  # another process may have made it while this one waited
            shutil.rmtree(target, ignore_errors=True)
            make(target)
            (target / "complete").touch()
    return target


def digest(file: Path) -> str:
    """The first 16 hexadecimal digits of the file's SHA-256. The cache keeps it for the file's path, size and time of
    change, so that a large file is read once.

    Raises:
        CorsaError: the file cannot be read.
    """
    try:
        found = file.stat()
        return _digest(file, found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise CorsaError(f"model file {file} cannot be read: {error.strerror or error}") from error


@lru_cache(maxsize=64)
def _digest(file: Path, size: int, changed: int) -> str:
    known = cache_directory() / "gguf" / "digests" / f"{hashlib.sha256(str(file).encode()).hexdigest()[:16]}.json"
    state = {"file": str(file), "size": size, "mtime_ns": changed}
    with suppress(OSError, ValueError):
        kept = json.loads(known.read_text())
        if kept == state | {"digest": kept["digest"]}:
            return kept["digest"]
    with file.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()[:16]
    with suppress(OSError):  # a cache that cannot be written costs time only
        known.parent.mkdir(parents=True, exist_ok=True)
        aside = known.with_suffix(f".{uuid4().hex}")
        aside.write_text(json.dumps(state | {"digest": found}))
        aside.replace(known)
    return found


def described(file: Path) -> Path:
    """Directory with the model's configuration and tokenizer alone, made at the first call: half a minute of
    one core for a vocabulary of 150,000 tokens.
    """

    def make(target: Path) -> None:
        write_tokenizer(file, target)
        read_config(file).save_pretrained(target)

    return cached(f"gguf/{digest(file)}-described", make)


def converted(file: Path) -> Path:
    """Directory with the model and its tokenizer, made at the first call: 50 s more of one core for 0.5 billion
    parameters. It takes 4 bytes a parameter.
    """

    def make(target: Path) -> None:
        from transformers import AutoConfig

        shutil.copytree(described(file), target, ignore=shutil.ignore_patterns("complete"))
        write_model(file, AutoConfig.from_pretrained(target), target)

    return cached(f"gguf/{digest(file)}", make)


def write_tokenizer(file: Path, target: Path) -> None:
    """Writes the tokenizer of a GGUF file with its chat template.

    Raises:
        CorsaError: the file is damaged, or transformers does not read its tokenizer.
    """
    header = _header(file)
    from tokenizers import normalizers
    from transformers import TokenizersBackend

    try:
        tokenizer = TokenizersBackend.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # transformers and tokenizers raise any exception
        raise CorsaError(f"the tokenizer of model file {file} cannot be read: {error}") from error
    backend = tokenizer.backend_tokenizer
    if header.metadata.get("tokenizer.ggml.pre") == "qwen2" and backend.normalizer is None:
        backend.normalizer = normalizers.NFC()  # as Qwen2Tokenizer; GGUF does not say it
    tokenizer.save_pretrained(target)


def write_model(file: Path, config: PreTrainedConfig, target: Path) -> None:
    """Writes the weights of a GGUF file, dequantised to float32, and their configuration (`read_config`).

    Raises:
        CorsaError: the file is damaged, its model is not read (whole) by transformers, or the disk is full.
    """
    header = _header(file)
    _refuse_full_disk(header, target)
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what transformers would only warn of is refused below
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        read, found = loaded
    except Exception as error:  # of shapes, types, architectures that are no language models, and more
        raise CorsaError(f"the weights of model file {file} cannot be read: {error}") from error
    finally:
        logging.set_verbosity(before)
    _refuse_lost_weights(file, header, read, found["missing_keys"])
    with torch.device("meta"):  # transformers refuses to save a model that it read from GGUF
        plain = type(read)(config)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(target)


def read_config(file: Path) -> PreTrainedConfig:
    """The transformers configuration of a GGUF file's model: as transformers reads it, with what it leaves out.

    Raises:
        CorsaError: the file is damaged, or transformers does not read its architecture.
    """
    header = _header(file)
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    from corsa.models.shapes import first_line, impossible

    try:
        entries, _ = PreTrainedConfig.get_config_dict(str(file.parent), gguf_file=file.name)
        entries |= _left_out(file, header)
        if fault := impossible(entries):
            raise CorsaError(f"model file {file} asks for a model that cannot be: {fault}")
        return AutoConfig.for_model(entries.pop("model_type"), **entries)
    except CorsaError:
        raise
    except Exception as error:
        known = sorted({*GGUF_CONFIG_ARCHS, *GGUF_SUPPORTED_ARCHITECTURES} - {"general"})
        if header.architecture not in known and "not supported" in str(error):
            raise CorsaError(
                f"model file {file} has the architecture {header.architecture!r}, which transformers does not read "
                f"from GGUF (it reads {', '.join(known)}): name the model's own directory or its name on the hub"
            ) from error
        raise CorsaError(f"the configuration of model file {file} cannot be read: {first_line(error)}") from error


def _header(file: Path) -> Header:
    if find_spec("gguf") is None:
        raise CorsaError(f"model file {file} cannot be read: GGUF files need `pip install gguf`")
    return read_header(file)


def _left_out(file: Path, header: Header) -> dict[str, Any]:
    """What transformers does not read from the metadata, under the names of its configurations."""
    found: dict[str, Any] = {}
    ends = end_tokens(header)
    if len(ends) > 1:
        found["eos_token_id"] = ends
    head = header.of_the_architecture("attention.key_length")
    if header.architecture == "qwen3" and head:
        found["head_dim"] = head
    if header.architecture in _TWENTY_SEVEN_BILLION and head:
        # As llama.cpp (src/models/gemma3.cpp): heads' size, but in the largest model the width per head.
        found["query_pre_attn_scalar"] = head
        if header.of_the_architecture("block_count") == _TWENTY_SEVEN_BILLION[header.architecture]:
            width, heads = (header.of_the_architecture(k) for k in ("embedding_length", "attention.head_count"))
            found["query_pre_attn_scalar"] = width // heads
    if local := header.of_the_architecture("rope.freq_base_swa"):
        found["rope_local_base_freq"] = local
    if scaling := _scaled_positions(file, header):
        found["rope_scaling"] = scaling
    return found


def end_tokens(header: Header) -> list[int]:
    """Every token that ends an answer: those that the file names, and in a chat model those of `TURN_ENDS`."""
    tokenizer = {key.removeprefix("tokenizer."): value for key, value in header.metadata.items()}
    named = [tokenizer.get(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    known = [end for end in named if end is not None]
    if "chat_template" in tokenizer:
        texts, kinds = tokenizer.get("ggml.tokens", []), tokenizer.get("ggml.token_type", [])
        for token, (text, kind) in enumerate(zip(texts, kinds, strict=False)):
            unknown = token == tokenizer.get("ggml.unknown_token_id")
            if kind in (_CONTROL, _USER_DEFINED) and text in TURN_ENDS and not unknown:
                known.append(token)
    return list(dict.fromkeys(known))


def _scaled_positions(file: Path, header: Header) -> dict[str, Any] | None:
    """How rotary positions are scaled; None if they are not.

    Raises:
        CorsaError: they are scaled in a way that cannot be told from the file.
    """
    kind, factor = (header.of_the_architecture(f"rope.scaling.{name}") for name in ("type", "factor"))
    original = header.of_the_architecture("rope.scaling.original_context_length")
    if "rope_freqs.weight" in header.tensors:
        return _llama3_scaling(file, header)
    if kind in (None, "none") or header.architecture == "gpt-oss":  # transformers reads gpt-oss's
        return None
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor and original:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise CorsaError(
        f"model file {file} scales its positions ({kind}) in a way that is not read from GGUF: name the model's own "
        "directory or its name on the hub"
    )


def _llama3_scaling(file: Path, header: Header) -> dict[str, Any]:
    """Llama 3's scaling. The file holds a factor for each frequency, from which the parameters are found again."""
    import numpy as np
    from gguf import GGUFReader

    (tensor,) = (t for t in GGUFReader(file).tensors if t.name == "rope_freqs.weight")
    stored = np.asarray(tensor.data, dtype=np.float64)
    theta, factor = header.of_the_architecture("rope.freq_base") or 10000.0, float(stored.max())
    wave = 2 * math.pi * theta ** (np.arange(len(stored)) / len(stored))
    low, high, original = _LLAMA3.values()
    share = np.clip((original / wave - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - share) / factor + share), stored, rtol=1e-3):
        raise CorsaError(
            f"model file {file} scales its positions in a way that is not read from GGUF: name the model's own "
            "directory or its name on the hub"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _refuse_full_disk(header: Header, target: Path) -> None:
    needed = 4 * sum(math.prod(shape) for shape in header.tensors.values())
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise CorsaError(
            f"the converted model takes {needed / 2**30:.1f} GiB, and {target.parent} has {free / 2**30:.1f} GiB free: "
            "make room, or let CORSA_CACHE name a directory on a larger disk"
        )


def _refuse_lost_weights(file: Path, header: Header, model: Any, missing: Any) -> None:
    """Refuses what transformers does in silence: leave out tensors without a place, and draw those that are missing."""
    layers = model.config.get_text_config().num_hidden_layers
    given = 0
    for name, shape in header.tensors.items():
        block = name.split(".")[1] if name.startswith("blk.") else "-1"
        if not name.startswith("rope_") and int(block) < layers:  # later blocks predict further tokens
            given += math.prod(shape)
    kept = sum({tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}.values())  # tied ones once
    if missing or given > kept:
        fault = f"it has no {sorted(missing)[0]}" if missing else f"{given - kept} of its {given} weights have no place"
        raise CorsaError(
            f"model file {file} is not a whole {type(model).__name__}: {fault}. Name the model's own directory or its "
            "name on the hub"
        )
