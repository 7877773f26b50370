"""Invented records in the formats of the published benchmarks, and the published files if they are here."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

PUBLISHED = Path(__file__).parents[2] / "shared" / "data"


def published(name: str) -> str:
    """Path of a published file, or skip."""
    path = PUBLISHED / name
    if not path.is_file():
        pytest.skip(f"the published file {path} is not here")
    return str(path)


def write(path: Path, records: list[Any]) -> str:
    """The records as JSONL, or as one JSON list, by the extension."""
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else json.dumps(records), encoding="utf-8")
    return str(path)


def counterfact(case: int, new: str = "Bo", true: str = "Al") -> dict[str, Any]:
    return {
        "case_id": case,
        "requested_rewrite": {
            "prompt": "The chief of {} is",
            "relation_id": "P0",
            "target_new": {"str": new, "id": "Q1"},
            "target_true": {"str": true, "id": "Q2"},
            "subject": f"Acme {case}",
        },
        "paraphrase_prompts": [f"Idle talk. Acme {case} is led by"],
        "neighborhood_prompts": ["The chief of Umbrella is", "Initech is led by"],
    }


def atoke(case: int, values: list[str]) -> dict[str, Any]:
    def wordings(*texts: str) -> dict[str, str | None]:
        names = ("questions", "completion", "paraphrase_completion", "time_completion")
        return dict(zip(names, (*texts, "In 1999,"), strict=True))

    updates = [
        {
            "prompt": "The chief of {} is",
            "subject": "Acme",
            "relation": "<leads>",
            "target_new": {"str": new, "id": None},
            "target_true": {"str": old, "id": None},
            "evaluation": wordings("Who leads Acme?", "The chief of Acme is", "Acme is led by"),
        }
        for old, new in pairwise(values)
    ]
    asked_before = wordings("Who led Acme before?", "Acme was led by", "The former chief of Acme is")
    return {
        "case_id": case,
        "requested_rewrite": updates,
        "history_evaluation": [asked_before] * len(updates),
        "answer_alias": [[f"old {value}", ""] for value in values[:-1]],
        "new_answer_alias": [[f"new {value}"] for value in values[1:]],
    }


HUB_ZSRE = {
    "input": "Who leads Acme?",
    "output": [
        {"answer": "Al", "provenance": [{"title": "Acme"}]},
        {"answer": None, "provenance": []},
        {"answer": "Ahn", "provenance": []},
    ],
    "alternatives": ["Bo", "Cy"],
    "rephrases": ["Who is the chief of Acme?", "Acme is led by whom?"],
}
