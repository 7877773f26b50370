"""Adapters as GGUF files, for llama.cpp and Ollama: the factors of each layer under the layer's name in GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from corsa.errors import CorsaError
from corsa.lora.factors import Adapter, Factors
from corsa.models.gguf_writing import Layout, finish


def write_lora(adapter: Adapter, config: Any, file: Path) -> None:
    """Writes factors as a GGUF adapter, in float32. `config` is that of the base model (transformers).

    llama.cpp multiplies the change of a layer by alpha / (rank of the layer). alpha is the largest rank here, and a
    smaller layer's `b` is divided by the rest.

    Raises:
        CorsaError: this project does not know the layout of the base model.
    """
    layout = Layout(config)
    from gguf import GGUFType, GGUFWriter, Keys

    writer = GGUFWriter(file, layout.architecture)
    alpha = max(factors.rank for factors in adapter.values())
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(alpha))
    for module, factors in adapter.items():
        parameter = f"{module}.weight"
        b = layout.rows(parameter, factors.b) * (factors.rank / alpha)
        for letter, factor in (("a", factors.a), ("b", b)):
            writer.add_tensor(f"{layout.name(parameter)}.lora_{letter}", factor.cpu().contiguous().numpy())
    finish(writer)


def read_lora(file: Path, config: Any, modules: list[str]) -> Adapter:
    """The factors in a GGUF adapter, with the scale in `b`, for these modules of the base model.

    Raises:
        CorsaError: the file has no factors of a module, or factors of other modules.
    """
    layout = Layout(config)
    from gguf import GGUFReader, Keys

    reader = GGUFReader(file)
    alpha = float(reader.fields[Keys.Adapter.LORA_ALPHA].contents())
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    adapter: Adapter = {}
    for module in modules:
        parameter = f"{module}.weight"
        a, b = (tensors.pop(f"{layout.name(parameter)}.lora_{letter}", None) for letter in "ab")
        if a is None or b is None:
            raise CorsaError(f"{file} has no change of {module}")
        adapter[module] = Factors(a, layout.rows_back(parameter, b) * (alpha / len(a)))
    if tensors:
        raise CorsaError(f"{file} changes {min(tensors)}, which is none of these modules")
    return adapter
