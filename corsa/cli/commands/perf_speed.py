"""`corsa perf step`, `evaluate`, `mmlu`, `data`, `growth`, `line` and `overhead`: what the parts of a run cost."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich import box
from rich.table import Table
from tyro.conf import arg

from corsa.cli.commands.perf import perf
from corsa.config.command_line import listed
from corsa.terminal import Console

if TYPE_CHECKING:
    from corsa.data.edit import Edit

Model = Annotated[str, arg(help="alias, hub id, directory, or random:<architecture>")]
Benchmark = Annotated[str, arg(help="benchmark that the edits are taken from")]
Data = Annotated[str | None, arg(metavar="FILE", help="the benchmark's file; world_facts ships with the project")]
Dtype = Literal["float32", "bfloat16"]
Repeats = Annotated[int, arg(help="how often both ways are measured, in turn")]
Gpu = Annotated[bool, arg(help="run on the GPU")]
Threads = Annotated[int | None, arg(help="CPU threads; default: all cores")]
CpuTime = Annotated[bool, arg(help="measure CPU time instead of wall time, for a machine shared with other work")]
AsJson = Annotated[bool, arg(name="json", help="print one JSON object, for a program to read")]


@perf.command(name="step")
def step(
    model: Model = "smollm2-135m",
    benchmark: Benchmark = "world_facts",
    data: Data = None,
    dtype: Dtype = "float32",
    batch: Annotated[int, arg(help="edits of a step")] = 16,
    micro_batch: Annotated[int, arg(help="edits of a forward pass")] = 16,
    steps: Annotated[int, arg(help="measured steps of each kind, after one warm-up step")] = 7,
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
    kinds = {"LoRA": found.lora_s, "CoRSA": found.corsa_s, "literal CoRSA": found.literal_s}
    _show(
        found,
        as_json,
        _table(
            (f"step on {found.model}, {found.dtype}, {found.device}", "seconds", "edits/s"),
            {name: (f"{seconds:.3f}", f"{found.batch / seconds:.2f}") for name, seconds in kinds.items()},
        ),
        f"CoRSA / LoRA {found.corsa_over_lora:.2f}, literal / CoRSA {found.literal_over_corsa:.2f}",
        f"{found.tokens_processed} tokens processed, {found.tokens_needed} needed: {found.padding_ratio:.3f}; "
        f"outside forward and backward {100 * found.overhead_fraction:.1f} %",
        f"peak memory {found.peak_memory_gib:.2f} GiB; update within {found.max_update_error:.1e} of the literal",
        *([found.rounding.told] if found.rounding else []),
        _table(
            ("part of the CoRSA step", "seconds", "share"),
            {
                name.replace("_", " "): (f"{seconds:.3f}", f"{100 * seconds / found.corsa_s:.1f} %")
                for name, seconds in found.breakdown_s.items()
            },
        ),
    )


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
    _show(
        found,
        as_json,
        _table(
            (f"{found.probes} probes on {found.model}, {found.dtype}, {found.device}", "probes/s"),
            {
                "as a round asks them": (f"{found.probes_per_s:.1f}",),
                f"transformers.generate, padded batches of {PADDED_BATCH}": (f"{found.transformers_probes_per_s:.1f}",),
            },
        ),
        f"{found.speedup:.2f} times as fast, {found.different_answers} answers differ",
        f"with log-probabilities and matching: {found.asked_rows_per_s:.1f} rows/s",
    )


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
    """Answer MMLU with the worked examples of a subject computed once, and computed again for every question.

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
    where = f"{found.model}, {found.dtype}, {found.device}"
    _show(
        found,
        as_json,
        _table(
            (f"{found.questions} questions of {found.subjects} subjects on {where}", "questions/s"),
            {
                "worked examples computed once a subject": (f"{found.questions_per_s:.2f}",),
                "worked examples computed for every question": (f"{found.recomputed_questions_per_s:.2f}",),
            },
        ),
        f"{found.speedup:.2f} times as fast, {found.different_answers} answers differ, "
        f"log-probabilities of letters by {found.largest_difference:.1e} nats at most",
        f"{found.tokens} tokens processed, {found.recomputed_tokens} if computed for every question",
    )


