"""The base of every configuration."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from tyro.conf import arg


class Frozen(BaseModel):
    """Base of every configuration: immutable, unknown keys and infinite numbers refused, defaults validated."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, populate_by_name=True, allow_inf_nan=False
    )

    def canonical(self) -> dict[str, Any]:
        """The configuration as plain JSON values, under the names a configuration file uses."""
        return self.model_dump(mode="json", by_alias=True)


def plain(name: str | None = None) -> Any:
    """Marks a field whose option has no group prefix: `--workers`, not `--placement.workers`."""
    return arg(name=name, prefix_name=False)
