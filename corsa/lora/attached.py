"""Frozen changes of a model's linear layers, added by hooks. The model's own weights are not modified."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from corsa.errors import CorsaError
from corsa.lora.factors import Factors
from corsa.lora.flat import linear_layers

Change = Mapping[str, Factors] | Mapping[str, Tensor]
"""The change of each layer, by module name: an adapter's factors, or a dense matrix (outputs, inputs)."""


class Attached:
    """Changes added to `model` by forward hooks on its linear layers (all but the output head) until `remove()`.

    Several changes add up, also with a `corsa.lora.flat.Lora` on the same model. Outputs equal those of a model with
    the sum merged into its weights. Gradients reach the layers' inputs and phi, but not the changes. Changes that are
    float32 and on the layer's device are not copied, so do not modify them while they are attached.

    Raises:
        CorsaError: the model has no layer with the name of a change, or the layer has another shape.
    """

    def __init__(self, model: nn.Module, changes: Sequence[Change]) -> None:
        layers = dict(linear_layers(model))
        found: list[tuple[nn.Linear, Factors | Tensor]] = []
        for change in changes:
            for name, part in change.items():
                if name not in layers:
                    raise CorsaError(
                        f"{type(model).__name__} has no linear layer {name} for this change "
                        "(the output head does not count): was the change made for another model?"
                    )
                shape = (layers[name].out_features, layers[name].in_features)
                if tuple(part.shape) != shape:
                    raise CorsaError(
                        f"the change to {name} is {tuple(part.shape)}, the layer of this {type(model).__name__} is "
                        f"{shape} (outputs, inputs): was it made for another model?"
                    )
                found.append((layers[name], part))
        self._handles = [layer.register_forward_hook(_hook(layer, part)) for layer, part in found]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def attached(model: nn.Module, *changes: Change) -> Iterator[None]:
    """Add the changes to the model inside the block (`Attached`)."""
    attachment = Attached(model, changes)
    try:
        yield
    finally:
        attachment.remove()


def _hook(layer: nn.Linear, change: Factors | Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A hook that adds `x @ delta.T` to the layer's output; factors are applied one after the other."""
    matrices = (change.a, change.b) if isinstance(change, Factors) else (change,)
    frozen = [m.detach().to(layer.weight.device, torch.float32) for m in matrices]

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        added = reduce(linear, frozen, args[0].float())  # float32 for every dtype of the base, as in corsa.lora.flat
        return output + added.to(output.dtype)

    return add
