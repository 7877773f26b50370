"""One training step of the real architecture, taken without weights: what it holds at its peak, and its arithmetic.

The step is the one that trains (`corsa.algorithm.step`), with LoRA's own hooks and transformers' own layers; only the
tensors are fake: they have shapes, and no memory. Layers are alike, so a deep model is rehearsed at two small depths
and continued along the straight line through them: exact, at a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.initialization import no_init_weights

from corsa.algorithm.packing import Rows, Triplet, pack
from corsa.algorithm.step import Batch, MicroBatch, corsa_step
from corsa.config import LoraConfig, StepConfig
from corsa.lora.flat import Lora
from corsa.models.activation_checkpointing import recompute_activations
from corsa.planning.memory_ledger import Ledger, as_items


@dataclass(frozen=True)
class Footprint:
    """What one worker holds at the peak of a step with the whole base on it.

    items: bytes by purpose (`corsa.planning.memory_ledger.ITEMS`). saved: bytes that autograd keeps from one forward
    pass to its backward pass. flops: floating-point operations of the step (a multiplication and an addition are two).
    parameters, trained: how many of the base, and of LoRA. activations, logits: bytes of each at its largest, which
    need not be at the peak.
    """

    items: dict[str, int]
    saved: int
    flops: int
    parameters: int
    trained: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Bytes at the peak."""
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
    """The footprint of a step over one micro-batch of `triplets`.

    Args:
        architecture: the model's shape; no weight of it is read.
        dtype: of the frozen base.
        lora: rank of the adapter.
        step: what kind of step.
        triplets: the edits of one forward pass.
        checkpointing: recompute each layer in the backward pass instead of keeping what it computed.
    """
    depth: int = architecture.num_hidden_layers
    lora = lora.model_copy(update={"layers": None})  # an upper bound: the plan is made from fewer layers than there are
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
    """A step in parts (forward passes, and the halves of backward passes): what is held at the peak of each part.

    Within a part what is held grows or shrinks evenly from layer to layer, so each peak is linear in the depth.
    """

    peaks: list[tuple[int, ...]]
    counts: dict[str, int]
    """The fields of `Footprint` beside the items."""

    def continued(self, other: _Course, more: int) -> _Course:
        """This, where `other` is one unit of depth deeper, `more` units deeper."""

        def line(a: int, b: int) -> int:
            return a + (b - a) * more

        peaks = [tuple(map(line, a, b)) for a, b in zip(self.peaks, other.peaks, strict=True)]
        return _Course(peaks, {name: line(count, other.counts[name]) for name, count in self.counts.items()})


def _footprint(course: _Course) -> Footprint:
    return Footprint(dict(as_items(max(course.peaks, key=sum))), **course.counts)


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
    # transformers takes fake tensors for a trace, for which it builds masks that it leaves out in earnest
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, patch.object(masking_utils, "is_tracing", lambda _: False):
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation="sdpa")
        model.tie_weights()
        model.requires_grad_(False).eval()
        if checkpointing:
            recompute_activations(model)
        shadows = [Rows(*(None if t is None else fake.from_tensor(t) for t in vars(r).values())) for r in rows]  # type: ignore[arg-type]
        kept = [(shadow.keep, count) for shadow, count in zip(shadows, counts, strict=True)]
        lora = Lora(model, lora_config)
        sizes = {"parameters": sum(p.numel() for p in model.parameters()), "trained": lora.phi.numel()}
        ledger = observed(model, lora, shadows, triplets, step, kept)
    largest = {name: max(as_items(row)[name] for row in ledger.series) for name in ("activations", "logits")}
    return _Course(peaks(ledger), {"saved": ledger.saved, "flops": ledger.flops} | sizes | largest)


def observed(
    model: PreTrainedModel,
    lora: Lora,
    rows: Sequence[Rows],
    triplets: Sequence[Triplet],
    step: StepConfig,
    kept: Sequence[tuple[torch.Tensor, int]] = (),
) -> Ledger:
    """The ledger of one step that is not the first: AdamW's moments are there already. Works on real tensors too."""
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
    tokens = sum(len(t.new) for t in triplets)
    batch = Batch([MicroBatch(rows, reference, tokens)], len(triplets), tokens)
    with ledger, ledger.saving():
        corsa_step(model, phi, batch, step, optimizer, 1.0, lambda tensor: tensor)
    return ledger


def peaks(ledger: Ledger) -> list[tuple[int, ...]]:
    """The row of the series with the largest sum in each part of the step."""
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
    """After how many layers their kinds repeat; 1 where all are alike."""
    return next((p for p in range(1, len(kinds)) if all(a == b for a, b in zip(kinds, kinds[p:], strict=False))), 1)
