"""Adapters on disk are plain PEFT directories: `adapter_config.json` and `adapter_model.safetensors`.

PEFT, transformers and vLLM load them without this project. This module does not import peft, which takes seconds. A
test compares the two files with those of PEFT.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from corsa.errors import CorsaError
from corsa.lora.extensions import refuse_extensions
from corsa.lora.factors import Adapter, Factors
from corsa.lora.flat import Lora
from corsa.lora.peft_settings import FILE, alpha_and_rank, read_settings

PREFIX = "base_model.model."

TENSOR = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


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

    PEFT's `rank_pattern` and `alpha_pattern` list the layers of a smaller rank by full name. `target_modules` lists all
    layers by full name, because a merged adapter may cover only some layers of a kind.

    Raises:
        CorsaError: the adapter has no layers.
    """
    if not adapter:
        raise CorsaError(f"there is nothing to write to {directory}: the adapter changes no layer")
    r = max(factors.rank for factors in adapter.values())
    # PEFT treats the keys as regular expressions that match the end of a name
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
        CorsaError: the directory has no adapter, or the adapter has another shape or scale.
    """
    directory = Path(directory)
    tensors, config = _read(directory)
    scale_of = alpha_and_rank(config, directory / FILE)
    for site in lora.sites:
        alpha, rank = scale_of(site.name)
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

    The scale is alpha / r, or alpha / sqrt(r) with rslora (Kalajdzievski 2023), per layer if the adapter has
    patterns.

    Raises:
        CorsaError: the directory has no adapter, or the adapter has more than two factors per linear layer.
    """
    directory = Path(directory)
    tensors, config = _read(directory)
    file = directory / "adapter_model.safetensors"
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = TENSOR.fullmatch(key)
        if match is None:
            raise CorsaError(f"{file}: {key} is no factor of a linear layer; only plain LoRA can be read")
        pairs.setdefault(match["module"], {})[match["factor"]] = tensor
    adapter: Adapter = {}
    scale_of = alpha_and_rank(config, directory / FILE)
    for name, pair in pairs.items():
        alpha, rank = scale_of(name)
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None:
            raise CorsaError(f"{file}: {name} has lora_{'B' if a is None else 'A'} without the other factor")
        if a.dim() != 2 or b.dim() != 2 or len(a) != rank or b.shape[1] != rank:
            raise CorsaError(
                f"{file}: the factors of {name} have shapes {tuple(a.shape)} and {tuple(b.shape)}, where "
                f"adapter_config.json says rank {rank}"
            )
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        b = b if scale == 1 else scale * b
        if not b.isfinite().all():
            raise CorsaError(f"{file}: the factors of {name}, scaled by {alpha:g}/{rank}, are beyond float32")
        adapter[name] = Factors(a, b)
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
    """The tensors, float32 and finite, and the configuration of a plain LoRA."""
    file = directory / "adapter_model.safetensors"
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    except Exception as e:  # the library passes on OSError, SafetensorError, KeyError, ...
        raise CorsaError(f"{directory} holds no readable PEFT adapter: {str(e).splitlines()[0]}") from e
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CorsaError(
                f"{file}: {name} has values that are not finite (NaN, infinite, or beyond float32): the adapter is "
                "damaged, or its training had failed"
            )
    config = read_settings(directory)
    refuse_extensions(config, directory / "adapter_config.json")
    return tensors, config
