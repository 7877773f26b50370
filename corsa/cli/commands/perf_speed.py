"""`corsa perf step`, `evaluate`, `mmlu`, `data` and `overhead`: what the parts of a run cost."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from tyro.conf import arg

from corsa.cli.commands.perf import perf

if TYPE_CHECKING:
    from corsa.data.edit import Edit

Model = Annotated[str, arg(help="alias, hub id, directory, or random:<architecture>")]
Benchmark = Annotated[str, arg(help="where the edits are from")]
Data = Annotated[str | None, arg(metavar="FILE", help="the benchmark's file; world_facts ships with the project")]
Dtype = Literal["float32", "bfloat16"]
Repeats = Annotated[int, arg(help="times both ways are measured, in turn")]
Gpu = Annotated[bool, arg(help="run on the GPU")]
Threads = Annotated[int | None, arg(help="CPU threads; default: the cores")]
CpuTime = Annotated[bool, arg(help="count this process's CPU time: for a machine shared with other work")]
AsJson = Annotated[bool, arg(name="json", help="print one JSON object, for a program to read")]


@perf.command(name="step")
def step(
    model: Model = "smollm2-135m",
    benchmark: Benchmark = "world_facts",
    data: Data = None,
    dtype: Dtype = "float32",
    batch: Annotated[int, arg(help="edits of a step")] = 16,
    micro_batch: Annotated[int, arg(help="edits of a forward pass")] = 16,
    steps: Annotated[int, arg(help="measured steps of each kind, after one to warm up")] = 7,
    threads: Threads = None,
    cpu_time: CpuTime = False,
    gpu: Gpu = False,
    as_json: AsJson = False,
) -> None:
    """Time plain LoRA, CoRSA and the literal Algorithm 1 on the same batches, in turn.

    Example: corsa perf step --benchmark counterfact --data counterfact.json --batch 16
    """
    from corsa.config import ModelConfig, Placement
    from corsa.perf.step import measure_step

    found = measure_step(
        ModelConfig(name=model, dtype=dtype),
        _edits(benchmark, data, limit=(steps + 2) * batch),
        batch=batch,
        steps=steps,
        placement=Placement(micro_batch=micro_batch, threads=threads, gpu=gpu),
        cpu_time=cpu_time,
        say=_say,
    )
    if as_json:
        _print_json(found)
        return
    table = _table(f"step on {found.model}, {found.dtype}, {found.device}", "seconds", "edits/s")
    for name, seconds in (("LoRA", found.lora_s), ("CoRSA", found.corsa_s), ("literal CoRSA", found.literal_s)):
        table.add_row(name, f"{seconds:.3f}", f"{found.batch / seconds:.2f}")
    shown = Console()
    shown.print(table)
    shown.print(f"CoRSA / LoRA {found.corsa_over_lora:.2f}, literal / CoRSA {found.literal_over_corsa:.2f}")
    ratio = f"{found.tokens_processed} tokens processed, {found.tokens_needed} needed: {found.padding_ratio:.3f}"
    shown.print(f"{ratio}; outside forward and backward {100 * found.overhead_fraction:.1f} %")
    shown.print(
        f"peak memory {found.peak_memory_gib:.2f} GiB; update within {found.max_update_error:.1e} of the literal"
    )
    split = _table("part of the CoRSA step", "seconds", "share")
    for name, seconds in found.breakdown_s.items():
        split.add_row(name.replace("_", " "), f"{seconds:.3f}", f"{100 * seconds / found.corsa_s:.1f} %")
    shown.print(split)


@perf.command(name="evaluate")
def evaluate(
    model: Model = "smollm2-135m",
    benchmark: Benchmark = "world_facts",
    data: Data = None,
    dtype: Dtype = "float32",
    template: Annotated[Literal["qa", "chat"], arg(help="the paper's prompt, or the tokenizer's chat template")] = "qa",
    limit: Annotated[int, arg(help="facts whose probes are asked")] = 32,
    repeats: Repeats = 3,
    threads: Threads = None,
    cpu_time: CpuTime = False,
    gpu: Gpu = False,
    as_json: AsJson = False,
) -> None:
    """Answer probes as a round does, and by transformers.generate in padded batches of 32.

    Example: corsa perf evaluate --benchmark counterfact --data counterfact.json --limit 32
    """
    from corsa.config import ModelConfig, Placement
    from corsa.perf.evaluate import PADDED_BATCH, measure_evaluation

    found = measure_evaluation(
        ModelConfig(name=model, dtype=dtype, template=template),
        _edits(benchmark, data, limit),
        repeats=repeats,
        placement=Placement(threads=threads, gpu=gpu),
        cpu_time=cpu_time,
        say=_say,
    )
    if as_json:
        _print_json(found)
        return
    table = _table(f"{found.probes} probes on {found.model}, {found.dtype}, {found.device}", "probes/s")
    table.add_row("as a round asks them", f"{found.probes_per_s:.1f}")
    table.add_row(f"transformers.generate, padded batches of {PADDED_BATCH}", f"{found.transformers_probes_per_s:.1f}")
    shown = Console()
    shown.print(table)
    shown.print(f"{found.speedup:.2f} times as fast, {found.different_answers} answers differ")
    shown.print(f"with log-probabilities and matching: {found.asked_rows_per_s:.1f} rows/s")


@perf.command(name="mmlu")
def mmlu(
    data: Annotated[str, arg(metavar="FOLDER", help="MMLU's files, test/ and dev/")],
    model: Model = "smollm2-135m",
    dtype: Dtype = "float32",
    limit: Annotated[int | None, arg(help="questions of each subject; default: all")] = None,
    subjects: Annotated[int | None, arg(help="subjects, in alphabetical order; default: all")] = None,
    repeats: Repeats = 1,
    threads: Threads = None,
    cpu_time: CpuTime = False,
    gpu: Gpu = False,
    as_json: AsJson = False,
) -> None:
    """Answer MMLU with the worked examples of a subject computed once, and computed anew for every question.

    Example: corsa perf mmlu --data mmlu --subjects 3
    """
    from corsa.config import ModelConfig, Placement
    from corsa.evaluation.mmlu import MmluQuestions, from_questions_table, read_mmlu
    from corsa.perf.mmlu import measure_mmlu

    found = measure_mmlu(
        ModelConfig(name=model, dtype=dtype),
        MmluQuestions(from_questions_table(read_mmlu(data, limit=limit)).subjects[:subjects]),
        repeats=repeats,
        placement=Placement(threads=threads, gpu=gpu),
        cpu_time=cpu_time,
        say=_say,
    )
    if as_json:
        _print_json(found)
        return
    title = f"{found.questions} questions of {found.subjects} subjects on {found.model}, {found.dtype}, {found.device}"
    table = _table(title, "questions/s")
    table.add_row("worked examples computed once a subject", f"{found.questions_per_s:.2f}")
    table.add_row("anew for every question", f"{found.recomputed_questions_per_s:.2f}")
    shown = Console()
    shown.print(table)
    differ = f"{found.different_answers} answers differ, letters by {found.largest_difference:.1e} nats at most"
    shown.print(f"{found.speedup:.2f} times as fast, {differ}")
    shown.print(f"{found.tokens} tokens processed, anew {found.recomputed_tokens}")


@perf.command(name="data")
def data_stream(
    data: Annotated[str, arg(metavar="FILE", help="a counterfact.json, whose records are repeated with new ids")],
    model: Model = "smollm2-135m",
    edits: Annotated[int, arg(help="records of the file that is made")] = 21919,
    batch: Annotated[int, arg(help="edits of a batch")] = 16,
    cluster: Annotated[
        bool, arg(help="also take the first batch in a worker, on RAY_ADDRESS or a local cluster")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Time the way from a file of edits to batches: reading, tokenizing, packing; and weigh the token table.

    Example: corsa perf data --data counterfact.json --cluster
    """
    from corsa.config import ModelConfig
    from corsa.perf.data import measure_data

    found = measure_data(ModelConfig(name=model), Path(data), edits=edits, batch=batch, cluster=cluster)
    if as_json:
        _print_json(found)
        return
    table = _table(f"{found.edits} edits, {found.model}", "seconds", "edits/s")
    for name, seconds in (("read", found.read_s), ("tokenize", found.tokenize_s), ("pack", found.pack_s)):
        table.add_row(name, f"{seconds:.2f}", f"{found.edits / seconds:.0f}")
    shown = Console()
    shown.print(table)
    shown.print(f"together {found.triplets_per_s:.0f} triplets/s; padding {found.padding_ratio:.3f}")
    shown.print(f"token table {found.table_bytes_per_edit:.0f} bytes an edit and worker")
    tenfold = f"of ten times as many by {found.memory_bytes_per_edit_tenfold:.0f}"
    shown.print(f"a process that takes it grows by {found.memory_bytes_per_edit:.0f} bytes an edit, {tenfold}")
    if found.first_batch_s is not None:
        shown.print(f"first batch in a worker {found.first_batch_s:.1f} s after a cluster that is up was asked for it")


