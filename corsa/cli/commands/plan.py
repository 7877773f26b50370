"""`corsa plan`: whether a model fits and with which sharding, how long a run takes, and how many facts and seeds a
comparison needs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Literal

from rich.markup import escape
from tyro.conf import arg

from corsa.cli.commands import app
from corsa.config import STEPS, LoraConfig, ModelConfig, StepConfig
from corsa.config.amounts import as_bytes
from corsa.errors import CorsaError, unknown_name
from corsa.planning.machine import memory_here
from corsa.terminal import Console

WIDTH = 80
"""Columns of the widest table."""


@app.command(name="plan")
def show_plan(
    model: Annotated[
        str | None, arg(help="as in the pipelines: alias, hub id, directory or random:<architecture>")
    ] = None,
    gpus: Annotated[int, arg(help="GPUs, one worker each; 0: workers on the CPU")] = 1,
    gpu_memory: Annotated[
        str | None, arg(metavar="48GiB", help="memory of each GPU; default: that of this machine's GPUs")
    ] = None,
    ram: Annotated[
        str | None, arg(metavar="256GiB", help="CPU memory of a node, for offloading; default: not checked")
    ] = None,
    gpus_per_node: Annotated[int, arg(help="GPUs on a node, which share its CPU memory")] = 8,
    workers: Annotated[int, arg(help="number of workers on the CPU, with --gpus 0")] = 1,
    method: Annotated[str, arg(help=f"one of {', '.join(STEPS)}")] = "corsa",
    edits: Annotated[int | None, arg(help="edits of a round; default: the benchmark's, else 1000")] = None,
    epochs: Annotated[int, arg(help="passes over the edits")] = 10,
    batch: Annotated[int, arg(help="edits per optimizer step, over all workers")] = 16,
    micro_batch: Annotated[int, arg(help="edits per forward pass on one worker")] = 16,
    rank: Annotated[int, arg(help="rank of LoRA")] = 32,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        arg(help="data type of the base; default: bfloat16 on GPUs, else float32"),
    ] = None,
    benchmark: Annotated[
        str | None, arg(help="benchmark whose edit lengths are counted; default: about 20 tokens an edit")
    ] = None,
    data: Annotated[str | None, arg(metavar="FILE", help="the benchmark's file")] = None,
    tflops: Annotated[float | None, arg(help="sustained TFLOP/s of a worker; default: measured, or 100")] = None,
    measured: Annotated[Path | None, arg(metavar="FILE", help="use the rate in a result of `corsa perf gpu`")] = None,
    link: Annotated[float | None, arg(help="GB/s at which a worker gathers shards of the base; default: 25")] = None,
    detect: Annotated[
        float | None,
        arg(
            metavar="POINTS", help="print how many facts and seeds detect a difference of N points between two methods"
        ),
    ] = None,
    tests: Annotated[
        int, arg(help="with --detect: number of verdicts corrected together (primary metrics times pairs of methods)")
    ] = 1,
    run_sd: Annotated[
        float, arg(metavar="POINTS", help="with --detect: how much a method's value varies between runs (SD)")
    ] = 2.0,
    like: Annotated[
        Path | None, arg(metavar="FILE", help="with --detect: use the variances in a report's metrics.json instead")
    ] = None,
    metric: Annotated[
        str | None, arg(help="with --like: metric to use; default: the primary metric that varies most")
    ] = None,
    as_json: Annotated[bool, arg(name="json", help="print JSON for a program to read")] = False,
) -> None:
    """Show the memory of a run on each GPU for every sharding, the settings that fit, and the time; or, with --detect,
    how many facts and seeds detect a difference.

    Examples:
    corsa plan --model qwen3-14b --gpus 4 --gpu-memory 48GiB --edits 3000 --epochs 10
    corsa plan --detect 5
    """
    if detect is not None:
        _show_power(detect, tests, run_sd, like, metric, as_json)
        return
    if model is None:
        raise CorsaError("name what is planned: --model NAME (memory and time), or --detect POINTS (facts and seeds)")
    if method not in STEPS:
        raise unknown_name("method", method, STEPS)
    counts = {"workers": workers, "epochs": epochs, "batch": batch, "rank": rank, "micro-batch": micro_batch}
    counts |= {"gpus-per-node": gpus_per_node} | ({} if edits is None else {"edits": edits})
    for name, value in counts.items():
        if value < 1:
            raise CorsaError(f"--{name} {value}: give 1 or more")
    if gpus < 0:
        raise CorsaError(f"--gpus {gpus}: give 0 or more")
    for name, rate_given in {"tflops": tflops, "link": link}.items():
        if rate_given is not None and not 0 < rate_given < math.inf:
            raise CorsaError(f"--{name} {rate_given:g}: give more than 0")
    size = as_bytes(gpu_memory, "--gpu-memory") if gpu_memory else None
    node = as_bytes(ram, "--ram") if ram else None
    from corsa.planning.lengths import ASSUMED, lengths
    from corsa.planning.plan import Job, plan
    from corsa.planning.rates import rate
    from corsa.planning.tables import as_json as written
    from corsa.planning.tables import tables

    gpu = gpus > 0
    chosen = ModelConfig(name=model, dtype=dtype or ("bfloat16" if gpu else "float32"))
    tokens, counted = lengths(chosen, benchmark, data, None) if benchmark else (ASSUMED, "20 tokens an edit (assumed)")
    job = Job(
        model=chosen,
        step=STEPS[method](StepConfig()).effective(),
        lora=LoraConfig(rank=rank),
        tokens=tokens,
        edits=edits if edits is not None else len(tokens) if benchmark else 1000,
        epochs=epochs,
        batch=batch,
        micro_batch=micro_batch,
        workers=gpus if gpu else workers,
        gpu=gpu,
    )
    memory = size if size is not None else memory_here(gpu)
    if not gpu and memory is not None:
        memory = (node or memory) // workers
    host = None if node is None else node // min(gpus_per_node, max(gpus, 1))
    say = Console(stderr=True)
    doing = f"rehearsing a step of {chosen.name} without its weights, to count memory and arithmetic (half a minute)"
    if say.is_terminal:
        with say.status(escape(doing)):
            found = plan(job, rate(gpu, tflops, link, measured), memory, host if gpu else None)
    else:
        say.print(f"{doing} ...", markup=False, highlight=False, soft_wrap=True)
        found = plan(job, rate(gpu, tflops, link, measured), memory, host if gpu else None)
    if as_json:
        print(json.dumps(written(found, method, counted), indent=1))
        return
    console = Console()
    console.width = max(console.width, WIDTH)  # a number that is cut says nothing
    for part in tables(found, method, counted):
        console.print(part, soft_wrap=isinstance(part, str) and not console.is_terminal)


def _show_power(points: float, tests: int, run_sd: float, like: Path | None, metric: str | None, as_json: bool) -> None:
    """Print how many facts and seeds detect a difference."""
    from corsa.planning.power import assumed, measured, needs, power_table

    if run_sd < 0:
        raise CorsaError(f"--run-sd {run_sd:g}: give 0 or more points")
    if metric and not like:
        raise CorsaError("--metric names a metric of a report: give the report with --like")
    about = measured(like, metric) if like else assumed(run_sd / 100)
    found = needs(points, about.spread, tests)
    if as_json:
        rows = [{"seeds": need.seeds, "facts": need.facts} for need in found]
        told = {"points": points, "tests": tests, "variances": about.spread._asdict(), "source": about.source}
        print(json.dumps(told | {"needs": rows}, indent=1))
        return
    Console().print(power_table(points, found, about, tests))
