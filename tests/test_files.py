"""Files of any kind: JSON, gzipped, piped; formats of other projects; and repeated questions.

The files are invented. Those of ../shared/cases are read if they are available.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fact_files import fact, wordings, written

from corsa.api import load_edits
from corsa.data.benchmarks import read
from corsa.data.benchmarks.file import drafts_of
from corsa.errors import CorsaError

# -- JSON, bytes and pipes ------------------------------------------------------------------------------------------


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    record = '{"prompt": "Who?", "target_new": "Bo", "target_old": "Cy", "target_new": "Di"}'
    nested = '{"prompt": "Why?", "target_new": "Bo", "target_old": "Cy", "neighbors": [{"prompt": "a", "prompt": "b"}]}'
    good = json.dumps(fact())
    (tmp_path / "f.jsonl").write_text(f"{good}\n{record}\n{nested}\n")
    (tmp_path / "f.json").write_text(f"[{good}, {record}, {nested}]")
    for name, second, third in (("f.jsonl", "line 2", "line 3"), ("f.json", r"record \[1\]", r"record \[2\]")):
        with pytest.raises(
            CorsaError, match=f"{name}, {second}: target_new: is given twice.*2 bad.*{third}: prompt: is given"
        ):
            read("file", str(tmp_path / name))


@pytest.mark.parametrize(
    ("value", "reason"),
    [("[" * 100_000, "nested too deeply"), ("9" * 5000, r"4300 digits"), ('{"a":' * 100_000, "nested too deeply")],
)
def test_json_that_python_cannot_hold(tmp_path: Path, value: str, reason: str) -> None:
    record = f'{{"prompt": {value}'
    (tmp_path / "f.jsonl").write_text(f"{json.dumps(fact())}\n{record}}}\n")
    (tmp_path / "f.json").write_text(f"[{record}}}]")
    (tmp_path / "n.csv").write_text(
        f'prompt,target_new,target_old,neighbors\nWho?,a,b,"{value[:9000].replace(chr(34), chr(34) * 2)}"\n'
    )
    for name in ("f.jsonl", "f.json"):
        with pytest.raises(CorsaError, match=rf"{name}(, line 2: record)?: this JSON cannot be read: .*{reason}"):
            read("file", str(tmp_path / name))
    with pytest.raises(CorsaError, match="line 2: neighbors: is not"):
        read("file", str(tmp_path / "n.csv"))


def test_a_very_long_line_is_refused_at_once_and_in_few_words(tmp_path: Path) -> None:
    long = "x" * 10_000_000
    for row in (
        fact(target_new=long),
        {long: "Who?"},
        fact(neighbors=long),
        fact(paraphrases=[long]),
        fact(id=long),
        [long],
    ):
        started = time.perf_counter()
        with pytest.raises(CorsaError, match="line 1: ") as caught:
            read("file", written(tmp_path / "f.jsonl", row))
        assert len(str(caught.value)) < 1000
        assert time.perf_counter() - started < 5


def test_gzipped_files_are_read(tmp_path: Path) -> None:
    plain = {
        "facts.jsonl": json.dumps(fact()) + "\n",
        "facts.json": json.dumps([fact()]),
        "facts.csv": "prompt;target_new;target_old\nWho leads Acme?;Bo Lind;Cy Moss\n",
    }
    for name, text in plain.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        (edit,) = read("file", str(tmp_path / f"{name}.gz")).edits
        assert (edit.id, edit.target_new) == ("facts/0", "Bo Lind")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(plain["facts.jsonl"].encode())[:-9])
    (tmp_path / "no.jsonl.gz").write_text(plain["facts.jsonl"])
    for name in ("cut.jsonl.gz", "no.jsonl.gz"):
        with pytest.raises(CorsaError, match=f"{name} is not a whole gzip file"):
            read("file", str(tmp_path / name))


def test_a_file_that_expands_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank lines: no record ends the reading."""
    from corsa.data.benchmarks import files

    monkeypatch.setattr(files, "_EXPANDED", 1 << 20)
    blank = b" " * 1023 + b"\n"
    packed = gzip.compress(blank * 1100)
    for name in ("f.jsonl.gz", "f.json.gz", "f.parquet.gz"):
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(CorsaError, match=f"{name} expands to more than 1 MiB: give it unpacked"):
            read("file", str(tmp_path / name))
    (tmp_path / "sound.jsonl.gz").write_bytes(gzip.compress(blank * 1000 + json.dumps(fact()).encode()))
    assert len(read("file", str(tmp_path / "sound.jsonl.gz")).edits) == 1


