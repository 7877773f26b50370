"""A run on a cluster that is described in a file: hours, cost, sharding, groups side by side, and the schedule.

Every rate is named with its source: measured by this project, stated in the file, or assumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import Field, ValidationError

from corsa.config import Frozen, Placement
from corsa.config.amounts import as_bytes
from corsa.config.bounded_yaml import read_yaml
from corsa.config.steps import (
    EditsConfig,
    PartConfig,
    PredictionConfig,
    QuestionsConfig,
    ReferenceConfig,
    ReportConfig,
    RoundConfig,
    RoundsConfig,
    SpecificityConfig,
)
from corsa.errors import CorsaError
from corsa.flow.step import Step, topological
from corsa.planning.plan import Job, Plan, plan
from corsa.planning.rates import Rate
from corsa.planning.simulation import Schedule, simulate

READ = 4498.0
"""Edits read and checked per second in one process: measured (docs/performance.md)."""
START_S = 8.7
"""Seconds from the request for a worker group to its first step, without the model: measured (docs/performance.md)."""
PROMPT, ANSWER, PROBES = 12, 8, 13
"""Tokens of a question and of an answer, and probes of an edit, as in CounterFact: assumed."""
MMLU_TOKENS = 120
"""Tokens of an MMLU question beside the examples that its subject shares: assumed."""
MMLU_SUBJECTS, MMLU_QUESTIONS = 57, 14_042
"""Subjects and test questions of MMLU (Hendrycks et al. 2021)."""
ROWS = 30_000.0
"""Answers per second of a report: assumed."""


class ClusterSpec(Frozen):
    """A cluster of equal nodes."""

    nodes: int = Field(ge=1, description="nodes")
    gpus: int = Field(ge=0, description="GPUs of a node; 0: one worker on the CPUs of each node")
    gpu_memory: str = Field(description="memory of a GPU (without GPUs: of a node), such as 80GiB")
    ram: str | None = Field(default=None, description="CPU memory of a node, for offloading; default: not checked")
    tflops: float = Field(gt=0, description="sustained TFLOP/s of a worker in bfloat16")
    bandwidth: float = Field(gt=0, description="GB/s of a worker's memory: how fast the weights are read for a token")
    link: float = Field(gt=0, description="GB/s at which a worker receives shards of the base")
    disk: float = Field(default=1.0, gt=0, description="GB/s at which a worker loads the weights")
    price: float = Field(default=0.0, ge=0, description="of a GPU (without GPUs: of a node) for an hour")
    currency: str = Field(default="USD", description="of the price")

    @classmethod
    def read(cls, path: Path) -> ClusterSpec:
        """The cluster of a YAML file.

        Raises:
            CorsaError: it cannot be read, or a field is missing, unknown or out of bounds.
        """
        try:
            return cls.model_validate(read_yaml(path) or {})
        except ValidationError as error:
            first = error.errors()[0]
            raise CorsaError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise CorsaError(f"{path} cannot be read as YAML: {error}") from error

    @property
    def workers(self) -> int:
        """Workers of the whole cluster."""
        return self.nodes * max(1, self.gpus)


class Source(NamedTuple):
    """A rate: its name, value with unit, and where it comes from."""

    name: str
    value: str
    source: str


@dataclass(frozen=True)
class Forecast:
    """A run on a cluster with groups of one size. plans: of each model. unknown: names of steps without an estimate,
    which count as 0 s.
    """

    spec: ClusterSpec
    workers: int
    plans: Mapping[str, Plan]
    schedule: Schedule
    path: list[Step]
    path_s: float
    unknown: list[str] = field(default_factory=list)

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.schedule.seconds / 3600

    @property
    def cost(self) -> float:
        """Of the whole cluster for the whole run, in the currency of the file."""
        return self.hours * self.spec.price * self.spec.workers


class Durations:
    """The expected seconds of steps on the workers of one group."""

    def __init__(self, spec: ClusterSpec, workers: int, edits: Mapping[str, int], step_s: Mapping[str, Plan]) -> None:
        self.spec, self.workers, self.edits, self.plans = spec, workers, edits, step_s
        self.unknown: list[str] = []

    def __call__(self, step: Step) -> float:
        """Seconds of a step without the start of its group."""
        config, facts = step.config, self.facts(step)
        match config:
            case RoundConfig():
                taught = facts / self.rounds(step)
                steps = -(-int(taught) // config.training.own) * config.training.epochs
                chosen = self.plans[config.model.name].recommended
                assert chosen is not None, "`forecast` takes groups in which the model fits"
                return steps * chosen.step_s + self.asking(config, taught * config.round)
            case PredictionConfig():
                return self.asking(config, facts)
            case SpecificityConfig():
                return self.forward(config.model.name, self.questions(step) * MMLU_TOKENS)
            case ReferenceConfig():
                return self.forward(config.model.name, facts * (PROMPT + 2 * ANSWER))
            case EditsConfig() | PartConfig():
                return facts / READ
            case RoundsConfig() | QuestionsConfig():
                return 0.0
            case ReportConfig():
                return len(config.shown) * facts * PROBES / ROWS
        self.unknown.append(step.name)
        return 0.0

    def rounds(self, step: Step) -> int:
        """How many rounds the facts of a step are divided over."""
        found = [one.config.rounds for one in topological([step]) if isinstance(one.config, RoundsConfig)]
        return max(1, *found) if found else 1

    def facts(self, step: Step) -> float:
        """Edits that a step reads, trains on or asks."""
        own = [one.config for one in topological([step]) if isinstance(one.config, EditsConfig)]
        parts = [one.config.parts for one in topological([step]) if isinstance(one.config, PartConfig)]
        return sum(self.edits.get(one.digest, one.limit or 1000) for one in own) / max([1, *parts])

    def questions(self, step: Step) -> int:
        """MMLU questions."""
        limits = [one.config.limit for one in topological([step]) if isinstance(one.config, QuestionsConfig)]
        return MMLU_SUBJECTS * limits[0] if limits and limits[0] else MMLU_QUESTIONS

    def forward(self, model: str, tokens: float) -> float:
        """Seconds of forward passes over so many tokens, shared by the workers."""
        return 2 * self.plans[model].parameters * tokens / (self.spec.tflops * 1e12 * self.workers)

    def asking(self, config: PredictionConfig, facts: float) -> float:
        """Seconds to answer the probes of facts: every token of an answer reads the weights once for a whole batch."""
        probes = facts * PROBES
        passes = ANSWER * probes / Placement().probe_batch / self.workers
        weights = self.plans[config.model.name].parameters * (2 if config.model.element == "bfloat16" else 4)
        return self.forward(config.model.name, probes * (PROMPT + ANSWER)) + passes * weights / (
            self.spec.bandwidth * 1e9
        )

    def sources(self) -> list[Source]:
        """Every rate that an estimate uses."""
        stated = "stated in the file"
        return [
            Source("arithmetic of a worker", f"{self.spec.tflops:g} TFLOP/s", stated),
            Source("memory of a worker", f"{self.spec.bandwidth:g} GB/s", stated),
            Source("shards of the base", f"{self.spec.link:g} GB/s", stated),
            Source("loading weights", f"{self.spec.disk:g} GB/s", stated),
            Source("start of a group", f"{START_S:g} s", "measured on 2 CPU cores"),
            Source("reading edits", f"{READ:g}/s", "measured on 2 CPU cores"),
            Source("report", f"{ROWS:g} answers/s", "assumed"),
            Source("an edit's questions", f"{PROBES} of {PROMPT} + {ANSWER} tokens", "assumed"),
        ]


def forecast(targets: Sequence[Step], spec: ClusterSpec, edits: Mapping[str, int] | None = None) -> list[Forecast]:
    """The run in groups of every size that fits, the fastest first.

    Args:
        targets: the steps; all that they need is run as well.
        spec: the cluster.
        edits: {digest of a step of edits: their number}; by default its limit, or 1,000.

    Raises:
        CorsaError: a model fits in no group.
    """
    order = topological(targets)
    jobs = _jobs(order, spec)
    found, why = [], ""
    largest_batch = max((job.batch for job in jobs.values()), default=1)  # a worker without an edit does nothing
    sizes = [2**n for n in range(12) if 2**n <= min(spec.workers, largest_batch) and spec.workers % 2**n == 0]
    for workers in sizes:
        plans = {name: _planned(job, workers, spec) for name, job in jobs.items()}
        misfits = [one for one in plans.values() if one.recommended is None]
        if misfits:
            why = misfits[0].why
            continue
        seconds = Durations(spec, workers, edits or {}, plans)
        largest = max((one.parameters for one in plans.values()), default=0)
        start = START_S + 2 * largest / (spec.disk * 1e9)
        schedule = simulate(targets, seconds, spec.workers // workers, start)
        unknown = list(dict.fromkeys(seconds.unknown))
        path = schedule.critical_path(seconds)
        found.append(Forecast(spec, workers, plans, schedule, path, sum(map(seconds, path)), unknown))
    if not found:
        raise CorsaError(f"no group of this cluster holds the model: {why}")
    return sorted(found, key=lambda one: (one.schedule.seconds, one.workers))


def _jobs(order: Sequence[Step], spec: ClusterSpec) -> dict[str, Job]:
    """For each model the job of its heaviest round, of one worker."""
    jobs: dict[str, Job] = {}
    weights: dict[str, tuple[Any, ...]] = {}
    for step in order:
        config = step.config
        if not isinstance(config, RoundConfig):
            continue
        weight = (config.step.objectives, config.step.rho > 0)
        if config.model.name in jobs and weight <= weights[config.model.name]:
            continue
        weights[config.model.name] = weight
        jobs[config.model.name] = Job(
            model=config.model,
            step=config.step.effective(),
            lora=config.lora,
            tokens=[(PROMPT, ANSWER // 2, ANSWER // 2)],
            edits=1000,
            epochs=config.training.epochs,
            batch=config.training.batch,
            micro_batch=Placement().micro_batch,
            workers=1,
            gpu=spec.gpus > 0,
        )
    return jobs


def _planned(job: Job, workers: int, spec: ClusterSpec) -> Plan:
    rate = Rate(spec.tflops, spec.link, "stated in the file")
    host = as_bytes(spec.ram, "ram") // max(1, spec.gpus) if spec.ram else None
    return plan(replace(job, workers=workers), rate, as_bytes(spec.gpu_memory, "gpu_memory"), host)
