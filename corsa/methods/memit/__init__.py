"""MEMIT (Meng et al. 2023, "Mass-Editing Memory in a Transformer"): a dense change of a few layers in closed form."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import Field

from corsa.config import MemitConfig, RunSettings
from corsa.config.steps import AskingConfig, StatisticsConfig, StatisticsPlace
from corsa.errors import CorsaError
from corsa.flow.step import Kind, Step
from corsa.methods.base import Method, Teach

STATISTICS = Kind("statistics", "corsa.methods.memit.statistics_stage:compute", version=1, on_cluster=True)


class MemitRoundConfig(AskingConfig):
    """A round of MEMIT."""

    seed: int = Field(ge=0, description="of the random prefixes")
    round: int = Field(ge=1)
    memit: MemitConfig


def _round_config(settings: RunSettings, seed: int, number: int) -> MemitRoundConfig:
    if settings.placement.sharding.zero_stage == 3:
        raise CorsaError(
            "memit reads and solves for the base's own weights, and under --sharding.zero-stage 3 no worker has "
            "them whole: leave memit out of --methods, or use a stage below 3"
        )
    alone = settings.memit.model_copy(update={"corpus": None})  # the statistics stand for it
    asking = {"model": settings.model, "evaluation": settings.evaluation.asking()}
    return MemitRoundConfig(**asking, seed=seed, round=number, memit=alone)


def _load_teach() -> Teach:
    from corsa.methods.memit.teach import teach

    return teach


METHOD = Method(
    "memit",
    "MEMIT",
    _round_config,
    MemitRoundConfig,
    _load_teach,
    refuses={
        "adapter": "MEMIT leaves a dense change of the weights, no adapter",
        "programs": "it changes what is said of a subject to one short object, and an update of an API has neither",
    },
    colour="#2a9470",
    symbol="diamond",
)
