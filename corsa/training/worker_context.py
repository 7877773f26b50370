"""What a worker group keeps between rounds: the loaded model with LoRA attached, and the token tables."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from corsa.algorithm.batch import Batch, MicroBatch, counts
from corsa.algorithm.logprobs import packing_is_exact
from corsa.algorithm.packing import TAUGHT, Triplet, pack
from corsa.config import LoraConfig, ModelConfig, Placement
from corsa.config.code_steps import SamplesConfig
from corsa.config.steps import PerplexityConfig, PredictionConfig, RoundConfig, SanityQuestionsConfig, SpecificityConfig
from corsa.lora.flat import Lora
from corsa.models.encoding import Encoder
from corsa.models.loading import load_tokenizer
from corsa.training.memory_usage import peak_since, start_peak
from corsa.training.tokens import TokenTable
from corsa.training.worker_group import WorkerGroup

Post = Callable[[dict[str, Any]], None]
"""Called with new values for the progress display."""


@dataclass(frozen=True)
class Loaded:
    """A model with LoRA attached, and its encoder.

    Attributes:
        packed: whether its packed rows give the same log-probabilities.
        other: a leaf (1, P) that is trained instead of LoRA's.
    """

    model: PreTrainedModel
    lora: Lora
    encoder: Encoder
    packed: bool
    other: nn.Parameter | None = None

    @property
    def phi(self) -> nn.Parameter:
        """What is trained."""
        return self.lora.phi if self.other is None else self.other


@dataclass(frozen=True)
class Share:
    """The edits one adapter learns from in a step: the whole global batch, and this worker's parts of it."""

    whole: Sequence[Triplet]
    parts: Sequence[Sequence[Triplet]]


class WorkerContext:
    """The state of one worker. It reloads the model only when the next step needs another one."""

    def __init__(self, group: WorkerGroup, placement: Placement, tables: dict[str, TokenTable]) -> None:
        self.group, self.placement, self.tables = group, placement, tables
        self.notes: list[str] = []  # what happened in the current step, for its record
        self.spent: dict[str, float] = {}  # seconds of the current step outside training and prediction
        self._key: tuple[ModelConfig, LoraConfig] | None = None
        self._loaded: Loaded | None = None
        self._checked = False  # whether packed rows have been compared with plain ones

    @property
    def parameters(self) -> int | None:
        """Total parameters of the loaded base model, sharded ones included; None if none is loaded."""
        if self._loaded is None:
            return None
        return sum(getattr(p, "ds_numel", p.numel()) for p in self._loaded.model.parameters())

    def start_step(self) -> None:
        """Begins the notes and the peak memory of a step."""
        self.notes = []
        start_peak(self.group.device)

    def how_it_ran(self, together: int = 1) -> dict[str, Any]:
        """How the step was run, for its record. The peak memory is that of this worker, in bytes.

        Args:
            together: the number of steps that shared the time.
        """
        group = self.group
        how = {
            "peak_memory": peak_since(group.device),
            "workers": group.size,
            "gpu": group.device.type == "cuda",
        }
        spent = {f"{what}_s": round(seconds / together, 3) for what, seconds in self.spent.items()}
        return how | spent | {"parameters": self.parameters} | ({"notes": self.notes} if self.notes else {})

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the time of the block to `what` of the current step: stream, loading, data or checkpoints."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.spent[what] = self.spent.get(what, 0.0) + time.monotonic() - began

    def open(
        self,
        config: PredictionConfig | SamplesConfig | SpecificityConfig | SanityQuestionsConfig | PerplexityConfig,
        sample: Sequence[Triplet],
        adapters: int = 1,
    ) -> Loaded:
        """The model of a step, with `adapters` adapters of its shape. `sample` tests whether its rows can be packed."""
        with self.timed("loading"):
            return self._open(config, sample, adapters)

    def _open(
        self,
        config: PredictionConfig | SamplesConfig | SpecificityConfig | SanityQuestionsConfig | PerplexityConfig,
        sample: Sequence[Triplet],
        adapters: int,
    ) -> Loaded:
        shape = config.lora if isinstance(config, RoundConfig) else None  # None: LoRA is off, so any shape works
        if not (self._loaded and self._key and self._key[0] == config.model and shape in (None, self._key[1])):
            if self._loaded:  # free the old model before loading the new one
                old, self._loaded = self._loaded.model, None
                self.group.let_go(old)
                del old
            self._key = (config.model, shape or LoraConfig())
            model = self.group.place(config.model)
            encoder = Encoder(load_tokenizer(config.model), config.model.template)
            self._loaded, self._checked = Loaded(model, Lora(model, self._key[1]), encoder, packed=True), False
        if len(self._loaded.lora.phi) != adapters:
            self._loaded.lora.resize(adapters)
        if sample and not self._checked:
            self._loaded, self._checked = replace(self._loaded, packed=self._packs(self._loaded, config, sample)), True
        return self._loaded

    def _packs(
        self,
        loaded: Loaded,
        config: PredictionConfig | SamplesConfig | SpecificityConfig | SanityQuestionsConfig | PerplexityConfig,
        sample: Sequence[Triplet],
    ) -> bool:
        with loaded.lora.off():
            packed = packing_is_exact(loaded.model, sample, loaded.model.dtype, self.group.device)
        if not packed and self.group.leads:
            print(f"warning: {config.model.name} treats packed rows differently: running unpacked, slower, same result")
        return packed

    def batch(self, loaded: Loaded, shares: Sequence[Share], unit: int, bound: float | None = None) -> Batch:
        """This worker's part of a global batch, sorted by length and cut into micro-batches.

        Args:
            loaded: the model.
            shares: one per adapter; several if adapters are trained together.
            unit: parts of at most this many edits are not cut: a perturbation is computed from a whole part.
            bound: probability above which a new answer counts as learnt.
        """
        size = max(self.placement.micro_batch, unit)
        micro = []
        for parts in zip(*(share.parts for share in shares), strict=True):  # the same number of edits for every adapter
            ordered = [sorted(part, key=len) for part in parts]
            cuts = range(0, len(ordered[0]), size)
            micro += [self._micro_batch(loaded, [part[i : i + size] for part in ordered], bound) for i in cuts]
        whole = [share.whole for share in shares]
        return Batch(self.group.pad_passes(micro), len(whole[0]), counts(whole, self.group.device))

    def _micro_batch(self, loaded: Loaded, adapters: Sequence[Sequence[Triplet]], bound: float | None) -> MicroBatch:
        device, flat = self.group.device, [t for own in adapters for t in own]
        packed = pack(flat, dtype=loaded.model.dtype, packed=loaded.packed, adapters=len(adapters))
        reference = torch.tensor([t.reference for t in flat], dtype=torch.float32, device=device).T
        role = None
        if any(t.role != TAUGHT for t in flat):
            role = torch.tensor([[t.role for t in own] for own in adapters], device=device)
        return MicroBatch(
            [rows.to(device) for rows in packed],
            reference.reshape(2, len(adapters), -1),
            counts(adapters, device),
            role,
            self._bounds(adapters, bound),
        )

    def _bounds(self, adapters: Sequence[Sequence[Triplet]], bound: float | None) -> float | Tensor:
        """Log p that each new answer must exceed, (K, E), nats. An answer that is kept has no bound."""
        if bound is None:
            return -math.inf
        bounds = [[-math.inf if t.kept else math.log(bound) for t in own] for own in adapters]
        return torch.tensor(bounds, device=self.group.device)
