"""Retrieval as a baseline: nothing is trained, and the facts nearest to a question stand before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from corsa.config import InContextConfig, RunSettings
from corsa.config.steps import PredictionConfig
from corsa.methods.base import Method, Round, Taught, Teach

if TYPE_CHECKING:
    from corsa.evaluation.retrieval import Memory


class InContextRoundConfig(PredictionConfig):
    """A round of retrieval."""

    round: int = Field(ge=1)
    in_context: InContextConfig


def _round_config(settings: RunSettings, seed: int, number: int) -> InContextRoundConfig:
    shared = {"model": settings.model, "evaluation": settings.evaluation.for_predictions()}
    return InContextRoundConfig(**shared, seed=seed, round=number, in_context=settings.in_context)


def teach(round_: Round) -> Taught:
    """Adds the round's facts to those of earlier rounds. The latest answer of a chain replaces the earlier ones."""
    from corsa.evaluation.retrieval import FACTS, Fact, Memory

    config: InContextRoundConfig = round_.config
    memory: Memory | None = None
    if round_.leads:
        memory = Memory((), config.in_context.facts)
        if round_.before is not None:
            memory = memory.updated(Memory.load(round_.input_file("previous", FACTS)).facts)
        memory = memory.updated([Fact(edit.chain, edit.prompt, edit.target_new) for edit in round_.edits])
    memory = round_.share(memory)
    assert memory is not None
    return Taught({}, {"facts": len(memory.facts)}, memory=memory)


def _report_notes(name: str, found: Mapping[str, Any]) -> list[str]:
    return [f"{name}: no weight is changed; the nearest of {found['facts']} facts stand before each question."]


def _load_teach() -> Teach:
    return teach


_NO_CHANGE = "it changes no weight, the facts stand before each question"

METHODS = (
    Method(
        "in-context",
        "in-context retrieval",
        _round_config,
        InContextRoundConfig,
        _load_teach,
        notes=_report_notes,
        looks_back=lambda config: True,
        refuses={
            "adapter": f"in-context leaves no adapter: {_NO_CHANGE}",
            "programs": f"the facts are questions with short answers, and {_NO_CHANGE}",
            "routing": _NO_CHANGE,
            "specificity": _NO_CHANGE,
        },
        colour="#3a93a8",
        symbol="cross",
    ),
)
