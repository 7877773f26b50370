"""LocFT-BF (Yang et al. 2025, arXiv 2509.22072): plain fine-tuning of one weight matrix, in mini-batches and epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corsa.config import ALONE, LocFtConfig, LoraConfig, RunSettings
from corsa.config.steps import RoundConfig
from corsa.methods import step_methods
from corsa.methods.base import CHANGES_WEIGHTS, Method, Teach


class LocFtRoundConfig(RoundConfig):
    """A round of LocFT-BF; `step` is plain LoRA's, and `training` has its learning rate."""

    locft: LocFtConfig


def _round_config(settings: RunSettings, seed: int, number: int) -> LocFtRoundConfig:
    plain = step_methods.round_config("lora", settings, seed, number)
    rate = {"learning_rate": settings.locft.learning_rate}
    own = {"training": plain.training.model_copy(update=ALONE | rate), "lora": LoraConfig()}  # LoRA is off
    return LocFtRoundConfig(**dict(plain.model_copy(update=own)), locft=settings.locft)


def _report_notes(name: str, found: Mapping[str, Any]) -> list[str]:
    return [f"LocFT-BF trains {found['module']} (layer: {found['source']})."]


def _load_teach() -> Teach:
    from corsa.methods.locft.teach import teach

    return teach


METHODS = (
    Method(
        "locft",
        "LocFT-BF",
        _round_config,
        LocFtRoundConfig,
        _load_teach,
        notes=_report_notes,
        refuses={
            "adapter": "LocFT-BF leaves a dense change of one weight matrix, no adapter",
            "programs": "its one layer was chosen for facts with short answers",
            "4 bits": CHANGES_WEIGHTS,
        },
        colour="#8a7416",
        symbol="pentagon",
    ),
)
