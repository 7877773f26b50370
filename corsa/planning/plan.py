"""The plan of a run: memory per worker for each setting, which settings fit, the recommended one, and the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from corsa.algorithm.packing import Triplet
from corsa.config import LoraConfig, ModelConfig, ShardingConfig, StepConfig
from corsa.lora.flat import linear_layers
from corsa.models.shapes import architecture, skeleton
from corsa.planning.memory import Holding, hold, in_4_bits, settings
from corsa.planning.rates import Rate
from corsa.planning.rehearsal import rehearse


@dataclass(frozen=True)
class Job:
    """The job to plan. tokens: (prompt, new, old) lengths of the edits; a round may teach more `edits` than that. pack:
    number of adapters trained together.
    """

    model: ModelConfig
    step: StepConfig
    lora: LoraConfig
    tokens: Sequence[tuple[int, int, int]]
    edits: int
    epochs: int
    batch: int
    micro_batch: int
    workers: int
    gpu: bool
    pack: int = 1


@dataclass(frozen=True)
class Choice:
    """A setting: memory of a worker, whether it fits (None: memory unknown), and the time of a step."""

    holding: Holding
    fits: bool | None
    step_s: float


@dataclass(frozen=True)
class Plan:
    """All settings of a job.

    parameters, trained: number in the base and in LoRA. activations, logits: maximum bytes of each, without
    checkpointing. kept: what autograd keeps of a forward pass, by kind of layer (`Footprint.kept`). memory, host: bytes
    of each GPU (or of a worker's share of the machine), and of CPU memory in addition, if known.
    """

    job: Job
    parameters: int
    trained: int
    activations: int
    logits: int
    kept: dict[str, tuple[int, int]]
    choices: list[Choice]
    memory: int | None
    host: int | None
    rate: Rate

    @property
    def recommended(self) -> Choice | None:
        """The fastest setting that fits; if several are equal, the simplest; None if none fits."""
        fitting = [c for c in self.choices if c.fits is not False]
        fastest = min((c.step_s for c in fitting), default=0.0)
        near = [c for c in fitting if c.step_s <= 1.02 * fastest]
        return near[0] if near else None

    @property
    def why(self) -> str:
        """A short reason for the recommended setting."""
        chosen = self.recommended
        if chosen is None:
            least = min(self.choices, key=lambda c: c.holding.total)
            return (
                f"no setting fits: even {least.holding.name} needs {gib(least.holding.total)} GiB where "
                f"{gib(self.memory or 0)} GiB are. Use more or larger GPUs, or a smaller --micro-batch"
            )
        if self.memory is None:
            return f"{chosen.holding.name}: the fastest; the memory was not given, so nothing is known to fit"
        free = gib(self.memory - chosen.holding.total)
        simpler = self.choices[: self.choices.index(chosen)]
        reason = (
            "whole on every worker, nothing to gather"
            if chosen.holding.sharding.zero_stage < 3
            else (
                "the base in shards, since whole it does not fit"
                if any(c.fits is False for c in simpler)
                else "it fits"
            )
        )
        return f"{chosen.holding.name}: the fastest that fits ({reason}), {free} GiB left"

    @property
    def steps(self) -> int:
        """Optimizer steps per round."""
        return -(-self.job.edits // self.job.batch) * self.job.epochs

    def choice(self, sharding: ShardingConfig) -> Choice:
        """The entry of a setting, or the nearest one (sharding over one worker changes nothing)."""

        def distance(choice: Choice) -> tuple[bool, bool, int, bool]:
            own = choice.holding.sharding
            return (
                own.activation_checkpointing != sharding.activation_checkpointing,
                own.offload_parameters != sharding.offload_parameters,
                abs(own.zero_stage - sharding.zero_stage),
                own.offload_optimizer != sharding.offload_optimizer,
            )

        return min(self.choices, key=distance)


def plan(job: Job, rate: Rate, memory: int | None, host: int | None) -> Plan:
    """Rehearse the job's step and evaluate every setting.

    Args:
        job: the job to plan.
        rate: the compute rate of a worker.
        memory: bytes of each GPU, or of a worker's share of the machine; None if unknown.
        host: bytes of CPU memory per worker in addition to its GPU; None if unknown.
    """
    shape = architecture(job.model)
    dtype, four_bits = getattr(torch, job.model.element), job.model.dtype == "nf4"
    own = -(-job.batch // job.workers)
    together = min(own, job.micro_batch)
    longest = sorted(job.tokens, key=sum)[-together:]
    triplets = [Triplet([1] * x, [1] * new, [1] * old) for x, new, old in longest]
    triplets = (triplets * together)[:together]  # fewer lengths than edits: repeat them
    triplets = triplets * job.pack  # as one adapter with the sum of the ranks and all edits
    lora = job.lora.model_copy(update={"rank": job.lora.rank * job.pack})
    mean = sum(map(sum, job.tokens)) / len(job.tokens)
    share = own * job.pack * mean / sum(len(t) for t in triplets)  # work relative to the rehearsed step
    phases = job.step.passes
    choices = []
    plain, checkpointed = (
        rehearse(shape, dtype, lora, job.step, triplets, checkpointing=checkpointing) for checkpointing in (False, True)
    )
    if four_bits:
        weights = [layer.weight.numel() for _, layer in linear_layers(skeleton(job.model))]
        plain, checkpointed = in_4_bits(plain, weights), in_4_bits(checkpointed, weights)
    for checkpointing, footprint in ((False, plain), (True, checkpointed)):
        passes = phases * (3 if checkpointing else 2) * -(-own // together)
        for sharding in settings(job.workers, job.gpu):
            if four_bits and sharding.zero_stage == 3:  # `corsa.models.four_bit` refuses it
                continue
            chosen = sharding.model_copy(update={"activation_checkpointing": checkpointing})
            holding = hold(footprint, chosen, workers=job.workers, gpu=job.gpu, element=dtype.itemsize, passes=passes)
            seconds = share * holding.flops / (rate.tflops * 1e12) + holding.gathers / (rate.link * 1e9)
            choices.append(Choice(holding, _fits(holding, memory, host), seconds))
    about = (plain.parameters, plain.trained, plain.activations, plain.logits, plain.kept)
    return Plan(job, *about, choices, memory, host, rate)


def _fits(holding: Holding, memory: int | None, host: int | None) -> bool | None:
    if memory is None:
        return None
    return holding.total <= memory and (host is None or holding.host <= host)


def gib(bytes_: int) -> str:
    """Bytes in GiB as text; small values have two digits."""
    value = bytes_ / 2**30
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"
