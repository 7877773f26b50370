"""Files that a reader refuses, files of the user, a file of world_facts of one's own, and digests."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_records import HUB_ZSRE, counterfact, write

from corsa.data.benchmarks import digest, read
from corsa.errors import CorsaError

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
