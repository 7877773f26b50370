"""CoRSA, plain LoRA and the ablations of Table 9. All use the step of Algorithm 1, with different settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from corsa.config import STEPS, TRAININGS, RunSettings
from corsa.config.steps import RoundConfig
from corsa.methods.base import Method

_LABELS = {
    "lora": "LoRA",
    "corsa": "CoRSA",
    "corsa-no-sam": "CoRSA without SAM",
    "corsa-no-dpo": "CoRSA without DPO",
    "corsa-no-pcgrad": "CoRSA without PCGrad",
    "corsa-published": "CoRSA, published trainer",
    "replay": "LoRA with replay",
    "corsa-replay": "CoRSA with replay",
    "replay-pcgrad": "LoRA with replay and PCGrad",
    "replay-ridge": "LoRA with replay and ridge",
}
_LOOKS = {"lora": ("#c2681d", "square"), "corsa": ("#2f7fd6", "circle")}


def round_config(name: str, settings: RunSettings, seed: int, number: int) -> RoundConfig:
    """The round configuration of a method that is a setting of the step."""
    training = TRAININGS[name](settings.training) if name in TRAININGS else settings.training
    return RoundConfig(
        model=settings.model,
        evaluation=settings.evaluation.for_predictions(),
        seed=seed,
        round=number,
        lora=settings.lora,
        step=STEPS[name](settings.corsa).effective(),
        training=training.effective(settings.model.template),
    )


def replays(config: RoundConfig) -> bool:
    """Whether batches of the round hold facts of earlier ones."""
    return config.training.replay > 0


def _method(name: str) -> Method:
    colour, symbol = _LOOKS.get(name, (None, None))
    make: Callable[[RunSettings, int, int], RoundConfig] = partial(round_config, name)
    return Method(name, _LABELS[name], make, RoundConfig, looks_back=replays, colour=colour, symbol=symbol)


METHODS = tuple(_method(name) for name in STEPS)
