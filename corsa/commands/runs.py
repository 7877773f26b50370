"""`corsa runs` and `corsa report`: what has been run, and what came out of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional, arg

from corsa.commands import Storage, app
from corsa.errors import CorsaError, unknown_name

if TYPE_CHECKING:
    from corsa.flow.store import Artifact, Record, Store


@dataclass(frozen=True)
class Run:
    """A finished run: a record of kind "report", and what its run.json says."""

    record: Record
    artifact: Artifact
    about: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.about.get("title") or self.record.name)

    @property
    def seconds(self) -> float:
        """What the whole run took, or, where that is not known, all its steps together."""
        steps = sum(step.get("seconds") or 0.0 for step in self.about.get("steps", []))
        return float(self.about.get("seconds") or steps or self.record.seconds)

    @property
    def id(self) -> str:
        return self.record.fingerprint[:12]


@app.command(name="runs")
def list_runs(
    storage: Storage = "runs",
    steps: Annotated[bool, arg(help="list every finished step as well")] = False,
    as_json: Annotated[bool, arg(name="json", help="print JSON, runs and steps, for a program to read")] = False,
) -> None:
    """List the finished runs of a store.

    Example: corsa runs --storage runs --steps
    """
    store = open_store(storage)
    records = store.records()
    runs = [as_run(store, record) for record in records if record.kind == "report"]
    if as_json:
        listed = {"runs": [_run_row(run) for run in runs], "steps": [_step_row(record) for record in records]}
        print(json.dumps(listed, indent=1))
        return
    console = Console()
    if not runs:
        console.print(f"no finished run in {store.url}, {len(records)} finished step{'s' * (len(records) != 1)}")
    else:
        console.print(
            _listing(["run", "id", "finished (UTC)", "time"], [list(_run_row(run).values())[:4] for run in runs])
        )
    if steps and records:
        console.print(
            _listing(
                ["step", "kind", "id", "finished (UTC)", "time"], [list(_step_row(r).values())[:5] for r in records]
            )
        )


@app.command(name="report")
def show_report(
    run: Annotated[
        Positional[str], arg(metavar="[RUN]", help="name of a run or the start of its id; the newest if left out")
    ] = "",
    storage: Storage = "runs",
    output: Annotated[Path | None, arg(metavar="DIR", help="write the page anew into this directory")] = None,
    as_json: Annotated[bool, arg(name="json", help="print the metrics as JSON instead of the table")] = False,
) -> None:
    """Show the result of a run again: its table, and where its page is.

    Example: corsa report 3f2a9c --output /tmp/page
    """
    from corsa.report.tables import summary_tables

    found = chosen_run(open_store(storage), run)
    metrics = json.loads(found.artifact.read("metrics.json"))
    page = found.artifact.local("report.html") if output is None else _rewritten(found, metrics, output)
    if as_json:
        print(json.dumps(metrics, indent=1))
        return
    console = Console()
    console.print(f"[bold]{escape(found.name)}[/bold]  {found.id}", highlight=False)
    for table in summary_tables(metrics):
        console.print(table)
    print(page)  # last, plain and unwrapped, for a person to open or a program to read


def open_store(storage: str) -> Store:
    """The store, which must exist: these commands only read."""
    from corsa.flow.store import Store

    store = Store(storage)
    if "://" not in storage and not Path(storage).expanduser().is_dir():
        raise CorsaError(
            f"there is no store at {store.url}: run a pipeline first, or say where its results are with --storage"
        )
    return store


def as_run(store: Store, record: Record) -> Run:
    artifact = store.artifact(record.fingerprint)
    about = json.loads(artifact.read("run.json")) if "run.json" in record.files else {}
    return Run(record, artifact, about)


def chosen_run(store: Store, wanted: str) -> Run:
    """The run of that name (the newest of several) or id; raises `CorsaError` if there is none, or the id fits
    several.
    """
    runs = [as_run(store, record) for record in store.records() if record.kind == "report"]
    if not runs:
        raise CorsaError(
            f"there is no finished run in {store.url}: run a pipeline to its end, or name another --storage"
        )
    if named := [run for run in runs if not wanted or wanted in (run.name, run.record.name)]:
        return named[-1]
    fitting = [run for run in runs if run.record.fingerprint.startswith(wanted)]
    if len(fitting) > 1:
        raise CorsaError(
            f"{wanted!r} is the start of several ids: {', '.join(run.id for run in fitting)}. Give more of it"
        )
    if not fitting:
        raise unknown_name("run", wanted, [name for run in runs for name in (run.name, run.id)])
    return fitting[0]


def _rewritten(run: Run, metrics: dict[str, Any], directory: Path) -> Path:
    import pandas as pd

    from corsa.report.page import write_report

    try:
        if "predictions.parquet" not in run.record.files:  # several scenarios joined: each has a run of its own
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "report.html").write_bytes(run.artifact.read("report.html"))
            return directory / "report.html"
        tables = {
            name: pd.read_parquet(BytesIO(run.artifact.read(f"{name}.parquet"))) for name in ("predictions", "curves")
        }
        return write_report(directory, metrics=metrics, run=run.about, **tables)
    except OSError as error:
        raise CorsaError(f"cannot write to {directory}: {error.strerror}. Choose another --output") from error


def _run_row(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "id": run.id,
        "finished": run.record.created,
        "seconds": run.seconds,
        "url": run.artifact.url,
    }


def _step_row(record: Record) -> dict[str, Any]:
    return {
        "name": record.name,
        "kind": record.kind,
        "id": record.fingerprint[:12],
        "finished": record.created,
        "seconds": record.seconds,
        "metrics": record.metrics,
    }


def _listing(columns: list[str], rows: list[list[Any]]) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        *words, finished, seconds = row
        table.add_row(*(escape(str(word)) for word in words), finished[:16].replace("T", " "), f"{seconds:.0f} s")
    return table
