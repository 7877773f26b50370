"""`corsa runs` and `corsa report`: the runs of a store, their results, and what can be removed."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from rich import box
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional, arg

from corsa.cli.commands import Storage, app
from corsa.errors import CorsaError, unknown_name
from corsa.terminal import Console, visible

if TYPE_CHECKING:
    from corsa.flow.garbage_collection import Waste
    from corsa.flow.store import Artifact, Record, Store
    from corsa.report.page import Scenario


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
        """The time of the whole run, or the sum of its steps if that is unknown."""
        steps = sum(step.get("seconds") or 0.0 for step in self.about.get("steps", []))
        return float(self.about.get("seconds") or steps or self.record.seconds)

    @property
    def id(self) -> str:
        return self.record.fingerprint[:12]


@app.command(name="runs")
def runs(
    action: Annotated[
        Positional[Literal["list", "show", "compare", "clean"]], arg(help="list by default", metavar="[ACTION]")
    ] = "list",
    names: Annotated[
        Positional[tuple[str, ...]],
        arg(
            metavar="[RUN ...]",
            help="names of runs or starts of ids: one for show, two for compare; for clean, the runs to remove",
        ),
    ] = (),
    storage: Storage = "runs",
    steps: Annotated[bool, arg(help="also list every finished step")] = False,
    yes: Annotated[bool, arg(help="clean: remove the files that the preview lists")] = False,
    keep_days: Annotated[
        float, arg(metavar="N", help="clean: days for which the finished steps of an interrupted run are kept")
    ] = 14.0,
    as_json: Annotated[bool, arg(name="json", help="print JSON for a program to read")] = False,
) -> int:
    """List the finished runs of a store, show one, compare two, or remove what no run needs, after a preview.

    Example: corsa runs --storage runs --steps

    Example: corsa runs show 3f2a9c

    Example: corsa runs compare 3f2a9c 81bd02

    Example: corsa runs clean 3f2a9c --yes
    """
    store = open_store(storage)
    if action == "list":
        if names:
            raise CorsaError(f"list takes no run: did you mean `corsa runs show {names[0]}`?")
        return _list(store, steps, as_json)
    if action == "clean":
        return _clean(store, [chosen_run(store, name) for name in names], yes, keep_days, as_json)
    if len(names) != (1 if action == "show" else 2):
        raise CorsaError(f"{action} takes {'one run' if action == 'show' else 'two runs'}: names or starts of ids")
    chosen = [chosen_run(store, name) for name in names]
    return _show(chosen[0], as_json) if action == "show" else _compare(chosen, as_json)


def _list(store: Store, steps: bool, as_json: bool) -> int:
    records, damaged = store.records_and_damage()
    runs = [as_run(store, record) for record in records if record.kind == "report"]
    for path in damaged:
        print(visible(f"note: {path} cannot be read, its step is left out"), file=sys.stderr)
    if as_json:
        listed = {"runs": [_run_row(run) for run in runs], "steps": [_step_row(record) for record in records]}
        print(json.dumps(listed, indent=1))
        return 0
    console = Console()
    if not runs:
        count = f"{len(records)} finished step{'s' * (len(records) != 1)}"
        console.print(f"no finished run in {store.url}, {count}", markup=False)
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
    return 0


def _show(run: Run, as_json: bool) -> int:
    about = {**_run_row(run), **{key: run.about.get(key) for key in ("command", "config", "versions", "hardware")}}
    if as_json:
        print(json.dumps(about | {"steps": run.about.get("steps", [])}, indent=1))
        return 0
    print(visible(yaml.safe_dump(about, sort_keys=False, allow_unicode=True, width=110).rstrip()))
    steps = [[step["name"], f"{step.get('seconds') or 0:.1f} s"] for step in run.about.get("steps", [])]
    if steps:
        table = Table("step", "time", box=box.SIMPLE_HEAD, pad_edge=False)
        for row in steps:
            table.add_row(*map(escape, row))
        Console().print(table)
    return 0


def _compare(runs: list[Run], as_json: bool) -> int:
    """Settings that differ, and every method's metrics side by side."""
    from corsa.report.comparing import compared, metric_table

    found = compared(*((run.about.get("config") or {}, json.loads(run.artifact.read("metrics.json"))) for run in runs))
    if as_json:
        print(json.dumps({"runs": [_run_row(run) for run in runs], **found}, indent=1))
        return 0
    console = Console()
    table = Table("setting", *(escape(f"{run.name} {run.id}") for run in runs), box=box.SIMPLE_HEAD, pad_edge=False)
    for row in found["settings"]:
        table.add_row(*(escape(str(row[key])) for key in ("name", "first", "second")))
    console.print(table if found["settings"] else "the same settings")
    console.print(metric_table(found["metrics"], [run.id for run in runs]))
    return 0


