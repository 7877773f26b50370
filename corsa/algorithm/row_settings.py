"""The settings of K adapters trained together on one copy of the base: rows of phi. K = 1 is the ordinary case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corsa.config import StepConfig
from corsa.errors import CorsaError


@dataclass(frozen=True)
class RowSettings:
    """The settings of K steps taken at once.

    Rows may differ in the weights of their objectives and in beta and rho (`StepConfig.per_row`). A row with weight 0
    runs without that objective, and a row with rho = 0 without SAM, also when other rows use them.

    Attributes:
        rows: the settings of each row.
        shared: the settings that all rows have in common.
        columns: field -> its value for one row, or a column (K, 1) for several: the fields in which rows may differ.
    """

    rows: tuple[StepConfig, ...]
    shared: StepConfig
    columns: Mapping[str, float | Tensor]

    @classmethod
    def of(cls, configs: Sequence[StepConfig], device: torch.device | str) -> RowSettings:
        """The settings of these steps together.

        Raises:
            CorsaError: the steps differ in what rows may not differ in; several use LookSAM, which keeps one adapter's
                gradient; or `pcgrad` cannot reconcile so many objectives.
        """
        shared, per_row = configs[0].shared, configs[0].per_row()
        for name in type(shared).model_fields:
            found = dict.fromkeys(getattr(config.shared, name) for config in configs)
            if len(found) > 1:
                raise CorsaError(
                    f"adapters trained together must have the same {name}, found {', '.join(map(str, found))}: "
                    "train them apart (--pack 1)"
                )
        if shared.perturb_every > 1 and len(configs) > 1:
            raise CorsaError(
                f"perturb_every {shared.perturb_every} uses one adapter's perturbation again: train apart (--pack 1)"
            )
        objectives = 1 + sum(any(getattr(config, weight) > 0 for config in configs) for weight in shared.weights)
        try:
            shared.refuse_pcgrad(objectives)
        except ValueError as error:
            raise CorsaError(str(error)) from error
        if len(configs) == 1:
            return cls(tuple(configs), shared, {name: getattr(configs[0], name) for name in per_row})
        columns = {
            name: torch.tensor([[getattr(config, name)] for config in configs], dtype=torch.float32, device=device)
            for name in per_row
        }
        return cls(tuple(configs), shared, columns)

    def column(self, name: str) -> float | Tensor:
        """A setting of the rows: a number, or a column (K, 1)."""
        return self.columns[name] if name in self.columns else getattr(self.shared, name)

    def any(self, name: str | None) -> bool:
        """Whether any row has a value above 0. None stands for a weight of 1."""
        return name is None or any(getattr(row, name) > 0 for row in self.rows)

    def runs(self, name: str | None) -> Tensor | None:
        """Which rows have a value above 0, (K, 1); None: all."""
        if name is None or len(self.rows) == 1 or all(getattr(row, name) > 0 for row in self.rows):
            return None
        return torch.as_tensor(self.column(name)) > 0
