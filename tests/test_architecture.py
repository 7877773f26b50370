"""Packages import only from packages in lower layers, as pyproject.toml and docs/architecture.md say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]


def layers() -> list[set[str]]:
    contracts: list[Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layered,) = [contract for contract in contracts if contract["type"] == "layers"]
    return [{room.strip() for room in layer.split("|")} for layer in layered["layers"]]


def test_rooms_import_only_from_rooms_below() -> None:
    # prints each forbidden import with its file and line
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True) == 0


def section() -> str:
    """The part of the document about rooms."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    return text.partition("## Rooms")[2].partition("\n## ")[0]


def test_the_table_of_the_document_lists_the_same_rooms() -> None:
    rows = re.findall(r"^\| (`.+?`) \|", section(), re.MULTILINE)
    assert [{name.strip("`/ ") for name in row.split(",")} for row in rows] == layers()


def test_the_drawing_of_the_document_shows_the_same_rooms() -> None:
    boxes = dict(re.findall(r'^ +(\w+)\["(.+)"\]$', section(), re.MULTILINE))
    (arrows,) = re.findall(r"^ +(\w+(?: --> \w+)+)$", section(), re.MULTILINE)
    assert [set(boxes[name].split(", ")) for name in arrows.split(" --> ")] == layers()


def test_the_files_in_the_first_drawing_exist() -> None:
    drawing = (ROOT / "docs" / "architecture.md").read_text().partition("```mermaid")[2].partition("```")[0]
    named = re.findall(r"(?:corsa|pipelines|tune)/[\w/.]*", drawing)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_room_is_there() -> None:
    there = {path.relative_to(ROOT / "corsa").parts[0] for path in (ROOT / "corsa").glob("*/**/*.py")}
    loose = {p.stem for p in (ROOT / "corsa").glob("*.py")} - {"__init__"}
    assert set().union(*layers()) == there | loose
    assert loose == {"api", "errors", "terminal"}
