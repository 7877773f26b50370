"""F-Learning (Ni et al. 2024, "Forgetting before Learning"): subtract the old answers, then learn the new ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corsa.config import ALONE, FLearningConfig, RunSettings
from corsa.config.steps import RoundConfig
from corsa.methods import step_methods
from corsa.methods.base import Method, Teach


class FLearningRoundConfig(RoundConfig):
    """A round of F-Learning; `step` is plain LoRA's."""

    f_learning: FLearningConfig


def _round_config(settings: RunSettings, seed: int, number: int) -> FLearningRoundConfig:
    plain = step_methods.round_config("lora", settings, seed, number)
    training = plain.training.model_copy(update=ALONE)
    return FLearningRoundConfig(**dict(plain.model_copy(update={"training": training})), f_learning=settings.f_learning)


def _report_notes(name: str, found: Mapping[str, Any]) -> list[str]:
    if "cut_error" in found:
        return [f"{name}: cut to rank {found['rank']}, relative error {found['cut_error']:.2g}."]
    return [f"{name}: the adapter has rank {found['rank']}."]


def _load_teach() -> Teach:
    from corsa.methods.f_learning.teach import teach

    return teach


METHODS = (
    Method(
        "f-learning",
        "F-Learning",
        _round_config,
        FLearningRoundConfig,
        _load_teach,
        notes=_report_notes,
        keeps_shape=False,  # each round adds two LoRA ranks
        colour="#a560c4",
        symbol="triangle-up",
    ),
)
