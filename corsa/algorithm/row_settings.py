"""K adapters trained together on one copy of the base: rows of phi that differ in lambda, beta and rho."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from corsa.config import StepConfig


@dataclass(frozen=True)
class Together:
    """The settings of K steps taken at once, under the names of `StepConfig`: what may differ is a column (K, 1).

    A row without DPO or without SAM beside others that have it takes the plain step all the same: its gradient is
    L_SFT's, or its perturbation is zero.
    """

    configs: tuple[StepConfig, ...]
    lambda_: Tensor
    beta: Tensor
    rho: Tensor

    @classmethod
    def of(cls, configs: Sequence[StepConfig], device: torch.device | str) -> StepConfig | Together:
        """The settings of these steps; one alone is itself. All else than lambda, beta and rho must be the same."""
        if len(configs) == 1:
            return configs[0]
        lam, beta, rho = (
            torch.tensor([[getattr(config, name)] for config in configs], dtype=torch.float32, device=device)
            for name in ("lambda_", "beta", "rho")
        )
        return cls(tuple(configs), lam, beta, rho)

    @property
    def dpo(self) -> bool:
        """Whether any row runs L_DPO."""
        return any(config.dpo for config in self.configs)

    @property
    def sam(self) -> bool:
        """Whether any row is perturbed."""
        return any(config.sam for config in self.configs)

    @property
    def pcgrad(self) -> Literal["symmetric", "sequential", "off"]:
        return next((config for config in self.configs if config.dpo), self.configs[0]).pcgrad

    @property
    def scope(self) -> Literal["step", "microbatch"]:
        return self.configs[0].scope

    @property
    def reduction(self) -> Literal["token", "sequence"]:
        return self.configs[0].reduction

    @property
    def eps(self) -> float:
        return self.configs[0].eps

    def known(self, reference: Tensor, logp: Tensor) -> Tensor:
        """The reference (2, K, E) where L_DPO is run. Elsewhere `logp` itself: what is not finite in a reference would
        reach L_SFT's gradient too, as 0 times that.
        """
        return torch.where((self.lambda_ > 0)[None], reference, logp.detach())

    def each(self, adapters: int) -> Sequence[StepConfig]:
        """The settings of each row."""
        assert adapters == len(self.configs)
        return self.configs
