"""One round of MEMIT: the leader computes the change of a few layers, which is added to that of earlier rounds."""

from __future__ import annotations

import time
from typing import Any

from corsa.lora.attached import attached
from corsa.methods.base import Round, Taught
from corsa.methods.memit import MemitRoundConfig
from corsa.methods.memit.algorithm import memit
from corsa.methods.memit.key_statistics import KeyStatistics
from corsa.methods.memit.settings import settings_for


def teach(round_: Round) -> Taught:
    """Teach all edits of a round with one solve (Meng et al. 2023, Algorithm 1)."""
    config: MemitRoundConfig = round_.config
    round_.post({"phase": "training"})
    change: Any = dict(round_.before or {})
    began = time.monotonic()
    found: Any = {}
    metrics: dict[str, Any] = {}
    if round_.leads:  # one solve for all edits of the round: the other workers wait
        statistics = KeyStatistics.load(round_.input_file("statistics", "statistics.safetensors"))
        with round_.lora.off(), attached(round_.model, change):
            found, metrics = memit(
                round_.model,
                round_.encoder,
                round_.edits,
                statistics,
                settings_for(round_.model.config, config.memit),
                seed=config.seed,
                post=round_.post,
            )
    found = round_.share(found)
    change = {name: change[name] + delta if name in change else delta for name, delta in found.items()}
    return Taught(change, metrics | {"training_s": round(time.monotonic() - began, 3)})