def _clean(store: Store, doomed: list[Run], yes: bool, keep_days: float, as_json: bool) -> int:
    from corsa.flow.garbage_collection import remove, waste

    gone = {run.record.fingerprint for run in doomed}
    kept = [record.fingerprint for record in store.records() if record.kind == "report"]
    if not 0 <= keep_days <= 36500:
        raise CorsaError(f"--keep-days {keep_days:g}: give 0 to 36500 days")
    found, spared = waste(store, [fingerprint for fingerprint in kept if fingerprint not in gone], keep_days)
    if yes:
        remove(store, found)
    total = sum(one.size for one in found)
    if as_json:
        shown = {"folders": [one._asdict() for one in found], "kept": [one._asdict() for one in spared]}
        print(json.dumps({"removed": yes, "bytes": total, **shown}, indent=1))
        return 0
    console = Console()

    def listed(folders: list[Waste]) -> None:
        for one in folders:
            line = f"{one.size / 2**20:9.1f} MiB  {one.path}  {one.why}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    listed(found)
    done = "removed" if yes else "would be removed; --yes removes them"
    console.print(f"{len(found)} folders, {total / 2**20:.1f} MiB in all, {done}" if found else "nothing to clean up")
    if spared:
        console.print("kept (--keep-days 0 also removes what an interrupted run would continue from):")
        listed(spared)
    return 0


@app.command(name="report")
def show_report(
    runs: Annotated[
        Positional[tuple[str, ...]],
        arg(
            metavar="[RUN ...]",
            help="name of a run or the start of its id; default: the newest run. Several runs are pooled into one page",
        ),
    ] = (),
    storage: Storage = "runs",
    output: Annotated[Path | None, arg(metavar="DIR", help="write the page again into this directory")] = None,
    publish: Annotated[
        Path | None, arg(metavar="FILE", help="write the run's metrics and how it was made, without answers")
    ] = None,
    tables: Annotated[
        Path | None, arg(metavar="FILE.md", help="rewrite a document's tables from the records of published runs")
    ] = None,
    records: Annotated[
        Path | None, arg(metavar="DIR", help="where these records are; default: FILE.md's path without .md")
    ] = None,
    as_json: Annotated[bool, arg(name="json", help="print the metrics as JSON instead of the table")] = False,
) -> None:
    """Show the result of a run again: its table, and the path of its page.

    Example: corsa report 3f2a9c --output /tmp/page

    Example: corsa report 3f2a9c 81bd02 --output /tmp/both

    Example: corsa report 3f2a9c --publish docs/results/single.json

    Example: corsa report --tables docs/results.md
    """
    from corsa.report import publishing
    from corsa.report.tables import summary_tables

    if tables is not None:
        publishing.fill(tables, records)
        return
    if records is not None:
        raise CorsaError("--records is the directory of the records for --tables FILE.md")
    store = open_store(storage)
    if len(runs) > 1:
        if publish is not None or output is None:
            raise CorsaError("several runs are pooled into one page: give --output DIR for it, without --publish")
        _pool({run.id: run for run in (chosen_run(store, name) for name in runs)}, output, as_json)
        return
    found = chosen_run(store, runs[0] if runs else "")
    metrics = json.loads(found.artifact.read("metrics.json"))
    if publish is not None:
        publishing.publish(found.about, metrics, publish)
    page = found.artifact.local("report.html") if output is None else _rewritten(found, metrics, output)
    if as_json:
        print(json.dumps(metrics, indent=1))
        return
    console = Console()
    console.print(f"[bold]{escape(found.name)}[/bold]  {found.id}", highlight=False)
    for table in summary_tables(metrics):
        console.print(table)
    print(visible(str(page)))  # last, plain and unwrapped, for a person to open or a program to read


def _pool(runs: Mapping[str, Run], output: Path, as_json: bool) -> None:
    """One page and one table of several runs."""
    from corsa.report.page import write_report
    from corsa.report.pooling import pooled
    from corsa.report.tables import summary_tables

    if len(runs) < 2:
        raise CorsaError("the names given are all of one run: name two or more different runs")
    whole = [id_ for id_, run in runs.items() if "predictions.parquet" not in run.record.files]
    if whole:
        raise CorsaError(f"run {whole[0]} joins several scenarios: pool their own runs")
    found = pooled({id_: _scenario(run) for id_, run in runs.items()})
    try:
        page = write_report(
            output, metrics=found.metrics, predictions=found.predictions, curves=found.curves, run=found.run
        )
    except OSError as error:
        raise CorsaError(f"cannot write to {output}: {error.strerror}. Choose another --output") from error
    if as_json:
        print(json.dumps(found.metrics, indent=1))
        return
    for table in summary_tables(found.metrics):
        Console().print(table)
    print(visible(str(page)))


def _scenario(run: Run) -> Scenario:
    """The data of a run for a page."""
    import pandas as pd

    from corsa.report.page import Scenario

    metrics = json.loads(run.artifact.read("metrics.json"))
    predictions, curves = (
        pd.read_parquet(BytesIO(run.artifact.read(f"{name}.parquet"))) for name in ("predictions", "curves")
    )
    return Scenario(metrics, predictions, curves, run.about)


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
    from corsa.report.page import write_report

    try:
        if "predictions.parquet" not in run.record.files:  # several scenarios joined: each has a run of its own
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "report.html").write_bytes(run.artifact.read("report.html"))
            return directory / "report.html"
        own = _scenario(run)
        return write_report(directory, metrics=metrics, run=run.about, predictions=own.predictions, curves=own.curves)
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
