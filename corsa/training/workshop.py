"""What a group of workers keeps from round to round: the model that is loaded, with LoRA attached, and the token
tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from corsa.config import LoraConfig, ModelConfig, Placement
from corsa.identities import AskingConfig, RoundConfig, SpecificityConfig
from corsa.method.logprobs import packing_is_exact
from corsa.method.packing import Triplet, pack
from corsa.method.step import Batch, MicroBatch
from corsa.models.encoding import Encoder
from corsa.models.loading import load_tokenizer
from corsa.models.lora import Lora
from corsa.training.crew import Crew
from corsa.training.tokens import TokenTable


@dataclass(frozen=True)
class Loaded:
    """A model with LoRA attached, and how it is asked. `packed`: its packed rows give the same log-probabilities."""

    model: PreTrainedModel
    lora: Lora
    encoder: Encoder
    packed: bool


class Workshop:
    """One worker's tools. The model changes only where the next step needs another one."""

    def __init__(self, crew: Crew, placement: Placement, tables: dict[str, TokenTable]) -> None:
        self.crew, self.placement, self.tables = crew, placement, tables
        self.notes: list[str] = []  # what befell the step in progress, for its record
        self._key: tuple[ModelConfig, LoraConfig] | None = None
        self._loaded: Loaded | None = None
        self._checked = False  # whether packed rows have been compared with plain ones

    def open(self, config: AskingConfig | SpecificityConfig, sample: Sequence[Triplet]) -> Loaded:
        """The model of a step with LoRA of its shape; `sample` shows whether its rows can be packed."""
        shape = config.lora if isinstance(config, RoundConfig) else None  # None: asked with LoRA off, any shape will do
        if not (self._loaded and self._key and self._key[0] == config.model and shape in (None, self._key[1])):
            if self._loaded:  # the old one goes before the new one comes
                old, self._loaded = self._loaded.model, None
                self.crew.let_go(old)
                del old
            self._key = (config.model, shape or LoraConfig())
            model = self.crew.place(config.model)
            encoder = Encoder(load_tokenizer(config.model), config.model.template)
            self._loaded, self._checked = Loaded(model, Lora(model, self._key[1]), encoder, packed=True), False
        if sample and not self._checked:
            self._loaded, self._checked = replace(self._loaded, packed=self._packs(self._loaded, config, sample)), True
        return self._loaded

    def _packs(self, loaded: Loaded, config: AskingConfig | SpecificityConfig, sample: Sequence[Triplet]) -> bool:
        with loaded.lora.off():
            packed = packing_is_exact(loaded.model, sample, loaded.model.dtype, self.crew.device)
        if not packed and self.crew.leads:
            print(f"warning: {config.model.name} treats packed rows differently: running unpacked, slower, same result")
        return packed

    def batch(self, loaded: Loaded, whole: Sequence[Triplet], parts: Sequence[Sequence[Triplet]], unit: int) -> Batch:
        """This worker's `parts` of the global batch `whole`, cut to micro-batches with neighbours in length together.

        No part of `unit` edits or less is cut: a perturbation is made from it.
        """
        size = max(self.placement.micro_batch, unit)
        micro = []
        for part in parts:
            ordered = sorted(part, key=len)
            micro += [self._micro_batch(loaded, ordered[i : i + size]) for i in range(0, len(ordered), size)]
        return Batch(self.crew.level(micro), edits=len(whole), tokens=sum(len(t.new) for t in whole))

    def _micro_batch(self, loaded: Loaded, triplets: Sequence[Triplet]) -> MicroBatch:
        device = self.crew.device
        rows = [r.to(device) for r in pack(triplets, dtype=loaded.model.dtype, packed=loaded.packed)]
        reference = torch.tensor([t.reference for t in triplets], dtype=torch.float32, device=device).T
        return MicroBatch(rows, reference, sum(len(t.new) for t in triplets))
