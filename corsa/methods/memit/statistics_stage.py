"""MEMIT's key statistics: gathered once per (model, layers, corpus) on Ray Data, for all methods, seeds and rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch

from corsa.config import ModelConfig, Placement
from corsa.config.steps import StatisticsConfig
from corsa.errors import CorsaError
from corsa.flow.ray_data import map_with_model, retried
from corsa.flow.task import Task
from corsa.methods.memit.corpora import NEUTRAL, NEUTRAL_NAME, corpus_texts
from corsa.methods.memit.key_statistics import KeyStatistics, gather
from corsa.methods.memit.settings import layers_for
from corsa.models.encoding import Encoder
from corsa.models.loading import load_model, load_tokenizer

TEXTS_PER_BATCH = 256
"""Texts per block; the sums of the blocks are added in the order of the corpus."""


class Gather:
    """An actor that turns texts into sums of k k^T."""

    def __init__(self, model: ModelConfig, layers: tuple[int, ...] | None, placement: Placement) -> None:
        torch.set_num_threads(placement.threads or max(1, torch.get_num_threads()))
        self.device = torch.device("cuda" if placement.gpu else "cpu")
        self.encoder = Encoder(load_tokenizer(model), model.template)
        self.model = load_model(model, self.device)
        self.layers = layers_for(self.model.config, layers)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = gather(self.model, self.encoder, list(batch["text"]), self.layers, self.device)
        sums = torch.stack([found.sums[layer] for layer in self.layers])
        return {"layers": [np.array(self.layers)], "sums": [sums.cpu().numpy()], "tokens": [found.tokens]}


def compute(task: Task) -> dict[str, Any]:
    """Step function: the corpus -> statistics.safetensors."""
    config: StatisticsConfig = task.config
    placement = task.placement
    corpus = Path(placement.corpus).name if placement.corpus else NEUTRAL_NAME
    texts = list(corpus_texts(placement.corpus or NEUTRAL))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    total = retried(placement, lambda: _gathered(texts, config, placement))
    if total is None:
        raise CorsaError(f"{corpus} holds no text to gather key statistics from")
    total.save(task.output / "statistics.safetensors")
    return {"tokens": total.tokens, "corpus": corpus, "texts": len(texts)}


def _gathered(texts: list[str], config: StatisticsConfig, placement: Placement) -> KeyStatistics | None:
    """The sums over all texts; None if there is no text."""
    total: KeyStatistics | None = None
    data = ray.data.from_items([{"text": text} for text in texts])
    arguments = (config.model, config.layers, placement)
    for row in map_with_model(data, Gather, arguments, placement, batch_size=TEXTS_PER_BATCH).iter_rows():
        sums = {int(layer): torch.tensor(one) for layer, one in zip(row["layers"], row["sums"], strict=True)}
        part = KeyStatistics(sums, int(row["tokens"]))
        total = part if total is None else total + part
    return total
