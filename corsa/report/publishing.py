"""The record of a run that is published: its metrics and how it was made, without answers. The tables of a document are
made from such records.

In a document, `<!-- table: NAME -->` and `<!-- end -->` enclose the table of the record NAME.json. `NAME/SCENARIO` is
one scenario of a joined report (write _ for a blank). Names of metrics after it, separated by commas, are the columns;
by default the headlines. `cost` among them adds the training time: name it only if the machine did nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corsa.errors import CorsaError, unknown_name
from corsa.report.findings import drawn, findings, headlines, label, shown

_KEPT = ("title", "created", "command", "commits", "versions", "hardware", "config", "skipped", "notes")
_COST = "cost"
_ARROWS = {"high": " ↑", "low": " ↓"}
_START = r"<!-- table: (?P<name>[^\s,]+)(?: (?P<columns>[\w,]+))? -->\n"
_TABLE = re.compile(rf"{_START}(?P<old>(?:(?!<!-- table:).)*?)(?P<end><!-- end -->)", re.DOTALL)


_FOLDERS = re.compile(r"(?<![\w:/.])~?/(?:[^\s/,;:'\"]+/)+")
"""The folders of an absolute path. What has a scheme, such as `s3://bucket/a`, is none."""


def record(run: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What is published of a run: parts of its run.json, and its metrics.json. Files lose the folders of the machine
    that they were on.
    """
    return {name: _without_folders(run[name]) for name in _KEPT if run.get(name)} | {"metrics": metrics}


def _without_folders(value: Any) -> Any:
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, Mapping):
        return {name: _without_folders(part) for name, part in value.items()}
    return [_without_folders(part) for part in value] if isinstance(value, list | tuple) else value


def publish(run: Mapping[str, Any], metrics: Mapping[str, Any], file: Path) -> None:
    """Writes the record of a run.

    Raises:
        CorsaError: the file is not called .json, or cannot be written.
    """
    if file.suffix != ".json":
        raise CorsaError(f"--publish {file}: give the name of a .json file, such as docs/results/single.json")
    text = json.dumps(record(run, metrics), indent=1, ensure_ascii=False, allow_nan=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CorsaError(f"cannot write to {file}: {error.strerror}") from error


def fill(document: Path, records: Path | None = None) -> None:
    """Writes the tables of a document anew.

    Args:
        document: the file to write.
        records: directory of the records; by default it is called as the document without .md.

    Raises:
        CorsaError: the document cannot be read or written, or a table has no record, scenario or metric of its name.
    """
    try:
        text = document.read_text(encoding="utf-8")
        new = filled(text, records or document.with_suffix(""))
        if new != text:
            document.write_text(new, encoding="utf-8")
    except OSError as error:
        raise CorsaError(f"cannot write the tables of {document}: {error.strerror}") from error


def filled(text: str, folder: Path) -> str:
    """The text of a document with its tables as the records in `folder` give them."""

    def table(found: re.Match[str]) -> str:
        name, _, scenario = found["name"].partition("/")
        file = folder / f"{name}.json"
        if not file.is_file():
            raise unknown_name("record", name, [path.stem for path in sorted(folder.glob("*.json"))])
        columns = found["columns"].split(",") if found["columns"] else []
        start = found[0][: found.start("old") - found.start()]
        made = markdown(json.loads(file.read_text(encoding="utf-8")), scenario.replace("_", " "), columns)
        return f"{start}\n{made}\n{found['end']}"

    new, count = _TABLE.subn(table, text)
    if count != text.count("<!-- table:"):
        raise CorsaError("a table of the document does not end: write <!-- end --> after each <!-- table: NAME -->")
    return new


def markdown(record: Mapping[str, Any], scenario: str = "", columns: Sequence[str] = ()) -> str:
    """The table of a record in Markdown: how it was measured, each method's metrics after the last round with their
    intervals, and what the report concludes.

    Raises:
        CorsaError: the record has no scenario or metric of this name.
    """
    metrics = record["metrics"]
    if "rows" not in metrics:
        if scenario not in metrics:
            raise unknown_name("scenario", scenario, metrics)
        metrics = metrics[scenario]
    definitions = metrics["definitions"]
    known = headlines(metrics)
    cost = (metrics.get("cost") or {}) if _COST in columns else {}
    columns = [name for name in columns if name != _COST]
    for name in columns:
        if name not in definitions:
            raise unknown_name("metric", name, definitions)
    chosen = {name: known.get(name, definitions[name]["label"].lower()) for name in columns or known}
    specific = metrics.get("specificity") or {}
    heads = ["", *(f"{head}{_ARROWS[definitions[name]['better']]}" for name, head in chosen.items())]
    everyday = metrics.get("everyday") or {}
    heads += ["MMLU ↑"] * bool(specific) + ["everyday questions right ↑", "as before or still right ↑"] * bool(everyday)
    least = min(cost, key=lambda method: cost[method], default="")
    heads += [f"training time, {label(least)} = 1 ↓"] * (len(cost) > 1)
    rows = [heads, ["---"] * len(heads)]
    for row in metrics["rows"]:
        cells = [_cell(row["metrics"][name], definitions[name]["unit"]) for name in chosen]
        if specific:
            cells.append(_cell(specific[row["method"]]["overall"], "share") if row["method"] in specific else "–")
        if everyday:
            found = everyday.get(row["method"]) or {}
            cells += [_cell(entry, "share") if (entry := found.get(name)) else "–" for name in ("right", "kept")]
        if len(cost) > 1:
            known = cost[least] and row["method"] in cost
            cells.append(f"{cost[row['method']] / cost[least]:.1f}" if known else "–")
        rows.append([label(row["method"]).replace("|", r"\|"), *cells])
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    verdicts = [f"- {sentence}" for sentence in findings(metrics)]
    return "\n".join([_measured(record, metrics), "", *lines, "", *verdicts, *[""] * bool(verdicts)])


def _cell(entry: dict[str, Any], unit: str) -> str:
    value, interval = shown(entry, unit)
    return f"{value} ({interval})" if interval else value


def _measured(record: Mapping[str, Any], metrics: dict[str, Any]) -> str:
    hardware, seeds = record.get("hardware") or {}, len(metrics["seeds"])
    units = {"processor": "{}", "cores": "{} cores", "memory_gib": "{:.0f} GiB"}
    machine = [text.format(hardware[name]) for name, text in units.items() if name in hardware]
    commits = ", ".join(record.get("commits") or ())
    model = ((record.get("config") or {}).get("model") or {}).get("name")
    parts = [
        *([f"`{model}`"] if model else []),
        f"{metrics['chains']} {metrics.get('over', 'facts')}",
        f"{seeds} seed{'s' * (seeds != 1)}",
        f"protocol `{metrics['protocol']}`",
        f"rule `{metrics['rule']}`",
        f"{100 * metrics['level']:.0f} % intervals over {drawn(metrics)}",
        *machine,
        record["created"][:10],
        *([f"commit {commits}"] if commits else []),
    ]
    return f"{', '.join(parts)}:\n\n```\n{record['command']}\n```"
