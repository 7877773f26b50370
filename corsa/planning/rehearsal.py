"""Runs one training step of the real architecture without weights, to get its peak memory and its FLOPs.

It is the real training step (`corsa.algorithm.step`), with the real LoRA hooks and transformers layers. Only the
tensors are fake: they have shapes but no memory. All layers are alike, so a deep model is rehearsed at two small
depths and extrapolated linearly: the result is exact, in a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.initialization import no_init_weights

from corsa.algorithm.batch import Batch, MicroBatch, counts
from corsa.algorithm.packing import Rows, Triplet, pack
from corsa.algorithm.row_settings import RowSettings
from corsa.algorithm.step import corsa_step
from corsa.config import LoraConfig, StepConfig
from corsa.lora.flat import Lora
from corsa.models.activation_checkpointing import recompute_activations
from corsa.models.recomputed_norms import recompute_norms
from corsa.planning.memory_ledger import Ledger, as_items


@dataclass(frozen=True)
class Footprint:
    """Peak memory of one worker in a step, with the whole base on it.

    items: bytes by purpose (`corsa.planning.memory_ledger.ITEMS`). saved: bytes that autograd keeps from one forward
    pass to its backward pass. flops: floating-point operations of the step (a multiplication and an addition are two).
    parameters, trained: number in the base and in LoRA. activations, logits: maximum bytes of each, not necessarily at
    the peak. kept: the parts of `saved` by kind of layer (`corsa.planning.memory_ledger.KINDS`): bytes, and bytes if
    every tensor had the base's data type.
    """

    items: dict[str, int]
    saved: int
    flops: int
    parameters: int
    trained: int
    activations: int
    logits: int
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Total bytes at the peak."""
        return sum(self.items.values())


def rehearse(
    architecture: PreTrainedConfig,
    dtype: torch.dtype,
    lora: LoraConfig,
    step: StepConfig,
    triplets: Sequence[Triplet],
    *,
    checkpointing: bool = False,
) -> Footprint:
    """The footprint of a step over one micro-batch of `triplets`. A second call for the same step repeats its result.

    Args:
        architecture: the model's configuration; no weights are read.
        dtype: of the frozen base.
        lora: rank of the adapter.
        step: the configuration of the step.
        triplets: the edits of one forward pass.
        checkpointing: recompute each layer in the backward pass instead of keeping its activations.
    """
    shape = _Shape(architecture.to_json_string(), architecture)
    edits = tuple((tuple(t.prompt), tuple(t.new), tuple(t.old)) for t in triplets)
    # pyright does not know that frozen configurations have a hash
    return _rehearsed(shape, dtype, lora, step, edits, checkpointing)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class _Shape:
    """An architecture that can be a key: its text is compared."""

    text: str
    architecture: PreTrainedConfig = field(compare=False)


_Tokens = tuple[int, ...]


@lru_cache(maxsize=64)
def _rehearsed(
    shape: _Shape,
    dtype: torch.dtype,
    lora: LoraConfig,
    step: StepConfig,
    edits: tuple[tuple[_Tokens, _Tokens, _Tokens], ...],
    checkpointing: bool,
) -> Footprint:
    """Groups of several sizes, and the rounds of a run, often ask for the same step."""
    architecture, triplets = shape.architecture, [Triplet(*edit) for edit in edits]
    depth: int = architecture.num_hidden_layers
    lora = lora.model_copy(update={"layers": None})  # upper bound: the rehearsal uses fewer layers than the model has
    period = _period(getattr(architecture, "layer_types", None) or [])
    low = depth % period + 2 * period

    def at(layers: int) -> _Course:
        return _take(_with_layers(architecture, layers), dtype, lora, step, triplets, checkpointing)

    if depth > low + period:
        first, second = at(low), at(low + period)
        if len(first.peaks) == len(second.peaks):
            more = (depth - low) // period
            return _footprint(first.continued(second, more))
    return _footprint(at(depth))


@dataclass(frozen=True)
class _Course:
    """The peak memory of each part of a step (forward passes, and the halves of backward passes).

    Within a part, memory grows or shrinks evenly from layer to layer, so each peak is linear in the depth.
    """

    peaks: list[tuple[int, ...]]
    counts: dict[str, int]
    """The numbers of a `Footprint`."""
    kept: dict[str, tuple[int, int]]

    def continued(self, other: _Course, more: int) -> _Course:
        """Extrapolates by `more` units of depth; `other` is one unit deeper than this."""

        def line(a: int, b: int) -> int:
            return a + (b - a) * more

        peaks = [tuple(map(line, a, b)) for a, b in zip(self.peaks, other.peaks, strict=True)]
        counts = {name: line(count, other.counts[name]) for name, count in self.counts.items()}
        kept = {
            kind: (line(a, other.kept[kind][0]), line(b, other.kept[kind][1])) for kind, (a, b) in self.kept.items()
        }
        return _Course(peaks, counts, kept)


