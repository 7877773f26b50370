"""The readers: published files, hub rows, world_facts, and faults in a user's file.

The records are invented, in the published formats. The published files are read if they are available.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corsa.data.benchmarks import BENCHMARKS, BadRecord, digest, read
from corsa.errors import CorsaError

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


@pytest.mark.process
def test_the_registry_imports_nothing_heavy() -> None:
    heavy = ("pyarrow", "pandas", "yaml", "datasets", "torch", "ray")
    code = f"import sys, corsa.data.benchmarks; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


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


# -- the wrong benchmark, file or number ----------------------------------------------------------------------------


def test_unknown_benchmark() -> None:
    with pytest.raises(CorsaError, match="unknown benchmark 'conterfact': did you mean 'counterfact'"):
        read("conterfact")


@pytest.mark.parametrize("name", ["atoke", "file"])
def test_data_is_asked_for(name: str) -> None:
    for call in (read, digest):
        with pytest.raises(CorsaError, match="--data"):
            call(name)


def test_absent_file(tmp_path: Path) -> None:
    for call in (read, digest):
        with pytest.raises(CorsaError, match=r"no\.json does not exist"):
            call("zsre", str(tmp_path / "no.json"))
    with pytest.raises(CorsaError, match="is a directory"):
        read("file", str(tmp_path))


@pytest.mark.parametrize(("key", "value"), [("limit", 0), ("limit", -1), ("rounds", 0)])
def test_nothing_to_edit(key: str, value: int) -> None:
    with pytest.raises(CorsaError, match=f"{key} {value}: nothing would be edited"):
        read("world_facts", limit=value) if key == "limit" else read("world_facts", rounds=value)


def test_not_what_the_reader_reads(tmp_path: Path) -> None:
    zsre = write(tmp_path / "a.jsonl", [HUB_ZSRE])
    with pytest.raises(CorsaError, match=r"expected records with .*requested_rewrite; found input, .*'zsre'"):
        read("counterfact", zsre)
    with pytest.raises(CorsaError, match="this looks like benchmark 'zsre'"):
        read("file", zsre)
    with pytest.raises(CorsaError, match="this looks like benchmark 'counterfact'"):
        read("atoke", write(tmp_path / "b.json", [counterfact(1)]))
    with pytest.raises(CorsaError, match="found a, b; check --benchmark and --data"):
        read("zsre", write(tmp_path / "c.json", [{"a": 1, "b": 2}]))


def test_files_that_are_not_what_they_are_called(tmp_path: Path) -> None:
    def refused(name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CorsaError, match=message) as caught:
            read("file", str(tmp_path / name))
        assert name in str(caught.value)

    refused("a.json", b'[{"prompt": ', "line 1: this is not JSON")
    refused("b.json", b'{"prompt": "x"}', "expected a JSON list of records")
    refused("c.parquet", b"prompt,target_new", "not a whole Parquet file")
    refused("d.jsonl", b"\xff\xfe\x00", "not UTF-8")
    refused("e.xlsx", b"PK", r"unknown kind of file '\.xlsx'; give one of \.json, \.jsonl")
    refused("f.csv", b"prompt,prompt\n", "occurs twice")
    refused("g.csv", b'prompt,target_new,target_old\n"a"b,c,d\n', "this is not CSV")
    for name in ("h.json", "h.jsonl", "h.csv"):
        refused(name, b"", "is empty")
    refused("i.csv", b"prompt,target_new,target_old\n", "is empty")


# -- a user's file --------------------------------------------------------------------------------------------------


def mine(**values: Any) -> dict[str, Any]:
    record = {"prompt": "Who leads Acme?", "target_new": "Bo", "target_old": "Al", **values}
    return {key: value for key, value in record.items() if value is not ...}


FULL = mine(
    id="acme",
    subject="Acme",
    relation="chief",
    aliases_new=["Bo Berg", "B. B."],
    aliases_old=["Ahn"],
    paraphrases=["Acme is led by", "Acme's chief?"],
    neighbors=[
        {"prompt": "Who leads Umbrella?", "answer": "Di", "aliases": ["Dahl"]},
        {"prompt": "2+2?", "answer": "4"},
    ],
    chain="acme-chief",
    round=1,
)


def test_the_same_edits_from_every_format(tmp_path: Path) -> None:
    records = [FULL, mine(id="plain", prompt='Who, said "he"?')]
    jsonl = read("file", write(tmp_path / "mine.jsonl", records)).edits
    edit = jsonl[0]
    assert (edit.id, edit.chain, edit.round, edit.aliases_new) == ("acme", "acme-chief", 1, ("Bo Berg", "B. B."))
    assert [probe.kind for probe in edit.probes] == ["edit", "paraphrase", "neighbor", "neighbor"]
    assert edit.probes[2].aliases == ("Dahl",)

    assert read("file", write(tmp_path / "mine.json", records)).edits == jsonl

    pq.write_table(pa.Table.from_pylist(records, schema=None), tmp_path / "mine.parquet")
    assert read("file", str(tmp_path / "mine.parquet")).edits == jsonl

    with (tmp_path / "mine.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FULL.keys())
        writer.writeheader()
        lists = {key: " | ".join(FULL[key]) for key in ("aliases_new", "aliases_old", "paraphrases")}
        writer.writerow({**FULL, **lists, "neighbors": json.dumps(FULL["neighbors"])})
        writer.writerow(records[1])
    assert read("file", str(tmp_path / "mine.csv")).edits == jsonl


def test_default_ids_and_chains(tmp_path: Path) -> None:
    later = mine(chain="c", round=2, target_new="Cy", target_old="Bo")
    own = mine(prompt="Who leads Initech?")
    records = [later, own, mine(chain="c", round=1), mine(prompt="?", chain="d", round=1), mine(prompt="Who?", id=12)]
    path = write(tmp_path / "facts.jsonl", records)
    edits = read("file", path).edits
    assert [edit.id for edit in edits] == ["facts/2", "facts/0", "facts/1", "facts/3", "12"]
    assert [edit.round for edit in edits] == [1, 2, 1, 1, 1]
    two = read("file", path, rounds=2)  # the chain with one update is left out, facts without a chain stay
    assert [edit.id for edit in two.edits] == ["facts/2", "facts/0", "facts/1", "12"]
    assert two.short == 1
    assert [edit.id for edit in read("file", path, limit=1).edits] == ["facts/2", "facts/0"]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([mine(), mine(target_new=...)], "line 2: target_new: is missing; give the answer"),
        ([mine(target_new=None)], "line 1: target_new: is missing"),
        ([mine(target_old=...)], "line 1: target_old: is missing; .*L_DPO"),
        ([mine(prompt="  ")], "line 1: prompt: is blank; give the question"),
        ([mine(target_new=2011)], "line 1: target_new: is not a string but 2011"),
        ([mine(target_old=" BO ")], "line 1: target_old: is the same as target_new"),
        ([mine(paraphrases=["Who?", 7])], r"line 1: paraphrases\[1\]: is not a string but 7"),
        ([mine(paraphrases={"a": 1})], "line 1: paraphrases: is not a list but"),
        ([mine(paraphrases=["Who?", " "])], r"line 1: paraphrases\[1\]: is blank"),
        ([mine(id="a"), mine(prompt="Why?", id="a")], "line 2: id: 'a' was used before, by line 1"),
        ([mine(), mine(id="b")], "line 2: prompt: 'who leads acme.' was used before, by line 1; give each fact once"),
        ([mine(targt_old="Cy")], "line 1: targt_old: unknown column 'targt_old': did you mean 'target_old'"),
        ([mine(chain="c", round=1), mine(chain="c", round=1)], "line 2: round: round 1 of .*'c' was given .*by line 1"),
        ([mine(chain="c", round=1), mine(chain="c", round=3)], "line 2: round: chain 'c' has round 3 but no round 2"),
        ([mine(chain="c", round=2)], "line 1: round: chain 'c' has round 2 but no round 1"),
        ([mine(chain="c")], "line 1: round: is missing, though there is a chain"),
        ([mine(round=1)], "line 1: chain: is missing, though there is a round"),
        ([mine(chain="c", round="x")], "line 1: round: is not a whole number"),
        ([mine(neighbors=[{"prompt": "Who?"}])], r"line 1: neighbors\[0\].answer: is missing"),
        ([mine(neighbors=["Who?"])], r"line 1: neighbors\[0\]: is not an object"),
        ([mine(neighbors=[{"prompt": "Who?", "anser": "x"}])], r"line 1: neighbors\[0\]: is not an object with prompt"),
        ([mine(neighbors="[{")], "line 1: neighbors: is not JSON that can be read"),
        ([["Who?", "Bo", "Al"]], "line 1: record: is not an object but"),
    ],
)
def test_bad_records_of_a_user_stop(tmp_path: Path, records: list[Any], message: str) -> None:
    with pytest.raises(CorsaError, match=rf"mine\.jsonl, {message}"):
        read("file", write(tmp_path / "mine.jsonl", records))


def test_a_line_that_does_not_parse(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(mine()) + "\n\n" + json.dumps(mine())[:-5] + "\n")
    with pytest.raises(CorsaError, match=r"mine\.jsonl, line 3: column \d+: this is not JSON"):
        read("file", str(path))


def test_csv_lines_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text('prompt,target_new,target_old\n"two\nlines",Bo,Al\nWho?,Bo,\n')
    with pytest.raises(CorsaError, match=r"mine\.csv, line 4: target_old: is missing"):
        read("file", str(path))
    path.write_text("prompt,target_new,target_old\nWho leads Acme, Inc?,Bo,Al\n")
    with pytest.raises(CorsaError, match=r"line 2: record: has 4 cells, the header 3; quote"):
        read("file", str(path))
    path.write_text("prompt,target_new,target\nWho?,Bo,Al\n")
    with pytest.raises(CorsaError, match="unknown column 'target': did you mean"):
        read("file", str(path))


def test_bad_records_of_a_user_can_be_skipped(tmp_path: Path) -> None:
    later = mine(prompt="Why?", id="z")
    records = [mine(), mine(target_new=...), mine(chain="c", round=1), mine(chain="c", round=3), later]
    reading = read("file", write(tmp_path / "m.jsonl", records), on_bad_record="skip")
    assert [edit.id for edit in reading.edits] == ["m/0", "z"]
    assert [(bad.where, bad.field) for bad in reading.skipped] == [("line 2", "target_new"), ("line 4", "round")]
    with pytest.raises(CorsaError, match="none of its 1 records can be used; the first: line 1: prompt"):
        read("file", write(tmp_path / "n.jsonl", [mine(prompt="")]), on_bad_record="skip")


# -- world_facts' own file ------------------------------------------------------------------------------------------

WORLD = """
relations:
  - name: chief
    prompt: "Who leads {}?"
    paraphrases: ["{} is led by"]
    neighbors:
      - {subject: Umbrella, answer: Di, aliases: [Dahl]}
      - {subject: Initech, answer: Ed}
      - {subject: Acme, answer: Fy}
    facts:
      - {subject: Acme, values: [Al, {name: Bo, aliases: [Berg]}, Cy, Al]}
      - {subject: "Öl & Co", values: [A, B, C, D]}
  - name: seat
    prompt: "Where is {}?"
    paraphrases: ["{} sits in"]
    neighbors: [{subject: Umbrella, answer: Oslo}, {subject: Initech, answer: Rome}]
    facts: [{subject: Acme, values: [Bern, Bonn, Brno, Bari]}]
