"""`corsa plan`: whether a model fits and with which sharding, how long a run takes, and how many facts and seeds a
comparison needs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from tyro.conf import arg

from corsa.cli.commands import AsJson, app
from corsa.config import STEPS, Dtype, Frozen, LoraConfig, ModelConfig, StepConfig
from corsa.config.amounts import as_bytes
from corsa.config.command_line import listed
from corsa.errors import CorsaError, unknown_name
from corsa.models.registry import locate
from corsa.planning.machine import memory_here
from corsa.terminal import Console, working

if TYPE_CHECKING:
    from corsa.planning.plan import Job, Plan

WIDTH = 80
"""Columns of the widest table."""


class Work(Frozen):
    """The training that is planned."""

    model: str | None = Field(
        default=None, description="as in the pipelines: alias, hub id, directory or random:<architecture>"
    )
    method: str = Field(default="corsa", description=f"one of {', '.join(STEPS)}")
    edits: int | None = Field(default=None, description="edits of a round; default: the benchmark's, else 1000")
    epochs: int = Field(default=10, description="passes over the edits")
    batch: int = Field(default=16, description="edits per optimizer step, over all workers")
    micro_batch: int = Field(default=16, description="edits per forward pass on one worker")
    rank: int = Field(default=32, description="rank of LoRA")
    dtype: Dtype | None = Field(
        default=None, description="data type of the base (nf4: 4 bits); default: bfloat16 on GPUs, else float32"
    )
    benchmark: str | None = Field(
        default=None, description="benchmark whose edit lengths are counted; default: about 20 tokens an edit"
    )
    data: Annotated[str | None, arg(metavar="FILE")] = Field(default=None, description="the benchmark's file")


class Machine(Frozen):
    """The machine that it runs on."""

    gpus: int = Field(default=1, description="GPUs, one worker each; 0: workers on the CPU")
    gpu_memory: Annotated[str | None, arg(metavar="48GiB")] = Field(
        default=None, description="memory of each GPU; default: that of this machine's GPUs"
    )
    ram: Annotated[str | None, arg(metavar="256GiB")] = Field(
        default=None, description="CPU memory of a node, for offloading; default: not checked"
    )
    gpus_per_node: int = Field(default=8, description="GPUs on a node, which share its CPU memory")
    workers: int = Field(default=1, description="number of workers on the CPU, with --gpus 0")

    @property
    def memory(self) -> int | None:
        """Bytes of each GPU, or of a CPU worker's share of the node; None if unknown."""
        found = as_bytes(self.gpu_memory, "--gpu-memory") if self.gpu_memory else memory_here(self.gpus > 0)
        if self.gpus or found is None:
            return found
        return (self.node or found) // self.workers

    @property
    def host(self) -> int | None:
        """Bytes of CPU memory per GPU; None if unknown, and for workers on the CPU."""
        if self.node is None or not self.gpus:
            return None
        return self.node // min(self.gpus_per_node, self.gpus)

    @property
    def node(self) -> int | None:
        """Bytes of CPU memory of a node; None if unknown."""
        return as_bytes(self.ram, "--ram") if self.ram else None


class OnCluster(Frozen):
    """In place of one machine: the schedule of a comparison on a cluster."""

    cluster: Annotated[Path | None, arg(metavar="FILE")] = Field(
        default=None,
        description="YAML file of a cluster (nodes, gpus, gpu_memory, tflops, bandwidth, link, price): hours, cost and "
        "schedule of --methods with --seeds there",
    )
    methods: Annotated[tuple[str, ...], listed(str, "A,B")] = Field(
        default=("lora", "corsa"), description="with --cluster: methods that are compared"
    )
    seeds: Annotated[tuple[int, ...], listed(int, "N,N")] = Field(default=(0, 1, 2), description="with --cluster")
    rounds: int = Field(default=1, ge=1, description="with --cluster: rounds that the edits are divided over")


