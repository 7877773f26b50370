"""`corsa plan`: whether a model fits before anything is started, with which sharding, and how long it will take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import arg

from corsa.cli.commands import app
from corsa.config import STEPS, LoraConfig, ModelConfig, StepConfig
from corsa.errors import CorsaError, unknown_name
from corsa.planning.machine import as_bytes, memory_here


@app.command(name="plan")
def show_plan(
    model: Annotated[str, arg(help="as in the pipelines: alias, hub id, directory or random:<architecture>")],
    gpus: Annotated[int, arg(help="GPUs, a worker each; 0: workers on the CPU")] = 1,
    gpu_memory: Annotated[str | None, arg(metavar="48GiB", help="of each GPU; default: this machine's, if any")] = None,
    ram: Annotated[
        str | None, arg(metavar="256GiB", help="CPU memory of a node, for what is offloaded; default: not checked")
    ] = None,
    gpus_per_node: Annotated[int, arg(help="GPUs that share the memory of a node")] = 8,
    workers: Annotated[int, arg(help="workers on the CPU, with --gpus 0")] = 1,
    method: Annotated[str, arg(help=f"one of {', '.join(STEPS)}")] = "corsa",
    edits: Annotated[int | None, arg(help="edits of a round; default: the benchmark's, else 1000")] = None,
    epochs: Annotated[int, arg(help="passes over them")] = 10,
    batch: Annotated[int, arg(help="edits per optimizer step, over all workers")] = 16,
    micro_batch: Annotated[int, arg(help="edits per forward pass on one worker")] = 16,
    rank: Annotated[int, arg(help="of LoRA")] = 32,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, arg(help="of the base; default: bfloat16 on GPUs, else float32")
    ] = None,
    benchmark: Annotated[str | None, arg(help="count the tokens of its edits; default: about 20 an edit")] = None,
    data: Annotated[str | None, arg(metavar="FILE", help="the benchmark's file")] = None,
    tflops: Annotated[
        float | None, arg(help="what a worker computes, TFLOP/s sustained; default: measured, or 100")
    ] = None,
    measured: Annotated[
        Path | None, arg(metavar="FILE", help="take the rate from a result of `corsa perf gpu`")
    ] = None,
    link: Annotated[float | None, arg(help="GB/s at which a worker gathers shards of the base; default 25")] = None,
    as_json: Annotated[bool, arg(name="json", help="print JSON for a program to read")] = False,
) -> None:
    """What a run holds on each GPU under every sharding, which settings fit, and how long it takes.

    Example: corsa plan --model qwen3-14b --gpus 4 --gpu-memory 48GiB --edits 3000 --epochs 10
    """
    if method not in STEPS:
        raise unknown_name("method", method, STEPS)
    for name, value in {"gpus": gpus + 1, "workers": workers, "epochs": epochs, "batch": batch, "rank": rank}.items():
        if value < 1:
            raise CorsaError(f"--{name} {value - (name == 'gpus')}: give 1 or more")
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
        edits=edits or (len(tokens) if benchmark else 1000),
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
    found = plan(job, rate(gpu, tflops, link, measured), memory, host if gpu else None)
    if as_json:
        print(json.dumps(written(found, method, counted), indent=1))
        return
    console = Console()
    for part in tables(found, method, counted):
        console.print(part)
