"""MEMIT (Meng et al. 2023, "Mass-Editing Memory in a Transformer"): a closed-form dense change of a few layers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from corsa.config import LocateThenEditConfig, MemitConfig, RunSettings
from corsa.config.steps import PredictionConfig, StatisticsConfig, StatisticsPlace
from corsa.errors import CorsaError
from corsa.flow.step import Kind, Step, StepFunction
from corsa.methods.base import CHANGES_WEIGHTS, Method, Teach
from corsa.methods.memit.corpora import NEUTRAL
from corsa.methods.memit.settings import REACHED


def _load_statistics() -> StepFunction:
    from corsa.methods.memit.statistics_stage import compute

    return compute


STATISTICS = Kind("statistics", _load_statistics, version=2, on_cluster=True)


class MemitRoundConfig(PredictionConfig):
    """A round of MEMIT."""

    seed: int = Field(ge=0, description="seed of the random prefixes")
    round: int = Field(ge=1)
    memit: MemitConfig


def _round_config(settings: RunSettings, seed: int, number: int) -> MemitRoundConfig:
    return MemitRoundConfig(**round_fields("memit", settings, seed, number))


def round_fields(name: str, settings: RunSettings, seed: int, number: int) -> dict[str, Any]:
    """The fields of a round of a method that changes layers in closed form; its settings are the field `name`.

    Raises:
        CorsaError: the workers do not have the weights whole.
    """
    if settings.placement.sharding.zero_stage == 3:
        raise CorsaError(
            f"{name} reads and solves for the base's own weights, and under --sharding.zero-stage 3 no worker has "
            f"them whole: leave {name} out of --methods, or use a stage below 3"
        )
    own = _own(name, settings).model_copy(update={"corpus": None})  # the statistics identify it
    evaluation = settings.evaluation.for_predictions()
    return {"model": settings.model, "evaluation": evaluation, "seed": seed, "round": number, name: own}


def _own(name: str, settings: RunSettings) -> LocateThenEditConfig:
    return getattr(settings, name)


def _inputs(settings: RunSettings) -> dict[str, Step]:
    return statistics_input("memit", settings)


def statistics_input(name: str, settings: RunSettings) -> dict[str, Step]:
    """The key statistics for a method. They depend only on model, layers and corpus: all benchmarks, and methods that
    edit the same layers, share them.
    """
    config = _own(name, settings)
    corpus = str(Path(config.corpus).expanduser().absolute()) if config.corpus else None
    of = StatisticsConfig(
        model=settings.model, layers=config.layers, corpus=_digest(corpus or str(NEUTRAL), f"--{name}.corpus")
    )
    place = StatisticsPlace(**dict(settings.placement), corpus=corpus)
    title = f"statistics/{Path(corpus).stem if corpus else 'neutral'}"
    return {"statistics": Step(title, STATISTICS, of, placement=place)}


def _digest(path: str, option: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise CorsaError(f"{option} {path} cannot be read: {e.strerror}; give a text file") from e


def _report_notes(name: str, found: Mapping[str, Any]) -> list[str]:
    """The settings of a round of MEMIT, and a warning if the weights do not reach their targets."""
    used = f"weight {found['weight']:g}, clamp {found['clamp_norm_factor']:g}, decay {found['weight_decay']:g}"
    notes = [f"MEMIT edits layers {found['layers']} with {used} (what is not configured: {found['source']})."]
    return notes + reached_warning("MEMIT", name, found, f"lower --memit.weight (here {found['weight']:g})")


def reached_warning(method: str, name: str, found: Mapping[str, Any], advice: str) -> list[str]:
    """A warning if the weights of the round `name` do not reach their targets."""
    reached = found["reached"]
    if reached is None or reached >= REACHED:
        return []
    return [
        f"Warning: {name}: {method}'s weights reach {100 * reached:.0f} % of the change they aim at, below "
        f"{100 * REACHED:.0f} %: {advice} before you compare with {method}."
    ]


NO_PROGRAMS = "it changes what is said of a subject to one short object, and an update of an API has neither"
"""Why methods that edit facts cannot learn programs."""


def _load_teach() -> Teach:
    from corsa.methods.memit.teach import teach

    return teach


METHODS = (
    Method(
        "memit",
        "MEMIT",
        _round_config,
        MemitRoundConfig,
        _load_teach,
        _inputs,
        notes=_report_notes,
        refuses={
            "adapter": "MEMIT leaves a dense change of the weights, no adapter",
            "programs": NO_PROGRAMS,
            "4 bits": CHANGES_WEIGHTS,
        },
        colour="#2a9470",
        symbol="diamond",
    ),
)