@perf.command(name="overhead")
def overhead(
    command: Annotated[str, arg(help="a scenario's command line, in quotes, without --storage")],
    storage: Annotated[str, arg(metavar="FOLDER", help="an empty folder to run it into")],
    as_json: AsJson = False,
) -> None:
    """Run a scenario twice and itemise what it takes beside training and evaluation.

    Example: corsa perf overhead --command "python pipelines/single_update.py --limit 8" --storage /tmp/overhead
    """
    from corsa.perf.overhead import measure_overhead

    found = measure_overhead(shlex.split(command), Path(storage))
    if as_json:
        _print_json(found)
        return
    table = _table("beside training and evaluation", "seconds")
    for name, seconds in found.items_s.items():
        table.add_row(name, f"{seconds:.1f}")
    shown = Console()
    shown.print(table)
    shown.print(f"{found.overhead_s:.1f} of {found.wall_s:.1f} s for {found.chains} chains")
    shown.print(f"the same command with everything done: {found.again_s:.1f} s")


def _edits(benchmark: str, data: str | None, limit: int | None) -> list[Edit]:
    from corsa.data.benchmarks import read

    return read(benchmark, data, limit=limit).edits


def _say(line: str) -> None:
    Console(stderr=True).print(line, style="dim", highlight=False)


def _print_json(figures: Any) -> None:
    print(json.dumps(asdict(figures)))


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in others:
        table.add_column(name, justify="right")
    return table
