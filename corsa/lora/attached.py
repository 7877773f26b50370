"""Frozen changes of a model's linear layers, added while it runs: the model's own weights stay as they are."""

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
"""What is added to each layer, by module name: an adapter's factors, or the change itself, (outputs, inputs)."""


class Attached:
    """Changes added to `model` by forward hooks on its linear layers (all but the output head) until `remove()`.

    Several changes add up, also with a `corsa.lora.flat.Lora` on the same model: the outputs are those of a model
    with their sum merged into its weights. Gradients flow to the layers' inputs, and so to the Lora's phi, but not to
    the changes. Nothing is copied where the changes are float32 and on the layer's device: leave them as they are.

    Raises:
        CorsaError: a change is to a layer that the model does not have, or to one of another shape.
    """

    def __init__(self, model: nn.Module, changes: Sequence[Change]) -> None:
        layers = dict(linear_layers(model))
        found: list[tuple[nn.Linear, Factors | Tensor]] = []
        for change in changes:
            for name, part in change.items():
                if name not in layers:
                    raise CorsaError(
                        f"the change to {name} has no place in this {type(model).__name__}: it has no such linear "
                        "layer (or it is the output head); was the change made for another model?"
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
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def attached(model: nn.Module, *changes: Change) -> Iterator[None]:
    """The model with the changes added inside the block, as `Attached`; as it was after it."""
    attachment = Attached(model, changes)
    try:
        yield
    finally:
        attachment.remove()


def _hook(layer: nn.Linear, change: Factors | Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """Adds `x @ delta.T` to the layer's output, through the factors where there are some."""
    matrices = (change.a, change.b) if isinstance(change, Factors) else (change,)
    frozen = [m.detach().to(layer.weight.device, torch.float32) for m in matrices]

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        added = reduce(linear, frozen, args[0].float())  # float32 whatever the base, as corsa.lora.flat
        return output + added.to(output.dtype)

    return add
