"""The readers of the benchmarks: published files, their formats on invented records, and hub rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_records import HUB_ZSRE, atoke, counterfact, published, write

from corsa.data.benchmarks import BENCHMARKS, BadRecord, digest, read
from corsa.errors import CorsaError


@pytest.mark.process
def test_the_registry_imports_nothing_heavy() -> None:
    heavy = ("pyarrow", "pandas", "yaml", "datasets", "torch", "ray")
    code = f"import sys, corsa.data.benchmarks; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_registry_describes_every_benchmark() -> None:
    assert set(BENCHMARKS) == {"world_facts", "counterfact", "zsre", "mquake", "atoke", "file"}
    assert all(benchmark.description for benchmark in BENCHMARKS.values())
    assert not BENCHMARKS["world_facts"].needs_data
    assert {name for name, benchmark in BENCHMARKS.items() if benchmark.hub} == {"counterfact", "zsre", "mquake"}


# -- published files ------------------------------------------------------------------------------------------------


def test_counterfact_published() -> None:
    path = published("counterfact/counterfact.json")
    reading = read("counterfact", path)
    assert (len(reading.edits), reading.skipped) == (1031, [])
    kinds = Counter(probe.kind for edit in reading.edits for probe in edit.probes)
    assert (kinds["edit"], kinds["paraphrase"]) == (1031, 1031)
    assert reading.edits[0].id == "counterfact/4482"
    # Each neighbor question once, with its first fact, and no taught question; counted on the file.
    records = json.loads(Path(path).read_text(encoding="utf-8"))
    rewrites = [record["requested_rewrite"] for record in records]
    taught = {rewrite["prompt"].replace("{}", rewrite["subject"]).casefold() for rewrite in rewrites}
    asked = [question.strip().casefold() for record in records for question in record["neighborhood_prompts"]]
    assert kinds["neighbor"] == len(set(asked) - taught) < len(asked) == 10310
    assert reading.repeats.neighbors == len(asked) - kinds["neighbor"]


def test_zsre_published() -> None:
    path = published("zsre/zsre_mend_eval.json")
    reading = read("zsre", path)
    assert (len(reading.edits), len(reading.skipped)) == (1008, 29)
    assert all(bad.field == "target_old" and "same as target_new" in bad.reason for bad in reading.skipped)
    # 28 are identical; one more differs only by a leading blank.
    records = json.loads(Path(path).read_text(encoding="utf-8"))
    assert sum(record["alt"] == record["answers"][0] for record in records) == 28
    assert not any(probe.prompts[0].startswith("nq question") for edit in reading.edits for probe in edit.probes)


@pytest.mark.parametrize(
    ("name", "rounds", "chains", "edits", "skipped", "short"),
    [("AToKe-ME", None, 991, 2250, 41, 0), ("AToKe-ME", 3, 342, 1026, 0, 690), ("AToKe-SE", None, 301, 301, 7, 0)],
)
def test_atoke_published(name: str, rounds: int | None, chains: int, edits: int, skipped: int, short: int) -> None:
    reading = read("atoke", published(f"atoke/{name}.json"), rounds=rounds)
    assert len({edit.chain for edit in reading.edits}) == chains
    assert (len(reading.edits), len(reading.skipped), reading.short) == (edits, skipped, short)
    assert all(edit.id == f"{edit.chain}/{edit.round}" for edit in reading.edits)
    assert reading.edits[0].id.startswith(name.lower() + "/")
    assert all([probe.kind for probe in edit.probes] == ["edit", "paraphrase", "history"] for edit in reading.edits)


def test_world_facts() -> None:
    reading = read("world_facts")
    assert reading.skipped == []
    homes: dict[str, set[str]] = {}
    for edit in reading.edits:
        for probe in edit.probes:
            if probe.kind == "neighbor":
                homes.setdefault(probe.prompts[0], set()).add(edit.chain)
    assert all(len(facts) == 1 for facts in homes.values())
    chains = Counter(edit.chain for edit in reading.edits)
    assert len(chains) >= 96
    assert set(chains.values()) == {3}
    assert len({edit.relation for edit in reading.edits}) >= 8
    for edit in reading.edits:
        kinds = Counter(probe.kind for probe in edit.probes)
        assert (kinds["edit"], kinds["paraphrase"]) == (1, 1)
        assert kinds["neighbor"] <= 2
        assert len(edit.probes[1].prompts) >= 3
        assert edit.prompt not in {probe.prompts[0] for probe in edit.probes if probe.kind == "neighbor"}
    few = read("world_facts", limit=8, rounds=2).edits
    assert [edit.round for edit in few] == [1, 2] * 8
    assert len({edit.relation for edit in few}) == 8


# -- formats, on invented records -----------------------------------------------------------------------------------


def test_counterfact_format(tmp_path: Path) -> None:
    (edit,) = read("counterfact", write(tmp_path / "cf.json", [counterfact(7)])).edits
    assert (edit.id, edit.chain, edit.round) == ("counterfact/7", "counterfact/7", 1)
    assert (edit.prompt, edit.subject, edit.relation) == ("The chief of Acme 7 is", "Acme 7", "P0")
    assert (edit.target_new, edit.target_old) == ("Bo", "Al")
    assert [probe.answer for probe in edit.probes] == ["Bo", "Bo", "Al", "Al"]


def test_zsre_format(tmp_path: Path) -> None:
    record = {
        "subject": "Acme",
        "src": "Who leads Acme?",
        "rephrase": "Acme is led by whom?",
        "alt": "Bo",
        "answers": ["Al", "Ahn"],
        "pred": "Cy",
        "loc": "nq question: who led umbrella",
        "loc_ans": "Di",
    }
    (edit,) = read("zsre", write(tmp_path / "z.json", [record])).edits
    assert (edit.id, edit.target_new, edit.target_old, edit.aliases_old) == ("zsre/0", "Bo", "Al", ("Ahn",))
    assert [probe.prompts for probe in edit.probes[1:]] == [("Acme is led by whom?",), ("who led umbrella",)]


def test_atoke_format(tmp_path: Path) -> None:
    path = write(tmp_path / "my AToKe-ME v2.json", [atoke(5, ["Al", "Bo", "Cy"])])
    first, second = read("atoke", path).edits
    assert (first.id, first.chain, first.round) == ("atoke-me/5/1", "atoke-me/5", 1)
    assert (second.id, second.round, second.target_old, second.target_new) == ("atoke-me/5/2", 2, "Bo", "Cy")
    assert (second.aliases_new, second.aliases_old) == (("new Cy",), ("old Bo",))
    asked, paraphrase, history = second.probes
    assert asked.prompts == ("Who leads Acme?",)
    assert paraphrase.prompts == ("The chief of Acme is", "Acme is led by")
    assert (history.answer, len(history.prompts)) == ("Bo", 3)


def test_atoke_without_a_question_asks_the_cloze(tmp_path: Path) -> None:
    record = atoke(5, ["Al", "Bo"])
    record["requested_rewrite"][0]["evaluation"]["questions"] = None
    (edit,) = read("atoke", write(tmp_path / "chains.json", [record])).edits
    assert edit.id == "atoke/5/1"
    assert edit.prompt == "The chief of Acme is"
    assert edit.probes[1].prompts == ("Acme is led by",)


def test_rounds_choose_chains_and_updates(tmp_path: Path) -> None:
    bad_at_2 = atoke(4, ["Al", "Bo", "Bo", "Cy"])
    chains = [atoke(1, ["Al", "Bo"]), atoke(2, ["Al", "Bo", "Cy"]), atoke(3, ["Al", "Bo", "Cy", "Di"]), bad_at_2]
    path = write(tmp_path / "a.json", chains)
    assert Counter(edit.chain for edit in read("atoke", path).edits) == {"atoke/1": 1, "atoke/2": 2, "atoke/3": 3}
    two = read("atoke", path, rounds=2)
    assert Counter(edit.chain for edit in two.edits) == {"atoke/2": 2, "atoke/3": 2}
    assert two.short == 1
    assert [(bad.where, bad.field) for bad in two.skipped] == [("record [3]", "update 2, target_old")]
    assert Counter(edit.chain for edit in read("atoke", path, rounds=1).edits).total() == 4
    with pytest.raises(CorsaError, match="none of its 3 chains has 4 updates"):
        read("atoke", write(tmp_path / "b.json", chains[:3]), rounds=4)


def test_limit_counts_facts_after_bad_ones(tmp_path: Path) -> None:
    records = [counterfact(0, new="Al"), counterfact(1), counterfact(2), counterfact(3, new=""), counterfact(4)]
    reading = read("counterfact", write(tmp_path / "cf.json", records), limit=2, rounds=3)
    assert [edit.id for edit in reading.edits] == ["counterfact/1", "counterfact/2"]
    assert [bad.where for bad in reading.skipped] == ["record [0]"]
    assert len(read("counterfact", str(tmp_path / "cf.json"), limit=100).edits) == 3


@pytest.mark.parametrize("on_bad_record", ["skip", "stop"])
def test_bad_published_records_are_listed_or_stop(tmp_path: Path, on_bad_record: Any) -> None:
    missing = counterfact(2)
    del missing["requested_rewrite"]["target_new"]
    number = counterfact(3)
    number["paraphrase_prompts"] = ["fine", 3]
    path = write(tmp_path / "cf.json", [counterfact(1), missing, number, counterfact(1), "text"])
    if on_bad_record == "stop":
        with pytest.raises(CorsaError, match=r"cf.json, record \[1\]: requested_rewrite.target_new.str: is missing"):
            read("counterfact", path, on_bad_record="stop")
        return
    assert read("counterfact", path).skipped == [
        BadRecord("record [1]", "requested_rewrite.target_new.str", "is missing"),
        BadRecord("record [2]", "paraphrase_prompts[1]", "is not a string but 3"),
        BadRecord("record [3]", "id", "'counterfact/1' was used before, by record [0]"),
        BadRecord("record [4]", "record", "is not an object but 'text'"),
    ]


# -- the hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[list[dict[str, Any]]], list[tuple]]:
    """Makes `load_dataset` return the given rows as a real Dataset. Returns the list of calls."""
    import datasets

    load = datasets.load_dataset

    def serve(rows: list[dict[str, Any]]) -> list[tuple]:
        path, calls = write(tmp_path / "rows.jsonl", rows), []

        def local(id: str, split: str, revision: str) -> Any:
            calls.append((id, split, revision))
            return load("json", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))

        monkeypatch.setattr(datasets, "load_dataset", local)
        return calls

    return serve


def test_zsre_hub_rows(hub: Any) -> None:
    calls = hub([HUB_ZSRE, {**HUB_ZSRE, "alternatives": []}])
    reading = read("zsre")
    (edit,) = reading.edits
    assert calls == [("wangzn2001/zsre", "test", "main")]
    assert (edit.id, edit.prompt, edit.target_new, edit.target_old) == ("zsre/0", "Who leads Acme?", "Bo", "Al")
    assert edit.aliases_old == ("Ahn",)
    assert edit.probes[1].prompts == ("Who is the chief of Acme?", "Acme is led by whom?")
    assert reading.skipped == [BadRecord("row [1]", "alternatives", "is missing: there is no answer")]
    assert reading.source == digest("zsre") == "hub:wangzn2001/zsre@main:test"


def test_counterfact_hub_rows(hub: Any) -> None:
    calls = hub([counterfact(1), counterfact(2)])
    assert [edit.id for edit in read("counterfact").edits] == ["counterfact/1", "counterfact/2"]
    assert calls == [("azhx/counterfact", "test", "main")]


def test_hub_rows_in_a_file(tmp_path: Path) -> None:
    assert read("zsre", write(tmp_path / "rows.jsonl", [HUB_ZSRE])).edits[0].target_new == "Bo"
    pq.write_table(pa.Table.from_pylist([HUB_ZSRE]), tmp_path / "rows.parquet")
    assert read("zsre", str(tmp_path / "rows.parquet")).edits[0].target_old == "Al"


def test_no_hub_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(CorsaError, match=r"azhx/counterfact .*Couldn't reach.*--data"):
        read("counterfact")
