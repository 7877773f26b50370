"""Time, memory and disk of one update on a long line: `corsa edit` asks every earlier fact again.

The earlier updates are synthetic: their adapter is LoRA's initial one, which changes nothing, and their answers are
made up (about two thirds are right, and stay the same). The measured update is a real `corsa edit`, with its own local
Ray cluster. So the figures show what it costs, not what a model forgets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from corsa.errors import CorsaError
from corsa.flow.store import Store
from corsa.perf.growth import answers_of, write_records

_NEIGHBORS = 2
_EVERY = 0.5  # seconds between looks at the processes


@dataclass(frozen=True)
class LineFigures:
    """An update of `facts` facts on a line of `months` updates with `facts` facts each.

    Attributes:
        earlier: facts taught before.
        asked: answers that the update wrote, of the base model and of the edited one.
        wall_s: seconds of the command; steps_s: of its steps, by name.
        driver_peak: bytes of resident memory of the command's process; workers_peak: of the largest process of each
            name that its cluster runs. A process that lives for less than half a second may be missed.
        before: bytes of the line's directory before the update; written: of the new one; stored: of the steps.
        headline: the report's sentence.
    """

    months: int
    facts: int
    earlier: int
    asked: int
    wall_s: float
    steps_s: dict[str, float]
    driver_peak: int
    workers_peak: dict[str, int]
    before: int
    written: int
    stored: int
    headline: str


def measure_line(
    model: str, folder: Path, months: int, facts: int, options: Sequence[str], say: Callable[[str], None]
) -> LineFigures:
    """Makes a line in `folder`, and teaches it one update more.

    Args:
        model: alias or `random:<architecture>`.
        folder: empty or new; it keeps the line, the new adapter and the store.
        months: updates of the line.
        facts: of each update, and of the measured one.
        options: further options of `corsa edit`.
        say: is told what begins.

    Raises:
        CorsaError: the folder is not empty, or the command fails (with the end of what it said).
    """
    if folder.exists() and any(folder.iterdir()):
        raise CorsaError(f"{folder} is not empty: what is done there would not be measured; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    say(f"making a line of {months} updates of {facts} facts")
    line = folder / "line"
    make_line(model, line, months, facts)
    more = folder / "facts.jsonl"
    write_records(facts, more, first=months * facts, neighbors=_NEIGHBORS)
    say(f"update {months + 1}")
    words = ["edit", "--edits", str(more), "--adapter", str(line), "--out", str(folder / "out"), "--quiet", "--json"]
    command = [sys.executable, "-m", "corsa.cli.main", *words, "--storage", str(folder / "store"), *options]
    began = time.perf_counter()
    said, driver, workers = _watched(command)
    wall = time.perf_counter() - began
    records = Store(folder / "store").records()
    return LineFigures(
        months=months,
        facts=facts,
        earlier=months * facts,
        asked=sum(record.metrics.get("probes", 0) for record in records if record.kind == "round"),
        wall_s=wall,
        steps_s={record.name: record.seconds for record in records},
        driver_peak=driver,
        workers_peak=workers,
        before=_bytes(line),
        written=_bytes(folder / "out"),
        stored=_bytes(folder / "store"),
        headline=json.loads(said)["headline"],
    )


def make_line(model: str, directory: Path, months: int, facts: int) -> None:
    """Writes the directory of a line of `months` updates, as `corsa edit` leaves it, without training."""
    import pyarrow.parquet as pq

    from corsa.config import LoraConfig, ModelConfig
    from corsa.data.benchmarks.file import drafts_of
    from corsa.data.edit import Edit, to_table
    from corsa.editing.history import FILE, WEIGHTS, History, Update, file_digest, join
    from corsa.lora.flat import Lora
    from corsa.lora.peft_format import save_adapter
    from corsa.models.loading import load_model

    config, lora = ModelConfig(name=model), LoraConfig()
    save_adapter(Lora(load_model(config), lora), directory, model)
    edits: list[Edit] = []
    with tempfile.TemporaryDirectory() as folder:
        for month in range(1, months + 1):
            file = Path(folder) / f"month{month}.jsonl"
            write_records(facts, file, first=(month - 1) * facts, neighbors=_NEIGHBORS)
            edits += join(edits, drafts_of(file), month, {})
    pq.write_table(to_table(edits), directory / "edits.parquet")
    _write_answers(edits, months, directory / "predictions.parquet")
    update = {"kind": "edit", "facts": facts, "method": "lora", "created": "", "fingerprint": "synthetic"}
    update |= {"sha256": file_digest(directory / WEIGHTS), "directory": str(directory)}
    updates = tuple(Update.model_validate({**update, "number": month}) for month in range(1, months + 1))
    (directory / FILE).write_text(History(model=config, lora=lora, updates=updates).model_dump_json(indent=1))


def _write_answers(edits: Sequence[Any], months: int, path: Path) -> None:
    """Answers of the base model and, after each month, to every fact taught so far."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from corsa.evaluation.predict import PREDICTIONS, with_values

    def table(trained: int) -> pa.Table:
        rows = [row | {"learnt": edit.round} for edit in edits for row in answers_of(edit, trained)]
        return pa.Table.from_pylist(rows, schema=PREDICTIONS)

    taught = table(1)
    with pq.ParquetWriter(path, PREDICTIONS) as writer:
        writer.write_table(with_values(table(0), method="base", seed=0, trained=0))
        for month in range(1, months + 1):
            rows = taught.filter(pc.field("learnt") <= month)
            writer.write_table(with_values(rows, method="lora", seed=0, trained=month))


def _watched(command: Sequence[str]) -> tuple[str, int, dict[str, int]]:
    """Runs a command with a cluster of its own: what it printed, and the peaks of its process and others."""
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver, workers = 0, {}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        running = subprocess.Popen(command, env=own, stdout=out, stderr=errors, text=True)
        try:
            while running.poll() is None:
                for process in _family(running.pid):
                    with suppress(psutil.Error, OSError, ValueError):  # it has just ended
                        peak = _peak(process.pid)
                        if process.pid == running.pid:
                            driver = max(driver, peak)
                        else:
                            name = _named(process)
                            workers[name] = max(workers.get(name, 0), peak)
                time.sleep(_EVERY)
        finally:
            running.terminate()
            running.wait()
        out.seek(0)
        errors.seek(0)
        if running.returncode:
            raise CorsaError(f"{' '.join(command[2:])} failed:\n{errors.read()[-2000:]}")
        return out.read(), driver, dict(sorted(workers.items(), key=lambda one: -one[1]))


def _family(pid: int) -> Iterator[psutil.Process]:
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        yield process
        yield from process.children(recursive=True)


def _peak(pid: int) -> int:
    """Peak resident memory of a process so far, bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)  # none once it ended


def _named(process: psutil.Process) -> str:
    """What a process is: the title of a Ray worker, else its program."""
    words = process.cmdline()
    return words[0].split()[0] if words and words[0].startswith("ray::") else process.name()


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
