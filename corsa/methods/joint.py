"""Joint training: each round trains a fresh adapter on all facts that hold, the bound of what looking back can give."""

from __future__ import annotations

from corsa.config import ALONE, RunSettings
from corsa.config.steps import RoundConfig
from corsa.methods import step_methods
from corsa.methods.base import Method, Round, Taught, Teach


class JointRoundConfig(RoundConfig):
    """A round of joint training; `step` is plain LoRA's."""


def _round_config(settings: RunSettings, seed: int, number: int) -> JointRoundConfig:
    plain = step_methods.round_config("lora", settings, seed, number)
    training = plain.training.model_copy(update=ALONE)  # earlier facts are among the round's own
    return JointRoundConfig(**dict(plain.model_copy(update={"training": training})))


def teach(round_: Round) -> Taught:
    """Plain LoRA from its initial values, on the facts of this round and on those of earlier ones that still hold."""
    round_.lora.initialise(round_.config.seed)
    curves = round_.train([*round_.earlier, *round_.triplets], "all")
    return Taught(round_.lora.adapter(), {"facts_taught": len(round_.earlier) + len(round_.triplets)}, curves)


def _load_teach() -> Teach:
    return teach


METHODS = (
    Method(
        "joint",
        "joint training",
        _round_config,
        JointRoundConfig,
        _load_teach,
        continues=False,
        looks_back=lambda config: True,
    ),
)
