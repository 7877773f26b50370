"""The cost of a CoRSA step compared with plain LoRA and with a literal Algorithm 1, on the same edits."""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from corsa.algorithm.batch import Batch
from corsa.algorithm.logprobs import answer_logprobs
from corsa.algorithm.packing import Triplet, pack
from corsa.algorithm.row_settings import RowSettings
from corsa.algorithm.step import corsa_step
from corsa.config import STEPS, LoraConfig, ModelConfig, Placement, StepConfig, TrainingConfig
from corsa.data.edit import Edit
from corsa.errors import CorsaError
from corsa.lora.flat import Lora
from corsa.models.encoding import Encoder
from corsa.models.loading import load_model, load_tokenizer
from corsa.perf.literal import literal_step
from corsa.perf.rounding import Rounding, measure_rounding
from corsa.perf.timeline import Timeline, clock
from corsa.training.adamw import PlainAdamW
from corsa.training.tokens import batch_order
from corsa.training.worker_context import Loaded, Share, WorkerContext
from corsa.training.worker_group import WorkerGroup

_WARM_UP = 1  # steps of each kind that are not counted


@dataclass(frozen=True)
class StepFigures:
    """Medians over the measured steps. In seconds unless the name gives another unit."""

    lora_s: float
    corsa_s: float
    literal_s: float
    corsa_over_lora: float
    literal_over_corsa: float
    corsa_edits_per_s: float
    overhead_fraction: float  # share of the CoRSA step outside forward and backward
    padding_ratio: float  # tokens processed / tokens needed
    tokens_processed: int  # mean over batches, by one forward pass of CoRSA
    tokens_needed: int
    max_update_error: float  # largest difference in phi after one update, packed against literal
    breakdown_s: dict[str, float]  # of the CoRSA step
    rounding: Rounding | None  # of a base that is not float32
    peak_memory_gib: float  # of the process, all three kinds of step together
    steps: int
    batch: int
    micro_batch: int
    threads: int
    clock: str
    device: str
    model: str
    dtype: str


