"""Activation checkpointing: only each layer's input is kept; the backward pass computes the rest again."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from corsa.errors import CorsaError


def recompute_activations(model: PreTrainedModel) -> None:
    """Compute the model's layers again in every backward pass from now on. Results do not change.

    Raises:
        CorsaError: the architecture does not support it.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as e:
        raise CorsaError(
            f"{type(model).__name__} does not support activation checkpointing: "
            "leave out --sharding.activation-checkpointing"
        ) from e

    def choose(*_: object) -> None:
        # transformers recomputes in training mode alone. The layers' own modules stay in evaluation mode (no dropout),
        # and a pass without gradients keeps its cache.
        for layer in layers:
            layer.training = torch.is_grad_enabled()

    model.register_forward_pre_hook(choose)
