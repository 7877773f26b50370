"""AdamW over phi: the optimizer of every round, fresh each time (docs/sharding.md for the one that is sharded)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

SETTINGS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


class AdamW(Protocol):
    """What training needs of an optimizer over phi. Every worker of the group makes the same calls."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One group, with its learning rate under "lr"."""
        ...

    def step(self) -> Any:
        """Update phi by `phi.grad`."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """The state by name, each in phi's shape or a scalar; nothing before the first step."""
        ...

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Go on from these moments, and from phi as it stands."""
        ...

    def close(self) -> None:
        """Leave phi to another optimizer."""
        ...


class PlainAdamW(torch.optim.AdamW):
    """AdamW with its whole state on every worker."""

    def __init__(self, phi: nn.Parameter) -> None:
        super().__init__([phi], **SETTINGS)
        self._phi = phi

    def moments(self) -> dict[str, Tensor]:
        """The state by name."""
        return dict(self.state.get(self._phi, {}))

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Go on from these moments."""
        self.state[self._phi] = dict(moments)

    def close(self) -> None:
        """Nothing: phi was never taken over."""
