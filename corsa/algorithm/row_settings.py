"""K adapters trained together on one copy of the base: rows of phi that differ only in lambda, beta and rho."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from corsa.config import PCGrad, StepConfig
from corsa.errors import CorsaError


@dataclass(frozen=True)
class Together:
    """The settings of K steps taken at once, with the names of `StepConfig`. A setting that may differ is (K, 1).

    A row with lambda = 0 runs without DPO (its gradient is that of L_SFT), and a row with rho = 0 without SAM (its
    perturbation is zero), also when other rows use them.
    """

    configs: tuple[StepConfig, ...]
    shared: StepConfig
    lambda_: Tensor
    beta: Tensor
    rho: Tensor

    @classmethod
    def of(cls, configs: Sequence[StepConfig], device: torch.device | str) -> StepConfig | Together:
        """The settings of these steps together. A single step is returned as it is.

        Raises:
            CorsaError: the steps differ in more than lambda, beta and rho, or use LookSAM, which keeps one adapter's
                gradient.
        """
        if len(configs) == 1:
            return configs[0]
        shared = configs[0].shared
        for name in StepConfig.model_fields:
            found = dict.fromkeys(getattr(config.shared, name) for config in configs)
            if len(found) > 1:
                raise CorsaError(
                    f"adapters trained together must have the same {name}, found {', '.join(map(str, found))}: "
                    "train them apart (--pack 1)"
                )
        if shared.perturb_every > 1:
            raise CorsaError(
                f"perturb_every {shared.perturb_every} uses one adapter's perturbation again: train apart (--pack 1)"
            )
        lam, beta, rho = (
            torch.tensor([[getattr(config, name)] for config in configs], dtype=torch.float32, device=device)
            for name in ("lambda_", "beta", "rho")
        )
        return cls(tuple(configs), shared, lam, beta, rho)

    @property
    def dpo(self) -> bool:
        """Whether any row runs L_DPO."""
        return any(config.dpo for config in self.configs)

    @property
    def sam(self) -> bool:
        """Whether any row is perturbed."""
        return any(config.sam for config in self.configs)

    @property
    def pcgrad(self) -> PCGrad:
        return self.shared.pcgrad

    @property
    def scope(self) -> Literal["step", "microbatch"]:
        return self.shared.scope

    @property
    def reduction(self) -> Literal["token", "sequence"]:
        return self.shared.reduction

    @property
    def eps(self) -> float:
        return self.shared.eps

    def known(self, reference: Tensor, logp: Tensor) -> Tensor:
        """The reference (2, K, E) for rows that run L_DPO. Other rows get `logp` itself: a non-finite reference, times
        0, would spoil L_SFT's gradient too.
        """
        return torch.where((self.lambda_ > 0)[None], reference, logp.detach())

    def each(self, adapters: int) -> Sequence[StepConfig]:
        """The settings of each row."""
        assert adapters == len(self.configs)
        return self.configs
