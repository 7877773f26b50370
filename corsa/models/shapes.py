"""The architecture of a model without its weights. Known architectures need no network."""

from __future__ import annotations

from transformers import AutoConfig, PreTrainedConfig

from corsa.config import ModelConfig
from corsa.errors import CorsaError
from corsa.models.registry import ARCHITECTURES, locate


def architecture(config: ModelConfig) -> PreTrainedConfig:
    """The transformers configuration of a model: from the registry for an alias or a `random:` architecture, else from
    the model's config.json.

    Raises:
        CorsaError: the config.json cannot be read.
    """
    name = config.name.removeprefix("random:")
    if name in ARCHITECTURES:
        entries = dict(ARCHITECTURES[name])
        return AutoConfig.for_model(entries.pop("model_type"), **entries)
    place = locate(config.name).place
    try:
        found = AutoConfig.from_pretrained(place, revision=config.revision or "main")
    except (OSError, ValueError) as e:
        raise CorsaError(
            f"the shape of model {config.name!r} cannot be read: {str(e).strip().splitlines()[0]}. Name a directory "
            f"with its config.json, make the hub reachable, or plan with one of {', '.join(ARCHITECTURES)}"
        ) from e
    return found.get_text_config()