def measure_step(
    model: ModelConfig,
    edits: Sequence[Edit],
    *,
    batch: int,
    steps: int,
    placement: Placement,
    cpu_time: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> StepFigures:
    """Run plain LoRA, CoRSA and the literal CoRSA in turn, `steps` times, each time on a new batch.

    Plain LoRA runs the same step on rows without y_old, which its loss does not need.

    Raises:
        CorsaError: there are fewer edits than a batch holds.
    """
    if len(edits) < batch:
        raise CorsaError(f"a batch of {batch} edits was asked, the benchmark has {len(edits)}: lower --batch")
    group = WorkerGroup.join(placement)
    base, encoder = load_model(model, group.device), Encoder(load_tokenizer(model), model.template)
    loaded = Loaded(base, Lora(base, LoraConfig()), encoder, packed=True)
    context, training = WorkerContext(group, placement, {}), TrainingConfig()
    phi, corsa, lora = loaded.lora.phi, StepConfig(), STEPS["lora"](StepConfig())
    optimizer = PlainAdamW(phi)
    optimizer.param_groups[0]["lr"] = training.learning_rate
    timeline = Timeline(base, optimizer, clock(group.device, cpu_time))
    order = batch_order(len(edits), batch, seed=0, round_=1, epoch=0)
    batches = [order[i % len(order)] for i in range(_WARM_UP + steps + 1)]
    batches = [chosen if len(chosen) == batch else order[0] for chosen in batches]

    def fast(config: StepConfig, whole: Sequence[Triplet]) -> Batch:
        timeline.start()
        cut = context.batch(loaded, [Share(whole, [whole])], unit=1)
        timeline.cut("packing")
        settings = RowSettings.of([config], phi.device)
        corsa_step(timeline.model, phi, cut, settings, optimizer, training.clip, timeline.reduce)
        timeline.cut("log")
        return cut

    def literal(whole: Sequence[Triplet]) -> None:
        timeline.start()
        literal_step(base, loaded.lora, whole, corsa, optimizer, training.clip)
        timeline.cut("log")

    seconds: dict[str, list[float]] = {"lora": [], "corsa": [], "literal": []}
    parts: list[dict[str, float]] = []
    outside, processed, needed = [], [], []
    for number, chosen in enumerate(batches[:-1], start=1 - _WARM_UP):
        whole = _with_reference(loaded, [edits[i] for i in chosen])
        fast(lora, [replace(t, old=()) for t in whole])
        took = {"lora": sum(timeline.seconds.values())}
        cut = fast(corsa, whole)
        took["corsa"] = sum(timeline.seconds.values())
        split, rest = dict(timeline.seconds), timeline.outside_the_passes
        literal(whole)
        took["literal"] = sum(timeline.seconds.values())
        if number < 1:
            continue
        for kind, s in took.items():
            seconds[kind].append(s)
        parts.append(split)
        outside.append(rest / took["corsa"])
        processed.append(sum(rows.input_ids.numel() for part in cut.parts for rows in part.rows))
        needed.append(sum(map(len, whole)))
        say(f"step {number}/{steps}: " + ", ".join(f"{kind} {s:.2f} s" for kind, s in took.items()))

    error = _update_error(
        loaded.lora,
        optimizer,
        _with_reference(loaded, [edits[i] for i in batches[-1]]),
        lambda whole: fast(corsa, whole),
        literal,
    )
    peak = _peak_memory(group.device)
    rounding = None
    if base.dtype != torch.float32:
        whole = _with_reference(loaded, [edits[i] for i in batches[-1]])
        rounding = measure_rounding(
            loaded,
            lambda: context.batch(loaded, [Share(whole, [whole])], unit=1),
            RowSettings.of([corsa], phi.device),
        )
    middle = {kind: median(found) for kind, found in seconds.items()}
    return StepFigures(
        lora_s=middle["lora"],
        corsa_s=middle["corsa"],
        literal_s=middle["literal"],
        # ratios are taken within a step, so that all three ran under the same machine load
        corsa_over_lora=median(c / p for c, p in zip(seconds["corsa"], seconds["lora"], strict=True)),
        literal_over_corsa=median(a / c for a, c in zip(seconds["literal"], seconds["corsa"], strict=True)),
        corsa_edits_per_s=batch / middle["corsa"],
        overhead_fraction=median(outside),
        padding_ratio=sum(processed) / sum(needed),
        tokens_processed=round(sum(processed) / steps),
        tokens_needed=round(sum(needed) / steps),
        max_update_error=error,
        breakdown_s={name: median(p.get(name, 0.0) for p in parts) for name in parts[0]},
        rounding=rounding,
        peak_memory_gib=peak,
        steps=steps,
        batch=batch,
        micro_batch=placement.micro_batch,
        threads=torch.get_num_threads(),
        clock="cpu" if cpu_time else "wall",
        device=torch.cuda.get_device_name(group.device) if group.device.type == "cuda" else "cpu",
        model=model.name,
        dtype=model.dtype,
    )


def _with_reference(loaded: Loaded, edits: Sequence[Edit]) -> list[Triplet]:
    """The edits as token ids with the reference column. Its time is not part of any step."""
    encoder = loaded.encoder
    found = [
        Triplet(encoder.prompt(e.prompt), encoder.answer(e.target_new), encoder.answer(e.target_old)) for e in edits
    ]
    rows = [r.to(loaded.model.device) for r in pack(found, dtype=loaded.model.dtype)]
    with torch.no_grad(), loaded.lora.off():
        logp = answer_logprobs(loaded.model, rows, len(found)).tolist()
    return [replace(t, reference=(new, old)) for t, new, old in zip(found, *logp, strict=True)]


def _update_error(
    lora: Lora,
    optimizer: torch.optim.Optimizer,
    whole: Sequence[Triplet],
    fast: Callable[[Sequence[Triplet]], Any],
    literal: Callable[[Sequence[Triplet]], Any],
) -> float:
    """The largest difference in phi between the two steps, both from the same phi and moments."""
    start, state = lora.phi.detach().clone(), copy.deepcopy(optimizer.state_dict())
    found = []
    for take in (fast, literal):
        with torch.no_grad():
            lora.phi.copy_(start)
        optimizer.load_state_dict(copy.deepcopy(state))
        take(whole)
        found.append(lora.phi.detach().clone())
    return float((found[0] - found[1]).abs().max())


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
