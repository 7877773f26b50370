"""Memory and time of the data path at several sizes, each stage in a process of its own, so that peaks stay apart.

The stages follow a run: a file becomes a table of edits, edits become rounds, batches are drawn from the token table,
answers are written, metrics are counted, and the page is made. Run as `python -m corsa.perf.growth JSON`, this module
measures one stage at one size and prints one line of JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corsa.errors import CorsaError, unknown_name

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Measured:
    """One stage at one size. peak: bytes of its process above those after its imports. written: bytes of its files."""

    stage: str
    edits: int
    cpu_s: float
    wall_s: float
    peak: int
    written: int


def measure_growth(
    sizes: Sequence[int], say: Callable[[str], None], stages: Sequence[str] | None = None
) -> Iterator[Measured]:
    """Runs every stage at every size, in turn.

    Raises:
        CorsaError: a stage is unknown, or failed (with the end of what it said).
    """
    for name in stages or ():
        if name not in STAGES:
            raise unknown_name("stage", name, STAGES)
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            for stage in stages or STAGES:
                say(f"{size:,} edits: {stage}")
                command = [sys.executable, "-m", __name__, json.dumps([stage, size, folder])]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise CorsaError(f"{stage} at {size} edits: {done.stderr.strip()[-400:] or 'ended without a word'}")
                yield Measured(**json.loads(done.stdout.splitlines()[-1]))


def exponents(found: Sequence[Measured]) -> dict[str, float]:
    """For each stage, the exponent with which its peak memory grows from the second largest to the largest size: 1 if
    it is linear, 0 if it does not grow.
    """
    grown = {}
    for stage in dict.fromkeys(one.stage for one in found):
        known = sorted((one for one in found if one.stage == stage), key=lambda one: one.edits)[-2:]
        if len(known) == 2 and min(one.peak for one in known) > 0:
            grown[stage] = log(known[1].peak / known[0].peak) / log(known[1].edits / known[0].edits)
    return grown


def figure(found: Sequence[Measured]) -> go.Figure:
    """Peak memory against edits, both on logarithmic axes, one line a stage."""
    import plotly.graph_objects as go

    drawn = go.Figure(layout={"template": "simple_white", "margin": {"t": 20, "b": 50}})
    for stage in dict.fromkeys(one.stage for one in found):
        own = sorted((one.edits, one.peak / 2**20) for one in found if one.stage == stage)
        drawn.add_scatter(x=[edits for edits, _ in own], y=[peak for _, peak in own], name=stage, mode="lines+markers")
    drawn.update_xaxes(type="log", title="edits", dtick=1, tickformat=",d")
    drawn.update_yaxes(type="log", title="peak memory, MiB", dtick=1, tickformat=",d")
    return drawn


def write_records(edits: int, path: Path, first: int = 0, neighbors: int = 10) -> None:
    """Writes a file of JSON lines with an old answer, two paraphrases and some neighbors an edit. No question occurs
    twice, and none is in a file with other numbers (`first` and up).
    """
    with path.open("w") as file:
        for i in range(first, first + edits):
            who, place, before = f"Person {i}", f"City {i % 997}", f"Town {i % 991}"
            file.write(
                json.dumps(
                    {
                        "prompt": f"Where does {who} live?",
                        "target_new": place,
                        "target_old": before,
                        "subject": who,
                        "paraphrases": [f"In which place is the home of {who}?", f"{who} has a house in which place?"],
                        "neighbors": [
                            {"prompt": f"Where does neighbor {n} of {who} live?", "answer": before}
                            for n in range(neighbors)
                        ],
                    }
                )
                + "\n"
            )


def _edits(size: int, folder: Path) -> Path:
    import pyarrow.parquet as pq

    from corsa.data.benchmarks import read
    from corsa.data.edit import to_table

    pq.write_table(to_table(read("file", str(folder / "edits.jsonl")).edits), folder / "edits.parquet")
    return folder / "edits.parquet"


def _rounds(size: int, folder: Path) -> Path:
    import pyarrow.parquet as pq

    from corsa.config.steps import RoundsConfig
    from corsa.data.schedule import PLACED, assign, placed

    edits = placed(pq.read_table(folder / "edits.parquet", columns=list(PLACED)))
    pq.write_table(assign(edits, RoundsConfig(rounds=1)), folder / "schedule.parquet")
    return folder / "schedule.parquet"


def _tokens(size: int, folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from corsa.config import ModelConfig
    from corsa.models.encoding import Encoder
    from corsa.models.loading import load_tokenizer
    from corsa.training.tokens import REFERENCE, token_rows

    encoder = Encoder(load_tokenizer(ModelConfig(name="random:tiny-llama")), "qa")
    with (
        pq.ParquetFile(folder / "edits.parquet") as file,
        pq.ParquetWriter(folder / "reference.parquet", REFERENCE) as writer,
    ):
        for batch in file.iter_batches(512, columns=["id", "prompt", "target_new", "target_old"]):
            rows = token_rows(encoder, batch.to_pylist())
            rows = [row | {"reference_new": 0.0, "reference_old": 0.0} for row in rows]
            writer.write_table(pa.Table.from_pylist(rows, schema=REFERENCE))
    return folder / "reference.parquet"


def _batches(size: int, folder: Path) -> Path:
    import pyarrow.parquet as pq

    from corsa.algorithm.packing import pack
    from corsa.training.tokens import TokenTable, batch_order

    with pq.ParquetFile(folder / "reference.parquet") as file:
        table = TokenTable(file.iter_batches(4096))
    ids = pq.read_table(folder / "reference.parquet", columns=["id"])["id"].to_pylist()
    for chosen in batch_order(size, 16, seed=0, round_=1, epoch=0):
        pack([table.triplet(ids[i]) for i in chosen])
    return folder / "reference.parquet"


def _checkpoints(size: int, folder: Path) -> Path:
    """Takes the checkpoints of 10 epochs with a small phi: what grows is the curves."""
    import torch

    from corsa.flow.store import Store
    from corsa.training.adamw import PlainAdamW
    from corsa.training.checkpoint import Position, save_checkpoint
    from corsa.training.worker_group import WorkerGroup

    phi = torch.nn.Parameter(torch.zeros(1, 64))
    optimizer, position, group = PlainAdamW(phi), Position(), WorkerGroup(0, 1, torch.device("cpu"))
    store = Store(folder / "store")
    for step in range(1, 10 * -(-size // 16) + 1):
        position.add({"step": step, "skipped": 0} | {f"value{n}": step / 7 for n in range(14)})
        if step % 20 == 0:
            save_checkpoint(store, "partial/x/checkpoint", phi, optimizer, position, group)
    return folder / "store"


def _answers(size: int, folder: Path) -> Path:
    """Writes the rows of a base and an edited model as a round does, from rows of Python objects, a piece at a time."""
    import pyarrow.parquet as pq

    from corsa.data.edit import EditTable
    from corsa.evaluation.predict import PREDICTIONS
    from corsa.training.prediction_tasks import rows_table, write_sorted
    from corsa.training.task_inputs import PART

    edits = EditTable(pq.read_table(folder / "edits.parquet"))
    for method, trained in (("base", 0), ("corsa", 1)):
        with pq.ParquetWriter(folder / f"{method}.parquet", PREDICTIONS) as writer:
            for start in range(0, len(edits), PART):
                rows = [row for edit in edits[start : start + PART] for row in answers_of(edit, trained)]
                write_sorted(writer, [rows_table(rows, seed=0, trained=trained)])
    return folder / "corsa.parquet"


def answers_of(edit: Any, trained: int) -> Iterator[dict[str, Any]]:
    """Rows of the predictions table for an edit; about two thirds of the answers of a trained model are right."""
    for p, probe in enumerate(edit.probes):
        for w, prompt in enumerate(probe.prompts):
            new = trained > 0 and (len(prompt) + p) % 3 > 0
            scored = probe.kind != "neighbor" and w == 0
            yield {
                "edit": edit.id,
                "chain": edit.chain,
                "learnt": 1,
                "part": "update",
                "kind": probe.kind,
                "probe": p,
                "wording": w,
                "draw": 0,
                "prompt": prompt,
                "answer": probe.answer,
                "target_old": edit.target_old,
                "output": probe.answer if new else f"{edit.subject} has no house",
                **dict.fromkeys(("logp_new", "logp_old"), -1.0 - p if scored else None),
                **dict.fromkeys(("words_new", "matched_new", "exact_new"), new),
                **dict.fromkeys(("words_old", "matched_old", "exact_old"), False),
            }


def _metrics(size: int, folder: Path) -> Path:
    import pyarrow.parquet as pq

    from corsa.config.steps import Shown
    from corsa.evaluation.metrics import compute
    from corsa.experiments.reported import reported, write_reported

    answers = [(folder / f"{method}.parquet", Shown(answers=method, method=method)) for method in ("base", "corsa")]
    table = reported(answers, pq.read_table(folder / "schedule.parquet"), None)
    write_reported(table, folder / "predictions.parquet")
    found = compute(table.to_pandas())
    (folder / "metrics.json").write_text(json.dumps(found))
    return folder / "predictions.parquet"


def _page(size: int, folder: Path) -> Path:
    import pandas as pd

    from corsa.experiments.reported import read_reported
    from corsa.report.page import write_report

    predictions = read_reported(folder / "predictions.parquet").to_pandas()
    metrics = json.loads((folder / "metrics.json").read_text())
    return write_report(folder, metrics=metrics, predictions=predictions, curves=pd.DataFrame(), run={})


_RUNS: dict[str, Callable[[int, Path], Path]] = {
    "edits": _edits,
    "rounds": _rounds,
    "tokens": _tokens,
    "batches": _batches,
    "checkpoints": _checkpoints,
    "answers": _answers,
    "metrics": _metrics,
    "page": _page,
}
STAGES = tuple(_RUNS)
"""In the order of a run: each reads the files of those before it."""


def stage(name: str, size: int, folder: Path) -> Measured:
    """One stage, in this process."""
    if name == "edits":
        write_records(size, folder / "edits.jsonl")
    with tempfile.TemporaryDirectory() as small:  # what is imported and loaded is not counted
        _prepared(name, Path(small))
    _forget_peak()
    before, began, cpu = _resident("VmRSS"), time.monotonic(), time.process_time()
    made = _RUNS[name](size, folder)
    times = time.process_time() - cpu, time.monotonic() - began
    files = [made] if made.is_file() else [file for file in made.rglob("*") if file.is_file()]
    written = sum(file.stat().st_size for file in files)
    return Measured(name, size, *times, peak=_resident("VmHWM") - before, written=written)


def _prepared(name: str, folder: Path) -> None:
    """Runs the stages up to this one at a small size."""
    write_records(64, folder / "edits.jsonl")
    for each in STAGES[: STAGES.index(name) + 1]:
        _RUNS[each](64, folder)


def _forget_peak() -> None:
    """Make the kernel measure the peak from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def _resident(what: str) -> int:
    """Bytes of this process by /proc: now (VmRSS), or the peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next((int(line.split()[1]) * 1024 for line in lines if line.startswith(what)), None)
    return found if found is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(asdict(stage(given[0], given[1], Path(given[2])))))