def _footprint(course: _Course) -> Footprint:
    return Footprint(dict(as_items(max(course.peaks, key=sum))), **course.counts, kept=course.kept)


def _take(
    architecture: PreTrainedConfig,
    dtype: torch.dtype,
    lora_config: LoraConfig,
    step: StepConfig,
    triplets: Sequence[Triplet],
    checkpointing: bool,
) -> _Course:
    rows = pack(triplets, dtype=dtype)
    counts = [int(r.keep.count_nonzero()) for r in rows]
    # transformers treats fake tensors as tracing and then builds masks that it omits in a real step
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, patch.object(masking_utils, "is_tracing", lambda _: False):
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation="sdpa")
        model.tie_weights()
        model.requires_grad_(False).eval()
        recompute_norms(model)
        if checkpointing:
            recompute_activations(model)
        shadows = [Rows(*(None if t is None else fake.from_tensor(t) for t in vars(r).values())) for r in rows]  # type: ignore[arg-type]
        kept = [(shadow.keep, count) for shadow, count in zip(shadows, counts, strict=True)]
        lora = Lora(model, lora_config)
        sizes = {"parameters": sum(p.numel() for p in model.parameters()), "trained": lora.phi.numel()}
        ledger = observed(model, lora, shadows, triplets, step, kept)
    largest = {name: max(as_items(row)[name] for row in ledger.series) for name in ("activations", "logits")}
    kept = {kind: (bytes_, least) for kind, (bytes_, least) in ledger.kept.items()}
    return _Course(peaks(ledger), {"saved": ledger.saved, "flops": ledger.flops} | sizes | largest, kept)


def observed(
    model: PreTrainedModel,
    lora: Lora,
    rows: Sequence[Rows],
    triplets: Sequence[Triplet],
    step: StepConfig,
    kept: Sequence[tuple[torch.Tensor, int]] = (),
) -> Ledger:
    """The ledger of one step after the first, so AdamW's moments already exist. Also works on real tensors."""
    phi = lora.phi
    optimizer = torch.optim.AdamW([phi], lr=1e-4, weight_decay=0.0)
    phi.grad = torch.zeros_like(phi)
    optimizer.step()
    phi.grad = None
    ledger = Ledger(phi, [f.shape[-2:] for f in lora.factors()], model.config.vocab_size, kept)
    ledger.hold("base", [*model.parameters(), *model.buffers()])
    ledger.hold("lora", [phi])
    ledger.hold("activations", [t for r in rows for t in vars(r).values() if t is not None])
    ledger.hold("optimizer", [t for t in optimizer.state[phi].values() if isinstance(t, torch.Tensor)])
    reference = torch.zeros(2, len(triplets), device=phi.device)
    batch = Batch([MicroBatch(rows, reference)], len(triplets), counts([triplets], phi.device))
    settings = RowSettings.of([step], phi.device)
    with ledger.watching(model, {site.name for site in lora.sites}), ledger, ledger.saving():
        corsa_step(model, phi, batch, settings, optimizer, 1.0, lambda tensor: tensor)
    return ledger


def peaks(ledger: Ledger) -> list[tuple[int, ...]]:
    """For each part of the step, the row of the series with the largest sum."""
    edges = [0, *(i for i in range(1, len(ledger.backward)) if ledger.backward[i] != ledger.backward[i - 1])]
    parts = []
    for start, end in zip(edges, [*edges[1:], len(ledger.series)], strict=True):
        middle = (start + end) // 2 if ledger.backward[start] else start
        parts += [part for part in (ledger.series[start:middle], ledger.series[middle:end]) if part]
    return [max(part, key=sum) for part in parts]


def _with_layers(architecture: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    changed = deepcopy(architecture)
    changed.num_hidden_layers = layers
    if getattr(changed, "layer_types", None):
        changed.layer_types = changed.layer_types[:layers]
    return changed


def _period(kinds: Sequence[Any]) -> int:
    """The period after which layer kinds repeat; 1 if all are alike."""
    return next((p for p in range(1, len(kinds)) if all(a == b for a, b in zip(kinds, kinds[p:], strict=False))), 1)
