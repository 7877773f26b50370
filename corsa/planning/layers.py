"""Refuses layers that a model does not have, before a run starts. Imports torch only if an option names layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from corsa.config import LocateThenEditConfig, LoraConfig, ModelConfig
from corsa.config.steps import PredictionConfig, RoundConfig
from corsa.errors import CorsaError
from corsa.models.registry import ARCHITECTURES, locate

if TYPE_CHECKING:
    from corsa.flow import Step


def refuse_layers_that_do_not_exist(pending: Iterable[Step]) -> None:
    """Check the layers that the options of these rounds name against the model's architecture. Needs no weights.

    Raises:
        CorsaError: a target or a layer number matches no layer, or the model's config.json or file cannot be read.
    """
    checked: set[Any] = set()
    for step in pending:
        config = step.config
        if isinstance(config, RoundConfig) and (config.model, config.lora) not in checked:
            checked.add((config.model, config.lora))
            check_lora(config.model, config.lora)
        elif isinstance(config, PredictionConfig):
            _check_edited(config)


def check_lora(model: ModelConfig, lora: LoraConfig) -> None:
    """Check the targets and layers of LoRA. Raises CorsaError, as `refuse_layers_that_do_not_exist`."""
    if (lora.targets == ("all-linear",) and lora.layers is None) or not _known(model):
        return
    from corsa.lora.flat import target_layers
    from corsa.models.shapes import skeleton

    target_layers(skeleton(model), lora)


def _check_edited(config: PredictionConfig) -> None:
    """Check the layers that a method edits densely."""
    locft = getattr(config, "locft", None)
    edited = [value.layers for _, value in config if isinstance(value, LocateThenEditConfig) and value.layers]
    if not (edited or (locft and locft.layer is not None)) or not _known(config.model):
        return
    from corsa.models.shapes import architecture

    shape = architecture(config.model)
    for layers in edited:
        from corsa.methods.memit.settings import layers_for

        layers_for(shape, layers)
    if locft and locft.layer is not None:
        from corsa.methods.locft.teach import layer_for

        layer_for(shape, locft.layer)


def _known(model: ModelConfig) -> bool:
    """Whether the architecture can be read here. Perhaps only the workers reach the hub."""
    if model.name.removeprefix("random:") in ARCHITECTURES or locate(model.name).kind != "hub":
        return True
    from corsa.models.shapes import architecture

    try:
        architecture(model)
    except CorsaError:
        return False
    return True
