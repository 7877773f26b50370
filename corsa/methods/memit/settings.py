"""MEMIT's settings: the published ones for each architecture, and how they are scaled to models of other sizes.

Imports no torch. All numbers of `PUBLISHED` are from EasyEdit (zjunlp/EasyEdit, `hparams/MEMIT/*.yaml`), which has them
for decoders with the architecture of Llama; each row names its file. The MEMIT authors' own files are for GPT-J and
GPT-2 XL, which have no `mlp.down_proj`; their clamp and decay (0.75 and 0.5) are not used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from corsa.config import LocateThenEditConfig, MemitConfig
from corsa.errors import CorsaError

REACHED = 0.8
"""A report warns below this share of the target change: the weight is too large for a comparison."""

WINDOW_LAYERS = 5
"""Number of edited layers in a model without published depth; the last is at a quarter of the depth."""


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
        gradient_steps: maximum number of Adam steps.
        weight_decay: weight of |delta| / |h|^2.
        clamp_norm_factor: upper bound of |delta|, in units of |h|.
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
"""Published models. Other sizes of a family are scaled from its first row. If you change a number here, increase the
version of `corsa.experiments.base.ROUND`: the identity of a round contains the configured settings, not this table.
"""

RELATED = {"qwen3": "qwen2"}
"""For families without a published file, the family whose settings they use. All others use Llama's."""


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """The edited layers and the search for the targets, without open values, and the source of published ones."""

    layers: tuple[int, ...]
    learning_rate: float
    gradient_steps: int
    weight_decay: float
    clamp_norm_factor: float
    kl_factor: float
    prefixes: int
    prefix_tokens: int
    source: str


@dataclass(frozen=True, kw_only=True)
class Settings(EditSettings):
    """All settings of a MEMIT run: `MemitConfig` with the open values filled."""

    weight: float


def settings_for(architecture: Any, config: MemitConfig) -> Settings:
    """The settings for a model: those of `config`, with published values for those left open.

    A published weight is valid for its model size. The keys of a typical token give k^T C^-1 k = d_mlp, so the share of
    its residual that one layer reaches depends only on d_mlp / weight. For a model of another size, the weight is
    scaled by d_mlp, which keeps this ratio.

    Args:
        architecture: configuration of the model (transformers).
        config: as configured.

    Raises:
        CorsaError: a chosen layer does not exist.
    """
    text = architecture.get_text_config()
    exact, found = _published(text)
    scaled = found.weight if exact else float(round(found.weight * text.intermediate_size / found.inputs))
    return Settings(
        weight=scaled if config.weight is None else config.weight,
        source=found.source if exact else f"{found.source}, scaled to {text.intermediate_size} inputs",
        **common_settings(architecture, config, found),
    )


def common_settings(architecture: Any, config: LocateThenEditConfig, published: Any) -> dict[str, Any]:
    """The fields of `EditSettings` but `source`: as configured, and those left open from a row of published settings.

    Raises:
        CorsaError: a chosen layer does not exist.
    """
    names = ("learning_rate", "gradient_steps", "weight_decay", "clamp_norm_factor", "kl_factor")
    given = {name: getattr(config, name) for name in names}
    return {
        "layers": layers_for(architecture, config.layers),
        "prefixes": config.prefixes,
        "prefix_tokens": config.prefix_tokens,
        **{name: getattr(published, name) if value is None else value for name, value in given.items()},
    }


def layers_for(architecture: Any, chosen: Sequence[int] | None = None) -> tuple[int, ...]:
    """The layers that MEMIT and AlphaEdit edit, in ascending order: `chosen`, else the published ones of the model's
    family and depth, else five layers that end at a quarter of the depth (for 32 layers the published 4 to 8).

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
                f"layer {strange[0]} to be edited does not exist: the model has layers 0 to {depth - 1}; correct the "
                "option layers of the method, or leave it out"
            )
        return tuple(sorted(set(chosen)))
    for row in PUBLISHED:
        if (row.family, row.depth) == (text.model_type, depth):
            return row.layers
    last = round(depth / 4)
    return tuple(range(max(last - WINDOW_LAYERS + 1, 0), last + 1))


def _published(text: Any) -> tuple[bool, Published]:
    """The published row for a model, and whether it is for exactly this size."""
    family = RELATED.get(text.model_type, text.model_type)
    rows = [row for row in PUBLISHED if row.family == family] or [row for row in PUBLISHED if row.family == "llama"]
    for row in rows:
        if (row.family, row.depth, row.inputs) == (text.model_type, text.num_hidden_layers, text.intermediate_size):
            return True, row
    return False, rows[0]
