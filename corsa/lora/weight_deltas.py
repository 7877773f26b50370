"""Dense changes of weights on disk: `delta.safetensors` and `delta.json`. `corsa.lora.attached` adds one to a model and
removes it, without modifying the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from corsa.errors import CorsaError

DESCRIPTION = "delta.json"


def save_delta(delta: Mapping[str, Tensor], directory: Path, base_model: str) -> None:
    """Write `delta` (module name -> (out, in)) as float32, and the name of its base model."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.weight": change.detach().float().cpu().contiguous() for name, change in delta.items()}
    save_file(tensors, directory / "delta.safetensors", metadata={"format": "pt"})
    described = {"base_model_name_or_path": base_model, "modules": sorted(delta)}
    (directory / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n")


def load_delta(directory: str | Path) -> dict[str, Tensor]:
    """What `save_delta` wrote: module name -> change of its weight (out, in), float32.

    Raises:
        CorsaError: the directory has no readable delta.
    """
    try:
        tensors = load_file(Path(directory) / "delta.safetensors")
    except (OSError, SafetensorError) as e:
        raise CorsaError(f"{directory} holds no readable weight delta (delta.safetensors): {e}") from e
    return {name.removesuffix(".weight"): change for name, change in tensors.items()}


def base_of(directory: str | Path) -> str:
    """The name of the base model of a delta.

    Raises:
        CorsaError: delta.json does not say it.
    """
    file = Path(directory) / DESCRIPTION
    try:
        return str(json.loads(file.read_text())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CorsaError(f"{file} does not name the base model: give --model") from e
