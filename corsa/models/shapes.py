"""The architecture of a model without its weights. Known architectures need no network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from corsa.config import ModelConfig
from corsa.errors import CorsaError
from corsa.models.gguf_file import described
from corsa.models.registry import ARCHITECTURES, locate

_LAYERS, _WIDE, _MANY = 1_000, 1 << 20, 1 << 24
LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), 10 * _LAYERS),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 10 * _LAYERS),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), _WIDE),
    **dict.fromkeys(("head_dim", "n_embd", "d_model"), _WIDE),
    "vocab_size": _MANY,
}
"""Upper bounds for sizes in a config.json, well above every existing model. Larger sizes would exhaust the memory."""
_LARGEST_NUMBER = 1 << 40  # upper bound of any other number


def architecture(config: ModelConfig) -> PreTrainedConfig:
    """The transformers configuration of a model: from the registry for an alias or a `random:` architecture, else from
    the model's config.json or GGUF file.

    Raises:
        CorsaError: the config.json or file cannot be read.
    """
    return _whole(config).get_text_config()


def skeleton(config: ModelConfig) -> PreTrainedModel:
    """The model without weights: every module, on the meta device.

    Raises:
        CorsaError: the config.json or file cannot be read, or transformers has no such model.
    """
    found = _whole(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(found, attn_implementation="sdpa")
    except Exception as e:  # transformers raises any type
        raise CorsaError(f"the architecture of model {config.name!r} could not be loaded: {first_line(e)}") from e


def _whole(config: ModelConfig) -> PreTrainedConfig:
    name = config.name.removeprefix("random:")
    if name in ARCHITECTURES:
        entries = dict(ARCHITECTURES[name])
        return AutoConfig.for_model(entries.pop("model_type"), **entries)
    try:
        source = locate(config.name)
        if source.kind == "gguf":
            return read_architecture(str(described(Path(source.place))))
        return read_architecture(source.place, config.revision or "main")
    except CorsaError:
        raise
    except Exception as e:
        raise CorsaError(
            f"the shape of model {config.name!r} cannot be read: {first_line(e)}. Name a directory "
            f"with its config.json, make the hub reachable, or plan with one of {', '.join(ARCHITECTURES)}"
        ) from e


def read_architecture(place: str, revision: str = "main") -> PreTrainedConfig:
    """Reads the config.json of a directory or of a hub model. The file is untrusted.

    Raises:
        CorsaError: a size in it is impossible.
        Exception: it cannot be loaded or is invalid; transformers and its dependencies raise any type.
    """
    entries, _ = PreTrainedConfig.get_config_dict(place, revision=revision)
    if fault := impossible(entries):
        raise CorsaError(f"the config.json of {place} asks for a model that cannot be: {fault}")
    return AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)


def impossible(entries: Mapping[str, Any]) -> str | None:
    """Describes the first number in a config.json that is out of bounds; None if there is none."""
    left: list[tuple[str, Any]] = list(entries.items())
    while left:
        name, value = left.pop()
        key = name.rpartition(".")[2]
        if isinstance(value, Mapping):
            left += [(f"{name}.{inner}", one) for inner, one in value.items()]
        elif key in LARGEST and value is not None and not isinstance(value, list):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST[key]:
                return f"{name} is {repr(value)[:40]}, where a whole number from 1 to {LARGEST[key]} can be"
        elif isinstance(value, int | float) and not abs(value) <= _LARGEST_NUMBER:
            return f"{name} is {repr(value)[:40]}"
    return None


def first_line(error: BaseException) -> str:
    """The error in one line. A validator's first line names only the class, so its second line is added."""
    if isinstance(error, KeyError):  # its text is the key alone
        return f"{str(error)[:80]} is not known"
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])[:400] or type(error).__name__