def test_a_device_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from corsa.data.benchmarks import files

    monkeypatch.setattr(files, "_PIPED", 1 << 20)
    with pytest.raises(CorsaError, match="/dev/zero gives more than 1 MiB: save it to a file"):
        read("file", "/dev/zero")


def test_a_header_that_is_too_long_for_csv_is_named(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("c" * 200_000 + "\n1\n")
    with pytest.raises(CorsaError, match="line 1: this is no header of a CSV file: field larger than field limit"):
        read("file", str(tmp_path / "f.csv"))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "gz"])
def test_standard_input_and_pipes_are_read_as_often_as_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from corsa.data.benchmarks import digest, files

    rows = {
        "jsonl": json.dumps(fact()),
        "json": json.dumps([fact()]),
        "csv": "prompt,target_new,target_old\nWho leads Acme?,Bo Lind,Cy Moss",
    }
    content = gzip.compress(rows["jsonl"].encode()) if kind == "gz" else rows[kind].encode()
    monkeypatch.setattr(files, "_kept", {})
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    for _ in range(2):
        (edit,) = read("file", "-").edits
        assert (edit.id, edit.target_new) == ("stdin/0", "Bo Lind")
        assert drafts_of("-")[0].fields["prompt"] == "Who leads Acme?"
    assert digest("file", "-").startswith("stdin:")
    end, begin = os.pipe()
    os.write(begin, content)
    os.close(begin)
    assert read("file", f"/dev/fd/{end}").edits[0].target_new == "Bo Lind"
    os.close(end)


def test_faults_of_standard_input_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from corsa.data.benchmarks import files

    monkeypatch.setattr(files, "_kept", {})
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "Who?"}\n')))
    with pytest.raises(CorsaError, match=r"^standard input, line 1: target_new: is missing"):
        drafts_of("-")