@perf.command(name="data")
def data_stream(
    data: Annotated[str, arg(metavar="FILE", help="a counterfact.json, whose records are repeated with new ids")],
    model: Model = "smollm2-135m",
    edits: Annotated[int, arg(help="records of the generated file")] = 21919,
    batch: Annotated[int, arg(help="edits of a batch")] = 16,
    cluster: Annotated[
        bool, arg(help="also time the first batch in a worker, on RAY_ADDRESS or a local cluster")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Time the data path from a file of edits to batches (reading, tokenizing, packing) and measure the token table.

    Example: corsa perf data --data counterfact.json --cluster
    """
    from corsa.config import ModelConfig
    from corsa.perf.data import measure_data

    found = measure_data(ModelConfig(name=model), Path(data), edits=edits, batch=batch, cluster=cluster)
    parts = {"read": found.read_s, "tokenize": found.tokenize_s, "pack": found.pack_s}
    lines = [
        f"together {found.triplets_per_s:.0f} triplets/s; padding {found.padding_ratio:.3f}",
        f"token table {found.table_bytes_per_edit:.0f} bytes for each edit on each worker",
        f"a process that reads it grows by {found.memory_bytes_per_edit:.0f} bytes for each edit; "
        f"with ten times as many edits, by {found.memory_bytes_per_edit_tenfold:.0f}",
    ]
    if found.first_batch_s is not None:
        lines.append(f"first batch in a worker {found.first_batch_s:.1f} s after the request, on a running cluster")
    _show(
        found,
        as_json,
        _table(
            (f"{found.edits} edits, {found.model}", "seconds", "edits/s"),
            {name: (f"{seconds:.2f}", f"{found.edits / seconds:.0f}") for name, seconds in parts.items()},
        ),
        *lines,
    )


@perf.command(name="growth")
def growth(
    sizes: Annotated[tuple[int, ...], listed(int, "N,N"), arg(help="numbers of edits")] = (5000, 50_000, 500_000),
    stages: Annotated[
        tuple[str, ...], listed(str, "S,S"), arg(help="stages; each needs the files of those before it")
    ] = (),
    figure: Annotated[Path | None, arg(metavar="FILE.html", help="draw the peak memory")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure memory and time of the data path at several sizes, each stage in a process of its own: edits, rounds,
    tokens, batches, checkpoints, answers, metrics, page.

    Example: corsa perf growth --sizes 5000,50000 --figure growth.html
    """
    from corsa.perf.growth import STAGES, exponents, measure_growth
    from corsa.perf.growth import figure as drawn

    found = []
    for one in measure_growth(sizes, _say, stages or None):
        found.append(one)
        _say(f"  peak {one.peak / 2**20:.0f} MiB, {one.cpu_s:.1f} s of CPU, {one.written / 2**20:.1f} MiB written")
    grown = exponents(found)
    if figure is not None:
        drawn(found).write_html(figure)
    if as_json:
        print(json.dumps({"measured": [asdict(one) for one in found], "exponents": grown}))
        return
    by_stage = sorted(found, key=lambda one: STAGES.index(one.stage))  # sizes stay in their order
    rows = {
        f"{one.stage}, {one.edits:,}": (
            f"{one.peak / 2**20:.0f}",
            f"{one.peak / one.edits / 1024:.1f}",
            f"{one.cpu_s:.1f}",
            f"{one.written / 2**20:.1f}",
        )
        for one in by_stage
    }
    console = Console()
    console.print(_table(("stage, edits", "peak MiB", "KiB an edit", "CPU s", "written MiB"), rows))
    console.print("exponent of the peak: " + ", ".join(f"{name} {value:.2f}" for name, value in grown.items()))


@perf.command(name="line")
def line(
    storage: Annotated[str, arg(metavar="FOLDER", help="an empty folder, which keeps the line and the update")],
    model: Model = "random:tiny-llama",
    months: Annotated[int, arg(help="updates of the line")] = 36,
    facts: Annotated[int, arg(help="facts of each update, and of the measured one")] = 50,
    options: Annotated[str, arg(help="further options of `corsa edit`, in quotes")] = "",
    as_json: AsJson = False,
) -> None:
    """Make a line of many updates without training, teach it one update more by `corsa edit`, and measure time, memory
    and disk of that. The answers of the earlier updates are made up.

    Example: corsa perf line --storage /tmp/line --options="--recheck 300"
    """
    from corsa.perf.line import measure_line

    found = measure_line(model, Path(storage), months, facts, shlex.split(options), _say)
    peaks = {"the command": found.driver_peak, **found.workers_peak}
    steps = sorted(found.steps_s.items(), key=lambda one: -one[1])
    _show(
        found,
        as_json,
        f"update {months + 1}: {facts} facts after {found.earlier:,}, {found.asked:,} answers, {found.wall_s:.1f} s",
        _table(("step", "seconds"), {name: (f"{seconds:.1f}",) for name, seconds in steps}),
        _table(("process", "peak MiB"), {name: (f"{peak / 2**20:.0f}",) for name, peak in peaks.items()}),
        f"disk, MiB: the line {found.before / 2**20:.1f} before, {found.written / 2**20:.1f} after; its steps in the "
        f"store {found.stored / 2**20:.1f}",
        found.headline,
    )


@perf.command(name="overhead")
def overhead(
    command: Annotated[str, arg(help="a scenario's command line, in quotes, without --storage")],
    storage: Annotated[str, arg(metavar="FOLDER", help="an empty folder to run it into")],
    as_json: AsJson = False,
) -> None:
    """Run a scenario twice and itemise the time outside training and evaluation.

    Example: corsa perf overhead --command "python pipelines/single_update.py --limit 8" --storage /tmp/overhead
    """
    from corsa.perf.overhead import measure_overhead

    found = measure_overhead(shlex.split(command), Path(storage))
    _show(
        found,
        as_json,
        _table(
            ("outside training and evaluation", "seconds"),
            {name: (f"{seconds:.1f}",) for name, seconds in found.items_s.items()},
        ),
        f"{found.overhead_s:.1f} of {found.wall_s:.1f} s for {found.chains} chains",
        f"the same command with everything done: {found.again_s:.1f} s",
    )


def _edits(benchmark: str, data: str | None, limit: int | None) -> list[Edit]:
    from corsa.data.benchmarks import read

    return read(benchmark, data, limit=limit).edits


def _say(line: str) -> None:
    Console(stderr=True).print(line, style="dim", highlight=False)


def _show(figures: Any, as_json: bool, *parts: Table | str) -> None:
    """Print the figures (a dataclass) as one JSON object, or the tables and lines made of them."""
    if as_json:
        print(json.dumps(asdict(figures)))
        return
    shown = Console()
    for part in parts:
        shown.print(part)


def _table(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    """A table: `head` names the columns, `rows` maps the first column to the others."""
    first, *others = head
    table = Table(first, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in others:
        table.add_column(name, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table
