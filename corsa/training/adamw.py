"""AdamW over phi, a new one for each round. docs/sharding.md describes the sharded one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

SETTINGS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


class Moments(Protocol):
    """The part of an optimizer that a checkpoint uses. Every worker of the group makes the same calls."""

    def moments(self) -> dict[str, Tensor]:
        """The state by name: tensors in phi's shape, or scalars. Empty before the first step."""
        ...

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Continue from these moments and the current phi."""
        ...


class Stepping(Protocol):
    """The part of an optimizer over phi that a step uses. Every worker of the group makes the same calls."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One group, with its learning rate under "lr"."""
        ...

    def step(self) -> Any:
        """Update phi by `phi.grad`."""
        ...

    def close(self) -> None:
        """Release phi for another optimizer."""
        ...


class AdamW(Moments, Stepping, Protocol):
    """An optimizer over all of phi."""


class PlainAdamW(torch.optim.AdamW):
    """AdamW whose whole state is on every worker."""

    def __init__(self, phi: nn.Parameter) -> None:
        super().__init__([phi], fused=True, **SETTINGS)  # one pass over phi and its moments
        self._phi = phi

    def moments(self) -> dict[str, Tensor]:
        """The state by name."""
        return dict(self.state.get(self._phi, {}))

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Go on from these moments."""
        self.state[self._phi] = dict(moments)

    def close(self) -> None:
        """Does nothing: this optimizer holds no reference that blocks phi."""


class PackedAdamW(torch.optim.AdamW):
    """AdamW per row of phi: K adapters trained together, each with its own learning rate, moments and step count.

    A row skips a step when its gradient is not finite, or when its parameter group has `waits` set.
    """

    def __init__(self, phi: nn.Parameter) -> None:
        # Leaves (1, P) that share phi's memory.
        self.rows = [row.requires_grad_() for row in phi.detach().split(1)]
        self._phi = phi
        super().__init__([{"params": [row], "waits": False} for row in self.rows], fused=True, **SETTINGS)

    def step(self, closure: Any = None) -> Any:
        """Update the rows by `phi.grad`."""
        assert self._phi.grad is not None
        for group, row, g in zip(self.param_groups, self.rows, self._phi.grad.split(1), strict=True):
            row.grad = None if group["waits"] or not bool(g.isfinite().all()) else g
        return super().step(closure)

    def close(self) -> None:
        """Does nothing: this optimizer holds no reference that blocks phi."""

    def of(self, row: int) -> RowState:
        """The optimizer state of one row, for checkpoints."""
        return RowState(self, self.rows[row])


class RowState:
    """The state of one row of a `PackedAdamW`, under the names of `AdamW`."""

    def __init__(self, optimizer: PackedAdamW, row: Tensor) -> None:
        self._state, self._row = optimizer.state, row

    def moments(self) -> dict[str, Tensor]:
        """The row's state by name."""
        return dict(self._state.get(self._row, {}))

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Go on from these moments."""
        self._state[self._row] = dict(moments)
