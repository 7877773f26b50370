"""One round of AlphaEdit: the leader computes the change of a few layers, and keeps the keys of all edits so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from corsa.methods.alphaedit import AlphaEditRoundConfig
from corsa.methods.alphaedit.null_space import alphaedit
from corsa.methods.alphaedit.settings import settings_for
from corsa.methods.base import STATE, Round, Taught
from corsa.methods.memit.key_statistics import KeyStatistics
from corsa.methods.memit.teach import solved_once


def teach(round_: Round) -> Taught:
    """Teach all edits of a round with one solve, in which the keys of all earlier rounds' edits are preserved."""
    config: AlphaEditRoundConfig = round_.config
    keys: dict[str, Tensor] = {}  # by layer

    def change(statistics: KeyStatistics) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        if round_.before is not None:
            keys.update(load_file(round_.input_file("previous", STATE)))
        written = alphaedit(
            round_.model,
            round_.encoder,
            round_.edits,
            statistics,
            {int(layer): known for layer, known in keys.items()},
            settings_for(round_.model.config, config.alphaedit),
            seed=config.seed,
            post=round_.post,
        )
        for layer, own in written.keys.items():
            keys[str(layer)] = torch.cat([keys[str(layer)], own], dim=1) if str(layer) in keys else own
        return written.delta, written.metrics

    return replace(solved_once(round_, change), state=keys)
