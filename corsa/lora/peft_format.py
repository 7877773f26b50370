"""Adapters on disk are plain PEFT directories: `adapter_config.json` and `adapter_model.safetensors`.

PEFT, transformers and vLLM load them without this project. Nothing here imports peft (it takes seconds): the format is
two files, and a test holds them against PEFT itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from corsa.errors import CorsaError
from corsa.lora.factors import Adapter, Factors
from corsa.lora.flat import Lora

PREFIX = "base_model.model."

TENSOR = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

EXTENSIONS = (
    *("use_dora", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
    *("alora_invocation_tokens", "modules_to_save", "trainable_token_indices", "target_parameters"),
    *("layer_replication", "lora_bias", "fan_in_fan_out"),
)
"""Settings of PEFT's LoraConfig that make an adapter more than a product of two factors added to linear layers."""

INITIAL = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model as it is; PiSSA, OLoRA and the others change it."""


def save_adapter(lora: Lora, directory: Path, base_model: str, row: int = 0) -> None:
    """Write adapter `row` of phi as a PEFT directory."""
    pairs = zip(lora.sites, lora.factors()[0::2], lora.factors()[1::2], strict=True)
    _write(
        {site.name: (a[row], b[row]) for site, a, b in pairs},
        directory,
        base_model,
        r=lora.config.rank,
        lora_alpha=lora.config.alpha,
        target_modules=lora.target_modules,
    )


def write_factors(adapter: Adapter, directory: Path, base_model: str) -> None:
    """Write factors as a PEFT directory of scale 1: `r` is the largest rank and `lora_alpha` the same.

    Layers of a smaller rank are listed in PEFT's `rank_pattern` and `alpha_pattern`, with their full names, and so
    are all layers in `target_modules`: a merged adapter need not be on every layer of a kind.

    Raises:
        CorsaError: the adapter has no layers.
    """
    if not adapter:
        raise CorsaError(f"there is nothing to write to {directory}: the adapter changes no layer")
    r = max(factors.rank for factors in adapter.values())
    # PEFT takes the keys for regular expressions that match the end of a name
    ranks = {f"^{re.escape(name)}": factors.rank for name, factors in adapter.items() if factors.rank != r}
    _write(
        {name: (factors.a, factors.b) for name, factors in adapter.items()},
        directory,
        base_model,
        r=r,
        lora_alpha=r,
        target_modules=sorted(adapter),
        **({"rank_pattern": ranks, "alpha_pattern": ranks} if ranks else {}),
    )


def load_adapter(lora: Lora, directory: str | Path, row: int = 0) -> None:
    """Read a PEFT directory into adapter `row` of phi.

    Raises:
        CorsaError: the directory holds no adapter, or one of another shape or scale.
    """
    directory = Path(directory)
    tensors, config = _read(directory)
    for site in lora.sites:
        alpha, rank = _alpha_and_rank(config, site.name)
        if config.get("use_rslora") or alpha / rank != lora.scale:
            raise CorsaError(
                f"adapter {directory} is scaled by {alpha}/{rank}{' with rslora' if config.get('use_rslora') else ''}, "
                f"the run by {lora.config.alpha:g}/{lora.config.rank}: "
                "set --lora.rank and --lora.alpha to the adapter's"
            )
    places = {f"{PREFIX}{site.name}.lora_{factor}.weight" for site in lora.sites for factor in "AB"}
    if strange := sorted(set(tensors) - places):
        raise CorsaError(
            f"adapter {directory}: {strange[0]} has no place in this model ({len(strange)} such in all); "
            "adapters of the decoder's linear layers, without extensions of LoRA, can be read"
        )
    with torch.no_grad():
        for site, a, b in zip(lora.sites, lora.factors()[0::2], lora.factors()[1::2], strict=True):
            for factor, name in ((a, "lora_A"), (b, "lora_B")):
                key = f"{PREFIX}{site.name}.{name}.weight"
                if key not in tensors or tensors[key].shape != factor.shape[1:]:
                    found = f"has shape {tuple(tensors[key].shape)}" if key in tensors else "is absent"
                    raise CorsaError(f"adapter {directory}: {key} {found}, expected {tuple(factor.shape[1:])} here")
                factor[row].copy_(tensors[key])


def read_factors(directory: str | Path) -> tuple[Adapter, str]:
    """The factors in a PEFT directory, in float32 with the scale in `b`, and the name of the base model.

    The scale is alpha / r, or alpha / sqrt(r) with rslora (Kalajdzievski 2023), by layer where the adapter has
    patterns.

    Raises:
        CorsaError: the directory holds no adapter, or one that is more than two factors a linear layer.
    """
    directory = Path(directory)
    tensors, config = _read(directory)
    file = directory / "adapter_model.safetensors"
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = TENSOR.fullmatch(key)
        if match is None:
            raise CorsaError(f"{file}: {key} is no factor of a linear layer; only plain LoRA can be read")
        pairs.setdefault(match["module"], {})[match["factor"]] = tensor.float()
    adapter: Adapter = {}
    for name, pair in pairs.items():
        alpha, rank = _alpha_and_rank(config, name)
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None:
            raise CorsaError(f"{file}: {name} has lora_{'B' if a is None else 'A'} without the other factor")
        if a.dim() != 2 or b.dim() != 2 or len(a) != rank or b.shape[1] != rank:
            raise CorsaError(
                f"{file}: the factors of {name} have shapes {tuple(a.shape)} and {tuple(b.shape)}, where "
                f"adapter_config.json says rank {rank}"
            )
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        adapter[name] = Factors(a, b if scale == 1 else scale * b)
    return adapter, config.get("base_model_name_or_path") or ""


def _write(factors: Mapping[str, tuple[Tensor, Tensor]], directory: Path, base_model: str, **settings: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, pair in factors.items():
        for letter, factor in zip("AB", pair, strict=True):
            tensors[f"{PREFIX}{name}.lora_{letter}.weight"] = (
                factor.detach().cpu().clone(memory_format=torch.contiguous_format)
            )
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": settings.pop("r"),
        "lora_alpha": settings.pop("lora_alpha"),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **settings,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _read(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of a plain LoRA."""
    try:
        tensors = load_file(directory / "adapter_model.safetensors")
        config = json.loads((directory / "adapter_config.json").read_text())
    except (OSError, SafetensorError, json.JSONDecodeError) as e:
        raise CorsaError(f"{directory} holds no readable PEFT adapter: {e}") from e
    found = None
    if config.get("peft_type") != "LORA":
        found = f"peft_type is {config.get('peft_type')}"
    elif config.get("bias", "none") != "none":
        found = f"bias is {config['bias']}"
    elif (initial := config.get("init_lora_weights", True)) not in INITIAL:
        found = f"init_lora_weights is {initial}, which changes the base model"
    elif extensions := [name for name in EXTENSIONS if config.get(name)]:
        found = f"{extensions[0]} is set"
    if found is not None:
        raise CorsaError(
            f"{directory / 'adapter_config.json'}: {found}; only plain LoRA can be read: "
            "merge the adapter into its base model with PEFT, and use that as the base"
        )
    return tensors, config


def _alpha_and_rank(config: dict[str, Any], module: str) -> tuple[float, int]:
    """lora_alpha and r of a layer: its pattern's, by PEFT's rule (the first that matches the end of its name)."""

    def setting(pattern: str, default: str) -> Any:
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return config.get(default, 8)  # PEFT's default of both

    return setting("alpha_pattern", "lora_alpha"), setting("rank_pattern", "r")
