"""MEMIT's settings: what was published for each architecture, and how it carries over to a model of another size.

Imports no torch. All numbers of `PUBLISHED` are those of EasyEdit (zjunlp/EasyEdit, `hparams/MEMIT/*.yaml`), which has
them for decoders of the Llama kind; each row names its file. The MEMIT authors' own files are for GPT-J and GPT-2 XL,
which have no `mlp.down_proj`; their clamp and decay (0.75 and 0.5) are not mixed in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from corsa.config import MemitConfig
from corsa.errors import CorsaError

REACHED = 0.8
"""Below this share of the aimed change a report warns: the weight is too heavy for a comparison."""

WINDOW_LAYERS = 5
"""How many layers are edited in a model of no published depth; the last of them is at a quarter of the depth."""


@dataclass(frozen=True)
class Published:
    """Published settings.

    Attributes:
        family: transformers' model type.
        depth: layers of the model.
        inputs: inputs of its down projections (d_mlp).
        source: the model and its file in EasyEdit.
        layers: edited layers, from 0.
        weight: lambda of the solve, at `inputs`.
        learning_rate: of Adam.
        gradient_steps: of Adam at most.
        weight_decay: of |delta| / |h|^2.
        clamp_norm_factor: bound on |delta|, in |h|.
        kl_factor: weight of the KL term.
    """

    family: str
    depth: int
    inputs: int
    source: str
    layers: tuple[int, ...] = (4, 5, 6, 7, 8)
    weight: float = 15000.0
    learning_rate: float = 0.5
    gradient_steps: int = 25
    weight_decay: float = 1e-3
    clamp_norm_factor: float = 4.0
    kl_factor: float = 0.0625


PUBLISHED = (
    Published("llama", 32, 11008, "Llama-2-7B, llama-7b.yaml"),
    Published("llama", 28, 8192, "Llama-3.2-3B, llama3.2-3b.yaml"),
    Published("llama", 16, 8192, "Llama-3.2-1B, llama3.2-1b.yaml"),
    Published("mistral", 32, 14336, "Mistral-7B, mistral-7b.yaml"),
    Published("qwen2", 28, 18944, "Qwen2.5-7B, qwen2.5-7b.yaml"),
)
"""Published models, the first of a family being the one that its other sizes are scaled from. Who changes a number here
raises the version of `corsa.experiments.base.ROUND`: the identity of a round holds what was configured, not this table.
"""

RELATED = {"qwen3": "qwen2"}
"""Families without a published file: the family whose settings they take. All others take Llama's."""


@dataclass(frozen=True)
class Settings:
    """Everything that MEMIT is run with: `MemitConfig` with its gaps filled, and where the filling comes from."""

    layers: tuple[int, ...]
    weight: float
    learning_rate: float
    gradient_steps: int
    weight_decay: float
    clamp_norm_factor: float
    kl_factor: float
    prefixes: int
    prefix_tokens: int
    source: str


def settings_for(architecture: Any, config: MemitConfig) -> Settings:
    """The settings for a model: those of `config`, and where it leaves one open the published one.

    A published weight holds for the size it was published for. The keys of a typical token give k^T C^-1 k = d_mlp, so
    one layer reaches a share of its residual that depends on d_mlp / weight alone: for a model of another size the
    weight is scaled by d_mlp, which keeps that ratio.

    Args:
        architecture: configuration of the model (transformers).
        config: as configured.

    Raises:
        CorsaError: a chosen layer does not exist.
    """
    text = architecture.get_text_config()
    exact, found = _published(text)
    scaled = found.weight if exact else float(round(found.weight * text.intermediate_size / found.inputs))
    chosen = {
        name: getattr(found, name) if value is None else value
        for name in ("learning_rate", "gradient_steps", "weight_decay", "clamp_norm_factor", "kl_factor")
        for value in [getattr(config, name)]
    }
    return Settings(
        layers=layers_for(architecture, config.layers),
        weight=scaled if config.weight is None else config.weight,
        prefixes=config.prefixes,
        prefix_tokens=config.prefix_tokens,
        source=found.source if exact else f"{found.source}, scaled to {text.intermediate_size} inputs",
        **chosen,
    )


def layers_for(architecture: Any, chosen: Sequence[int] | None = None) -> tuple[int, ...]:
    """The layers that MEMIT edits, in ascending order: `chosen`, else the published ones of the model's family and
    depth, else five layers that end at a quarter of the depth (for 32 layers the published 4 to 8).

    Args:
        architecture: configuration of the model (transformers).
        chosen: numbers of layers, from 0.

    Raises:
        CorsaError: a chosen layer does not exist.
    """
    text = architecture.get_text_config()
    depth = text.num_hidden_layers
    if chosen is not None:
        if strange := [layer for layer in chosen if not 0 <= layer < depth]:
            raise CorsaError(
                f"layer {strange[0]} to be edited by MEMIT does not exist: the model has layers 0 to {depth - 1}; "
                "correct --memit.layers, or leave it out"
            )
        return tuple(sorted(set(chosen)))
    for row in PUBLISHED:
        if (row.family, row.depth) == (text.model_type, depth):
            return row.layers
    last = round(depth / 4)
    return tuple(range(max(last - WINDOW_LAYERS + 1, 0), last + 1))


def _published(text: Any) -> tuple[bool, Published]:
    """The row of a model, and whether it was published for this very size."""
    rows = [row for row in PUBLISHED if row.family == RELATED.get(text.model_type, text.model_type)]
    rows = rows or [row for row in PUBLISHED if row.family == "llama"]
    for row in rows:
        if (row.family, row.depth, row.inputs) == (text.model_type, text.num_hidden_layers, text.intermediate_size):
            return True, row
    return False, rows[0]
