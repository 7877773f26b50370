"""One dense, full-rank change of a linear layer as a flat tensor, trained like LoRA's phi (`corsa.lora.flat`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Dense:
    """A change of one linear layer, zero at first.

    Attributes:
        phi: (1, outputs * inputs) float32 leaf that requires grad: the change, row-major.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self._layer, self._shape = layer, (layer.out_features, layer.in_features)
        size = layer.out_features * layer.in_features
        self.phi = nn.Parameter(torch.zeros(1, size, dtype=torch.float32, device=layer.weight.device))

    @property
    def matrix(self) -> Tensor:
        """The change (outputs, inputs), a view of phi."""
        return self.phi.view(self._shape)

    @contextmanager
    def added(self) -> Iterator[None]:
        """Adds the change to the layer inside the block, by a forward hook."""

        def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output + linear(args[0].float(), self.matrix).to(output.dtype)  # float32 for every dtype of the base

        hook = self._layer.register_forward_hook(add)
        try:
            yield
        finally:
            hook.remove()
