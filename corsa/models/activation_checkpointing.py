"""Activation checkpointing: of each layer only the input is kept; the rest is computed again going back."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from corsa.errors import CorsaError


def recompute_activations(model: PreTrainedModel) -> None:
    """Have the model's layers computed again in every backward pass from now on. Results do not change.

    Raises:
        CorsaError: the model's architecture does not offer it.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as e:
        raise CorsaError(
            f"{type(model).__name__} cannot compute its activations again: "
            "leave out --sharding.activation-checkpointing"
        ) from e

    def choose(*_: object) -> None:
        # transformers recomputes in training mode alone. The layers' own modules stay in evaluation mode (no dropout),
        # and a pass without gradients keeps its cache.
        for layer in layers:
            layer.training = torch.is_grad_enabled()

    model.register_forward_pre_hook(choose)
