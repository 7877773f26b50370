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


def test_the_document_draws_the_same_rooms() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("## Rooms")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE)
    drawn = [{name.strip("`/ ").removeprefix("corsa/") for name in row.split(",")} for row in rows]
    assert drawn == layers()


def test_every_room_is_there() -> None:
    there = {path.relative_to(ROOT / "corsa").parts[0] for path in (ROOT / "corsa").glob("*/**/*.py")}
    loose = {p.stem for p in (ROOT / "corsa").glob("*.py")} - {"__init__"}
    assert set().union(*layers()) == there | loose
    assert loose == {"api", "errors", "terminal"}