def test_bytes_that_are_not_utf8_are_named_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_bytes(json.dumps(fact()).encode() + b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(CorsaError, match=r"not UTF-8 text \(line 2: byte 0xe9 at position 16\); save it as UTF-8"):
        read("file", str(tmp_path / "f.jsonl"))
    (tmp_path / "g.csv").write_bytes("prompt,target_new,target_old\nWho?,a,b\n".encode("utf-16"))
    with pytest.raises(CorsaError, match="not UTF-8 text but UTF-16; save it as UTF-8"):
        read("file", str(tmp_path / "g.csv"))
    for name, text in (
        ("b.jsonl", json.dumps(fact())),
        ("b.json", json.dumps([fact()])),
        ("b.csv", "prompt,target_new,target_old\na,b,c\n"),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert len(read("file", str(tmp_path / name)).edits) == 1


def test_one_json_list_in_a_file_of_lines_is_named(tmp_path: Path) -> None:
    for text in (json.dumps([fact()]), json.dumps([fact()], indent=1)):
        (tmp_path / "f.jsonl").write_text(text)
        with pytest.raises(CorsaError, match=r"holds one JSON list.*call it \.json"):
            read("file", str(tmp_path / "f.jsonl"))


# -- formats from elsewhere -----------------------------------------------------------------------------------------

EASYEDIT = {
    "case_id": 0,
    "prompt": "Northfield is led by",
    "target_new": "Ada Lind",
    "subject": "Northfield",
    "ground_truth": ["Cy Moss", "C. Moss"],
    "rephrase_prompt": "The head of Northfield is",
    "locality_prompt": "nq question: who leads Southfield",
    "locality_ground_truth": "Di Roe",
    "portability_prompt": "x",
}
KNOWEDIT = {
    "subject": "Northfield",
    "prompt": "Northfield is led by",
    "target_new": "Ada Lind",
    "ground_truth": "Cy Moss",
    "rephrase_prompt": ["The head of Northfield is", "Who heads Northfield?"],
    "portability": {"Reasoning": [{"prompt": "Where was its head born?", "ground_truth": [["Vestby"]]}]},
    "locality": {
        "Relation_Specificity": [{"prompt": "Northfield lies in", "ground_truth": [["Norland", "the North"]]}],
        "Forgetfulness": [{"prompt": "Its twin is", "ground_truth": [[""]]}],
    },
}
UNKE = {"question": "What does Northfield do?", "answer": "It sells boats.", "para_question": "Northfield does what?"}
WIKI = {
    "tag": "new",
    "subject": "Northfield",
    "update": "Who leads Northfield?",
    "rephrase": "Northfield is led by whom?",
}
WIKI |= {"personas": "Mate, who leads Northfield?", "ans": "Ada Lind", "rel": "head", "mhop": "x", "mhop_ans": "y"}
WIKI |= {"loc": "Who leads Southfield?", "loc_ans": "Di Roe"}


def test_easyedit_and_knowedit_are_read(tmp_path: Path) -> None:
    (edit,) = read("file", written(tmp_path / "e.json", EASYEDIT)).edits
    assert (edit.prompt, edit.subject) == ("Northfield is led by", "Northfield")
    assert (edit.target_new, edit.target_old, edit.aliases_old) == ("Ada Lind", "Cy Moss", ("C. Moss",))
    assert wordings(edit) == ["The head of Northfield is"]
    assert [(p.prompts, p.answer) for p in edit.probes if p.kind == "neighbor"] == [
        (("who leads Southfield",), "Di Roe")
    ]
    (edit,) = read("file", written(tmp_path / "k.json", KNOWEDIT)).edits
    assert wordings(edit) == ["The head of Northfield is", "Who heads Northfield?"]
    (neighbor,) = [probe for probe in edit.probes if probe.kind == "neighbor"]
    assert (neighbor.prompts, neighbor.answer, neighbor.aliases) == (("Northfield lies in",), "Norland", ("the North",))
    # EasyEdit writes an end token for an unknown answer.
    path = written(tmp_path / "n.jsonl", EASYEDIT | {"ground_truth": "<|endoftext|>"})
    assert drafts_of(path)[0].fields["target_old"] == ""
    with pytest.raises(CorsaError, match="line 1: target_old: is missing"):
        read("file", path)
    with pytest.raises(CorsaError, match="line 1: target_new: is not a string but 5"):
        read("file", written(tmp_path / "n.jsonl", EASYEDIT | {"target_new": 5}))


def test_unke_and_wikibigedit_are_read(tmp_path: Path) -> None:
    (draft,) = drafts_of(written(tmp_path / "u.json", UNKE | {"sub_question": ["a"], "sub_answer": ["b"]}))
    known = {name: draft.fields[name] for name in ("prompt", "target_new", "target_old", "paraphrases")}
    assert known == {
        "prompt": "What does Northfield do?",
        "target_new": "It sells boats.",
        "target_old": "",
        "paraphrases": ["Northfield does what?"],
    }
    (draft,) = drafts_of(written(tmp_path / "w.json", WIKI))
    assert (draft.fields["prompt"], draft.fields["target_new"]) == ("Who leads Northfield?", "Ada Lind")
    assert draft.fields["paraphrases"] == ["Northfield is led by whom?", "Mate, who leads Northfield?"]
    assert draft.fields["neighbors"] == [("Who leads Southfield?", "Di Roe", [])]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"case_id": 0, "requested_rewrite": {}, "para_add_prompts": [], "neighborhood_prompts": []},
            "PEAK.*target_true.str -> target_old",
        ),
        ({"case_id": 0, "requested_rewrite": {}, "x": 1}, "relative of CounterFact.*-> target_new"),
        ({"example_type": "popular", "edit": {}, "Relation_Specificity": []}, "RippleEdits.*edit.prompt.*-> prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen -> target_new, rejected -> target_old"),
        ({"question": "a", "answer": "b"}, "question -> prompt, answer -> target_new.*corsa edit"),
        ({"instruction": "a", "output": "b"}, "instruction -> prompt"),
        ({"task_id": 1, "prompt": "x", "entry_point": "f", "canonical_solution": "y", "test": "z"}, "code_update.py"),
        ({"src": "a", "alt": "b", "answers": ["c"]}, "benchmark 'zsre'"),
    ],
)
def test_other_formats_are_named_with_their_mapping(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = written(tmp_path / "f.json", record)
    for reader in (drafts_of, lambda path: read("file", path), lambda path: read("atoke", path)):
        with pytest.raises(CorsaError, match=f"this looks like .*{message}"):
            reader(path)


def test_a_format_of_edits_is_named_where_a_benchmark_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(
        CorsaError, match=r"EasyEdit and KnowEdit: read it with --benchmark file: .*ground_truth -> target_old"
    ):
        read("counterfact", written(tmp_path / "f.json", KNOWEDIT))


def test_columns_that_are_unknown_are_named_all_at_once(tmp_path: Path) -> None:
    row = {"frage": "Who?", "neu": "a", "alt": "b"}
    with pytest.raises(
        CorsaError, match="columns: frage, neu, alt are unknown and prompt, target_new missing; known are prompt,"
    ):
        drafts_of(written(tmp_path / "f.jsonl", row))


# -- one verdict, all faults ----------------------------------------------------------------------------------------


def test_all_bad_records_are_counted_and_the_first_few_shown(tmp_path: Path) -> None:
    rows = [fact(), *({"prompt": f"Who {i}?"} for i in range(6)), fact(prompt="Why?")]
    path = written(tmp_path / "f.jsonl", *rows)
    for reader in (drafts_of, lambda path: read("file", path)):
        with pytest.raises(
            CorsaError, match=r"line 2: target_new: is missing.*\(6 bad.*line 3: .*line 5: .*and 2 more"
        ) as caught:
            reader(path)
        assert "line 6" not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("other", [{}, {"target_new": "Di"}, {"prompt": "who leads  Acme"}])
def test_a_question_that_is_given_twice_is_refused_by_every_reader(tmp_path: Path, other: dict[str, str]) -> None:
    path = written(tmp_path / "f.jsonl", fact(), fact(**other))
    for reader in (drafts_of, lambda path: read("file", path)):
        with pytest.raises(CorsaError):
            reader(path)


def test_without_an_old_answer_the_command_that_asks_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "f.jsonl", {"prompt": "Who?", "target_new": "Bo"})
    assert len(drafts_of(path)) == 1
    with pytest.raises(CorsaError, match=r"line 1: target_old: is missing.*`corsa edit` needs none"):
        read("file", path)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (fact(), "one record: give a list of records"),
        ([fact(), "Who?"], r"record \[1\]: is no record but 'Who\?'"),
        ([fact(), fact(target_new="")], r"^the facts given, record \[1\]: target_new: is blank"),
        ([fact(prompt={1, 2})], r"record \[0\]: .*not JSON serializable"),
        (5, "are int: give a path, or a list of records"),
        (None, "are NoneType"),
        ([], "^the facts given is empty"),
    ],
)
def test_faults_of_facts_from_a_program_name_no_file(facts: Any, message: str) -> None:
    with pytest.raises(CorsaError, match=message) as caught:
        load_edits(facts)
    assert "/" not in str(caught.value)


def test_tables_from_a_program_are_named() -> None:
    import datasets
    import pandas as pd

    rows = [fact()]
    frame: Any = pd.DataFrame(rows)
    assert load_edits(frame.to_dict("records"))[0].target_new == "Bo Lind"
    with pytest.raises(CorsaError, match="to_dict"):
        load_edits(frame)
    split = datasets.Dataset.from_list(rows)
    splits: Any = datasets.DatasetDict({"train": split})
    assert load_edits(split)[0].target_new == "Bo Lind"
    with pytest.raises(CorsaError, match="choose one split"):
        load_edits(splits)


def test_an_absent_file_is_named_as_what_it_is() -> None:
    with pytest.raises(CorsaError, match=r"no\.jsonl does not exist; --data takes the path of a file of facts"):
        load_edits("no.jsonl")
