"""Small files of facts for the tests of reading, and the shared cases."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from corsa.data.edit import Edit

CASES = Path(__file__).parents[2] / "shared" / "cases"


def case(name: str) -> str:
    """Path of a shared case, or skip."""
    if not (CASES / name).is_file():
        pytest.skip(f"{CASES / name} is not here")
    return str(CASES / name)


def fact(**values: Any) -> dict[str, Any]:
    return {"prompt": "Who leads Acme?", "target_new": "Bo Lind", "target_old": "Cy Moss", **values}


def written(path: Path, *rows: Any) -> str:
    """The rows as JSON lines, or as one list."""
    text = json.dumps(list(rows)) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def table(path: Path, *rows: dict[str, str], separator: str = ",") -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def wordings(edit: Edit, kind: str = "paraphrase") -> list[str]:
    return [wording for probe in edit.probes if probe.kind == kind for wording in probe.prompts]


def one_counterfact_record(folder: Path) -> Path:
    """A counterfact.json of one record."""
    rewrite = {
        "prompt": "{} is led by",
        "subject": "Acme",
        "target_new": {"str": "Ada Byron"},
        "target_true": {"str": "Grace Murray"},
    }
    record = {"case_id": 7, "requested_rewrite": rewrite, "paraphrase_prompts": [], "neighborhood_prompts": []}
    file = folder / "counterfact.json"
    file.write_text(json.dumps([record]))
    return file