class Speed(Frozen):
    """The speed of a worker."""

    tflops: float | None = Field(default=None, description="sustained TFLOP/s of a worker; default: measured, or 100")
    measured: Annotated[Path | None, arg(metavar="FILE")] = Field(
        default=None, description="use the rate in a result of `corsa perf gpu`"
    )
    link: float | None = Field(
        default=None, description="GB/s at which a worker gathers shards of the base; default: 25"
    )


class Difference(Frozen):
    """In place of memory and time: how many facts and seeds detect a difference."""

    detect: Annotated[float | None, arg(metavar="POINTS")] = Field(
        default=None,
        description="print how many facts and seeds detect a difference of this many points between two methods",
    )
    tests: int = Field(
        default=1,
        description="with --detect: number of verdicts corrected together (primary metrics times pairs of methods)",
    )
    run_sd: Annotated[float, arg(metavar="POINTS")] = Field(
        default=2.0, description="with --detect: how much a method's value varies between runs (SD)"
    )
    like: Annotated[Path | None, arg(metavar="FILE")] = Field(
        default=None, description="with --detect: use the variances in a report's metrics.json instead"
    )
    metric: str | None = Field(
        default=None, description="with --like: metric to use; default: the primary metric that varies most"
    )


@app.command(name="plan")
def show_plan(
    work: Annotated[Work, arg(name="")],
    machine: Annotated[Machine, arg(name="")],
    speed: Annotated[Speed, arg(name="")],
    on_cluster: Annotated[OnCluster, arg(name="")],
    difference: Annotated[Difference, arg(name="")],
    as_json: AsJson = False,
) -> None:
    """Show the memory of a run on each GPU for every sharding, the settings that fit, and the time; or, with --detect,
    how many facts and seeds detect a difference.

    Examples:
    corsa plan --model qwen3-14b --gpus 4 --gpu-memory 48GiB --edits 3000 --epochs 10
    corsa plan --cluster cluster.yaml --model qwen3-8b --edits 500000
    corsa plan --detect 5
    """
    if difference.detect is not None:
        _show_power(difference.detect, difference, as_json)
        return
    _refuse(work, machine, speed)
    if on_cluster.cluster is not None:
        _show_cluster(work, on_cluster, on_cluster.cluster, as_json)
        return
    memory, host = machine.memory, machine.host
    job, counted = _job(work, machine)
    found = _rehearsed(job, speed, memory, host)
    from corsa.planning.tables import as_json as written
    from corsa.planning.tables import tables

    if as_json:
        print(json.dumps(written(found, work.method, counted), indent=1))
        return
    console = Console()
    console.width = max(console.width, WIDTH)  # a number that is cut says nothing
    for part in tables(found, work.method, counted):
        console.print(part, soft_wrap=isinstance(part, str) and not console.is_terminal)


def _refuse(work: Work, machine: Machine, speed: Speed) -> None:
    """Raises `CorsaError` for an option that makes no plan possible."""
    if work.model is None:
        raise CorsaError("name what is planned: --model NAME (memory and time), or --detect POINTS (facts and seeds)")
    if work.method not in STEPS:
        raise unknown_name("method", work.method, STEPS)
    counts = {"workers": machine.workers, "epochs": work.epochs, "batch": work.batch, "rank": work.rank}
    counts |= {"micro-batch": work.micro_batch, "gpus-per-node": machine.gpus_per_node, "edits": work.edits}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise CorsaError(f"--{name} {value}: give 1 or more")
    if machine.gpus < 0:
        raise CorsaError(f"--gpus {machine.gpus}: give 0 or more")
    for name, given in {"tflops": speed.tflops, "link": speed.link}.items():
        if given is not None and not 0 < given < math.inf:
            raise CorsaError(f"--{name} {given:g}: give more than 0")


