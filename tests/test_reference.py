"""The reference stage without a cluster: answers that have no tokens, and actors that are lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import ray.exceptions

from corsa.algorithm.packing import Triplet
from corsa.config import ModelConfig, Placement
from corsa.config.steps import ReferenceConfig
from corsa.errors import CorsaError
from corsa.experiments.kinds import REFERENCE
from corsa.flow import Step, Store, Task
from corsa.models.encoding import Encoder
from corsa.training import reference

EDITS = pa.Table.from_pylist(
    [
        {"id": "a/1", "prompt": "one?", "target_new": "yes", "target_old": "no"},
        {"id": "a/2", "prompt": "two?", "target_new": "yes", "target_old": "\u200b"},
        {"id": "a/3", "prompt": "three?", "target_new": "\u200b", "target_old": "no"},
    ]
)
BAD = [{"where": "a/2", "field": "target_old", "reason": "has no tokens"}]


class Letters:
    """A tokenizer with one token for each letter and no others."""

    eos_token_id = 0
    added_tokens_decoder: ClassVar = {}

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text if letter.isalpha()] for text in texts]}


def test_an_answer_without_tokens_is_marked_and_not_scored() -> None:
    scored: list[Triplet] = []

    def score(triplets: list[Triplet]) -> np.ndarray:
        scored.extend(triplets)
        return np.array([[-1.0], [-2.0]])

    stage = object.__new__(reference.Score)
    stage.encoder = Encoder(Letters(), "qa")
    stage.score = score
    rows = stage(EDITS).to_pylist()
    assert [row["bad"] for row in rows] == [None, "target_old", "target_new"]
    assert [(row["reference_new"], row["reference_old"]) for row in rows] == [(-1.0, -2.0), (None, None), (None, None)]
    assert [t.new for t in scored] == [[ord("y"), ord("e"), ord("s"), 0]]


def task(folder: Path, on_bad_record: Any = "stop", **placement: Any) -> Task:
    config = ReferenceConfig(model=ModelConfig(name="random:tiny-llama"), on_bad_record=on_bad_record)
    return Task(Step("reference/file", REFERENCE, config, placement=Placement(**placement)), Store(folder))


def test_it_stops_the_run_or_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_write", lambda *_: (2, BAD))
    with pytest.raises(CorsaError, match=r"a/2: target_old has no tokens under the tokenizer of random:tiny-llama"):
        reference.compute(task(tmp_path))
    skipping = task(tmp_path, "skip")
    assert reference.compute(skipping) == {"edits": 2, "skipped": 1, "reference_forwards": 2}
    assert json.loads((skipping.output / "skipped.json").read_text()) == BAD
    monkeypatch.setattr(reference, "_write", lambda *_: (0, BAD))
    with pytest.raises(CorsaError, match="no edit is left"):
        reference.compute(task(tmp_path, "skip"))


def test_the_stage_is_run_again_when_its_actors_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def write(*_: Any) -> tuple[int, list[dict[str, str]]]:
        calls.append(1)
        if len(calls) < 3:
            raise ray.exceptions.RayActorError()
        return 3, []

    monkeypatch.setattr(reference, "_write", write)
    assert reference.compute(task(tmp_path, max_failures=2))["edits"] == 3
    calls.clear()
    with pytest.raises(ray.exceptions.RayActorError):
        reference.compute(task(tmp_path, max_failures=1))
    assert len(calls) == 2