"""


def test_world_facts_format(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(WORLD, encoding="utf-8")
    edits = read("world_facts", str(path)).edits
    assert [edit.id for edit in edits[::3]] == [
        f"world_facts/{name}/1" for name in ("chief/acme", "seat/acme", "chief/ol-co")
    ]
    assert [(edit.target_old, edit.target_new) for edit in edits[:3]] == [("Al", "Bo"), ("Bo", "Cy"), ("Cy", "Al")]
    assert (edits[0].aliases_new, edits[1].aliases_old) == (("Berg",), ("Berg",))
    asked = [probe.prompts[0] for probe in edits[0].probes]
    assert asked == ["Who leads Acme?", "Acme is led by", "Who leads Umbrella?", "Who leads Initech?"]
    with pytest.raises(CorsaError, match="none of its 3 chains has 4 updates"):
        read("world_facts", str(path), rounds=4)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Bern, Bonn, Brno, Bari", "Bern, Bonn, Brno", "relations.1.facts.0.values"),
        ("Where is {}?", "Where?", "relations.1.prompt: .*needs {} once"),
        ("Bern,", "1990,", r"relations.1.facts.0.values.0"),
        ("Bern, Bonn", "Bern, bern", r"relation seat, fact \[0\] \(Acme\): target_old: is the same"),
        ('"Öl & Co"', "ACME", "relation chief, fact .* id 'world_facts/chief/acme'"),
        ("relations:", "relation:", "relations: is missing"),
        ("relations:", "relations: [", "is not YAML"),
    ],
)
def test_a_bad_file_of_world_facts_stops(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(WORLD.replace(old, new), encoding="utf-8")
    with pytest.raises(CorsaError, match=message):
        read("world_facts", str(path))


# -- identity -------------------------------------------------------------------------------------------------------


def test_digest_follows_bytes_and_ids(tmp_path: Path) -> None:
    def content(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    a, b = content("AToKe-ME.json", "[]"), content("AToKe-SE.json", "[]")
    assert digest("atoke", a) != digest("atoke", b)  # the ids of the edits differ
    assert digest("zsre", a) == digest("zsre", b)
    before = digest("atoke", a)
    assert before.startswith("atoke-me:")
    assert digest("atoke", content("AToKe-ME.json", "[ ]")) != before
    assert digest("world_facts").startswith("world_facts:")


def test_the_registry_describes_every_benchmark() -> None:
    assert set(BENCHMARKS) == {"world_facts", "counterfact", "zsre", "mquake", "atoke", "file"}
    assert all(benchmark.description for benchmark in BENCHMARKS.values())
    assert not BENCHMARKS["world_facts"].needs_data
    assert {name for name, benchmark in BENCHMARKS.items() if benchmark.hub} == {"counterfact", "zsre", "mquake"}