def _job(work: Work, machine: Machine) -> tuple[Job, str]:
    """The job, and how its tokens were counted."""
    from corsa.planning.lengths import ASSUMED, lengths
    from corsa.planning.plan import Job

    gpu = machine.gpus > 0
    locate(work.model or "")  # refuses a malformed name in a line, before torch is loaded
    model = ModelConfig(name=work.model or "", dtype=work.dtype or ("bfloat16" if gpu else "float32"))
    tokens, counted = ASSUMED, "20 tokens an edit (assumed)"
    if work.benchmark:
        tokens, counted = lengths(model, work.benchmark, work.data, None)
    job = Job(
        model=model,
        step=STEPS[work.method](StepConfig()).effective(),
        lora=LoraConfig(rank=work.rank),
        tokens=tokens,
        edits=work.edits if work.edits is not None else len(tokens) if work.benchmark else 1000,
        epochs=work.epochs,
        batch=work.batch,
        micro_batch=work.micro_batch,
        workers=machine.gpus or machine.workers,
        gpu=gpu,
    )
    return job, counted


def _rehearsed(job: Job, speed: Speed, memory: int | None, host: int | None) -> Plan:
    """The plan of a job (`corsa.planning.plan.plan`). Says on stderr what is being done, because it takes a while."""
    from corsa.planning.plan import plan
    from corsa.planning.rates import rate

    doing = f"rehearsing a step of {job.model.name} without its weights, to count memory and arithmetic (half a minute)"
    with working(doing):
        return plan(job, rate(job.gpu, speed.tflops, speed.link, speed.measured), memory, host)


def _show_cluster(work: Work, on: OnCluster, file: Path, as_json: bool) -> None:
    """Print hours, cost and schedule of a comparison on a cluster."""
    from corsa.config import TrainingConfig
    from corsa.config.steps import RoundsConfig
    from corsa.experiments.base import Experiment
    from corsa.experiments.planner import Planner
    from corsa.models.registry import ARCHITECTURES
    from corsa.planning.cluster import ClusterSpec, forecast
    from corsa.planning.cluster_tables import cluster_json, cluster_tables

    spec = ClusterSpec.read(file)
    name = work.model or ""
    model = ModelConfig(
        name=f"random:{name}" if name in ARCHITECTURES else name,  # weights are neither read nor looked up
        dtype=work.dtype or ("bfloat16" if spec.gpus else "float32"),
    )
    experiment = Experiment(
        model=model,
        methods=on.methods,
        seeds=on.seeds,
        lora=LoraConfig(rank=work.rank),
        training=TrainingConfig(epochs=work.epochs, batch=work.batch),
    ).checked()
    planner = Planner.of(experiment, "")
    taught = planner.facts()
    schedule = planner.schedule(taught, RoundsConfig(rounds=on.rounds, update_share=1.0))
    rounds = range(1, on.rounds + 1)
    chains = [planner.chain(method, seed, taught, schedule, rounds=rounds)[-1] for method, seed in experiment.runs]
    targets = [planner.base(taught), *chains]
    with working(f"rehearsing a step of {name} for every size of group, to count memory and arithmetic (a minute)"):
        found = forecast(targets, spec, {taught.edits.config.canonical()["digest"]: work.edits or 1000})
    if as_json:
        print(json.dumps(cluster_json(found), indent=1))
        return
    console = Console()
    console.width = max(console.width, WIDTH)
    for part in cluster_tables(found):
        console.print(part)


def _show_power(points: float, given: Difference, as_json: bool) -> None:
    """Print how many facts and seeds detect a difference."""
    from corsa.planning.power import assumed, measured, needs, power_table

    if given.run_sd < 0:
        raise CorsaError(f"--run-sd {given.run_sd:g}: give 0 or more points")
    if given.metric and not given.like:
        raise CorsaError("--metric names a metric of a report: give the report with --like")
    about = measured(given.like, given.metric) if given.like else assumed(given.run_sd / 100)
    found = needs(points, about.spread, given.tests)
    if as_json:
        rows = [{"seeds": need.seeds, "facts": need.facts} for need in found]
        told = {"points": points, "tests": given.tests, "variances": about.spread._asdict(), "source": about.source}
        print(json.dumps(told | {"needs": rows}, indent=1))
        return
    Console().print(power_table(points, found, about, given.tests))
