"""One round of LocFT-BF: the step with L_SFT alone, on one dense matrix on top of earlier rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from corsa.errors import CorsaError
from corsa.lora.attached import attached
from corsa.lora.dense import Dense
from corsa.methods.base import Round, Taught
from corsa.methods.locft import LocFtRoundConfig
from corsa.methods.memit.key_statistics import down_projections


@dataclass(frozen=True)
class Published:
    """The published layer of a model: its family (transformers' model type), its depth, the layer (from 0), and the
    file it is from.
    """

    family: str
    depth: int
    layer: int
    source: str


PUBLISHED = (
    Published("llama", 32, 22, "Llama-3-8B, llama3-8b.yaml"),
    Published("qwen2", 28, 6, "Qwen2.5-7B, qwen2.5-7b.yaml"),
)
"""The files of ICT-STAR/LocFT (`hparams/*.yaml`) that tune a `down_proj`. Other families use the first row; at another
depth the layer is at the same share of it. If you change a number here, increase the version of
`corsa.experiments.kinds.ROUND`: the identity of a round contains the configured layer, not this table.
"""

RELATED = {"qwen3": "qwen2"}
"""For families without a published file, the family whose layer they use."""


def teach(round_: Round) -> Taught:
    """Trains the change of one down projection on all edits of the round (breadth first: epochs of mini-batches)."""
    config: LocFtRoundConfig = round_.config
    layer, source = layer_for(round_.model.config, config.locft.layer)
    name, module = down_projections(round_.model)[layer]
    dense = Dense(module)
    before: Any = dict(round_.before or {})
    with round_.lora.off(), attached(round_.model, before), dense.added():
        curves = round_.train(round_.triplets, "all", dense.phi)
    change = dense.matrix.detach().cpu()
    whole = before | {name: before[name] + change if name in before else change}
    return Taught(whole, {"module": name, "source": source}, curves)


def layer_for(architecture: Any, chosen: int | None) -> tuple[int, str]:
    """The layer to train, and where its number is from.

    Args:
        architecture: configuration of the model (transformers).
        chosen: a layer, from 0.

    Raises:
        CorsaError: the chosen layer does not exist.
    """
    text = architecture.get_text_config()
    depth = text.num_hidden_layers
    if chosen is not None:
        if chosen >= depth:
            raise CorsaError(f"--locft.layer {chosen} does not exist: the model has layers 0 to {depth - 1}")
        return chosen, "as configured"
    family = RELATED.get(text.model_type, text.model_type)
    found = next((row for row in PUBLISHED if row.family == family), PUBLISHED[0])
    if found.depth == depth:
        return found.layer, found.source
    return round(found.layer / found.depth * depth), f"{found.source}, scaled to {depth} layers"
