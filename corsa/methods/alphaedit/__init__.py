"""AlphaEdit (Fang et al. 2025): MEMIT's closed-form change, projected on the null space of the preserved keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from corsa.config import AlphaEditConfig, RunSettings
from corsa.config.steps import PredictionConfig
from corsa.flow.step import Step
from corsa.methods.base import CHANGES_WEIGHTS, Method, Teach
from corsa.methods.memit import NO_PROGRAMS, reached_warning, round_fields, statistics_input


class AlphaEditRoundConfig(PredictionConfig):
    """A round of AlphaEdit."""

    seed: int = Field(ge=0, description="seed of the random prefixes")
    round: int = Field(ge=1)
    alphaedit: AlphaEditConfig


def _round_config(settings: RunSettings, seed: int, number: int) -> AlphaEditRoundConfig:
    return AlphaEditRoundConfig(**round_fields("alphaedit", settings, seed, number))


def _inputs(settings: RunSettings) -> dict[str, Step]:
    return statistics_input("alphaedit", settings)


def _report_notes(name: str, found: Mapping[str, Any]) -> list[str]:
    """The settings of a round, and a warning if the weights do not reach their targets."""
    used = (
        f"threshold {found['threshold']:g}, L2 {found['l2']:g}, clamp {found['clamp_norm_factor']:g}, "
        f"decay {found['weight_decay']:g}"
    )
    notes = [
        f"AlphaEdit edits layers {found['layers']} with {used} (what is not configured: {found['source']}). Its null "
        f"space has at least {100 * found['free']:.0f} % of each layer's inputs."
    ]
    advice = f"lower --alphaedit.l2 (here {found['l2']:g}) or raise --alphaedit.threshold"
    return notes + reached_warning("AlphaEdit", name, found, advice)


def _load_teach() -> Teach:
    from corsa.methods.alphaedit.teach import teach

    return teach


METHODS = (
    Method(
        "alphaedit",
        "AlphaEdit",
        _round_config,
        AlphaEditRoundConfig,
        _load_teach,
        _inputs,
        notes=_report_notes,
        refuses={
            "adapter": "AlphaEdit leaves a dense change of the weights, no adapter",
            "programs": NO_PROGRAMS,
            "4 bits": CHANGES_WEIGHTS,
        },
        colour="#b83a6b",
        symbol="triangle-down",
    ),
)
