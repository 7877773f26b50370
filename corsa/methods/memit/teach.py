"""One round of MEMIT: the leader computes the change of a few layers, which is added to that of earlier rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from corsa.lora.attached import attached
from corsa.methods.base import Round, Taught
from corsa.methods.memit import MemitRoundConfig
from corsa.methods.memit.algorithm import memit
from corsa.methods.memit.key_statistics import KeyStatistics
from corsa.methods.memit.settings import settings_for


def teach(round_: Round) -> Taught:
    """Teach all edits of a round with one solve (Meng et al. 2023, Algorithm 1)."""
    config: MemitRoundConfig = round_.config

    def change(statistics: KeyStatistics) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        settings = settings_for(round_.model.config, config.memit)
        return memit(
            round_.model,
            round_.encoder,
            round_.edits,
            statistics,
            settings,
            seed=config.seed,
            post=round_.post,
        )

    return solved_once(round_, change)


def solved_once(
    round_: Round, solve: Callable[[KeyStatistics], tuple[Mapping[str, Tensor], Mapping[str, Any]]]
) -> Taught:
    """A round with one solve for all its edits, by the leader; the other workers wait.

    Args:
        round_: the round.
        solve: from the key statistics to the round's change (module name -> (outputs, inputs)) and its metrics, on the
            model as edited so far.
    """
    before: Any = dict(round_.before or {})
    began = time.monotonic()
    found: Mapping[str, Tensor] = {}
    metrics: Mapping[str, Any] = {}
    if round_.leads:
        statistics = KeyStatistics.load(round_.input_file("statistics", "statistics.safetensors"))
        with round_.lora.off(), attached(round_.model, before):
            found, metrics = solve(statistics)
    found = round_.share(found)
    change = {name: before[name] + delta if name in before else delta for name, delta in found.items()}
    return Taught(change, {**metrics, "training_s": round(time.monotonic() - began, 3)})
