"""Repeated questions among all facts taught together; and the files of ../shared/cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fact_files import case, fact, wordings, written
from test_mquake import case as mquake_case
from test_mquake import rewrite
from test_mquake import written as cases_file

from corsa.data.benchmarks import read
from corsa.data.benchmarks.cases import asked_once
from corsa.data.benchmarks.file import drafts_of
from corsa.data.edit import Edit
from corsa.errors import CorsaError


def built(id: str, prompt: str, new: str = "Bo", **more: Any) -> Edit:
    return Edit.build(id=id, prompt=prompt, target_new=new, target_old="Al", **more)


def test_a_taught_wording_is_no_paraphrase_and_a_repeated_one_is_asked_once() -> None:
    first = built(
        "a", "Who leads Acme?", paraphrases=["who leads ACME", "Acme is led by", "Acme is led by:", "Its head?"]
    )
    second = built("b", "Acme's chief is", paraphrases=["Who leads Acme?", "Its head?"], history=["Before?", "before"])
    edits, repeats = asked_once([first, second])
    assert wordings(edits[0]) == ["Acme is led by", "Its head?"]
    assert [probe.kind for probe in edits[1].probes] == ["edit", "history"]
    assert (repeats.taught, repeats.repeated, repeats.neighbors) == (2, 3, 0)
    assert all(wordings(edit, "edit") == [edit.prompt] for edit in edits)


def test_another_answer_to_the_same_wording_is_asked_as_well() -> None:
    edits, repeats = asked_once([built("a", "A?", "Bo", paraphrases=["x"]), built("b", "B?", "Di", paraphrases=["x"])])
    assert [wordings(edit) for edit in edits] == [["x"], ["x"]]
    assert not any(repeats)


def test_a_neighbor_belongs_to_the_first_fact_that_has_it() -> None:
    shared, own, taught = ("Who leads Umbrella?", "Di", ()), ("Who leads Initech?", "Ed", ()), ("B?", "Fy", ())
    chain = [
        built(f"a/{r}", "A?", new, chain="a", round=r, neighbors=[shared, taught]) for r, new in ((1, "Bo"), (2, "Cy"))
    ]
    edits, repeats = asked_once([*chain, built("b", "B?", neighbors=[shared, own, own])])
    assert [wordings(edit, "neighbor") for edit in edits] == [[shared[0]], [shared[0]], [own[0]]]
    assert repeats.neighbors == 4
    later, repeats = asked_once([built("c", "C?", neighbors=[shared, own])], before=edits)
    assert [wordings(edit, "neighbor") for edit in later] == [[]]
    assert repeats.neighbors == 2


def test_the_counts_are_in_the_record_of_the_step(tmp_path: Path) -> None:
    from corsa.config.steps import EditsConfig, EditsPlace
    from corsa.data.benchmarks import digest
    from corsa.data.benchmarks.cases import told
    from corsa.experiments.kinds import EDITS
    from corsa.experiments.steps import read_edits
    from corsa.flow import Step, Store, Task

    path = written(tmp_path / "f.jsonl", fact(paraphrases=["Who leads Acme", "x", "X"]))
    how = {"on_bad_record": "stop", "on_contradiction": "refuse", "whole_cases": True}
    config = EditsConfig.model_validate({"benchmark": "file", "digest": digest("file", path), **how})
    task = Task(Step("edits/file", EDITS, config, placement=EditsPlace(data=path)), Store(tmp_path / "runs"))
    record = read_edits(task)
    assert (record["not_asked_taught"], record["not_asked_repeated"], record["not_asked_neighbors"]) == (1, 1, 0)
    assert told(record).startswith("1 paraphrases that are a taught question count as edit prompts; 1 wordings")
    assert told({"edits": 3}) == ""


def test_a_wording_counts_once_in_a_case_and_a_case_once(tmp_path: Path) -> None:
    first = mquake_case(1, rewrite("Ann", "A"))
    first["questions"] = ["Who rules it?", "who rules it", "Whose rule is it under?"]
    again = {**mquake_case(2, rewrite("Ann", "A")), "new_answer": "ruler 1", "questions": first["questions"][::-1]}
    other = {**mquake_case(3, rewrite("Bob", "B")), "new_answer": "R1", "new_answer_alias": ["Ruler 1"]}
    other["questions"] = ["Who rules it?", "Who else?"]
    found = read("mquake", cases_file(tmp_path, first, again, other))
    assert [wordings(edit, "multihop") for edit in found.edits] == [
        ["Who rules it?", "Whose rule is it under?"],
        ["Who rules it?", "Who else?"],
    ]
    assert found.repeats.repeated == 4  # one in the first case, one in the second, and the other two of the second
    assert found.contradictions == []


def test_one_multi_hop_question_with_two_answers_is_a_contradiction(tmp_path: Path) -> None:
    cases = [mquake_case(n, rewrite(name, "A")) for n, name in enumerate(("Ann", "Bob", "Cyd"))]
    for number in (0, 1):
        cases[number]["questions"] = ["Who rules it?", f"Who {number}?"]
    data = cases_file(tmp_path, *cases)
    found = read("mquake", data)
    assert [str(c) for c in found.contradictions] == [
        "'Who rules it?' is asked for 'Ruler 0' (mquake/0/1) and 'Ruler 1' (mquake/1/1)"
    ]
    assert len(found.edits) == 3
    kept = read("mquake", data, on_contradiction="keep-first").edits
    assert [edit.case for edit in kept] == ["mquake/0", "mquake/2"]
    with pytest.raises(CorsaError, match="is asked for"):
        read("mquake", data, on_contradiction="refuse")


# -- the shared cases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jsonlist", "bar"])
def test_shared_list_cells(name: str) -> None:
    (edit,) = read("file", case(f"csv_list_cell/{name}.csv")).edits
    assert edit.aliases_new == ("Bob Lind", "B. Lind")
    assert len(wordings(edit)) == 2


def test_shared_files_that_are_refused() -> None:
    for name, message in {
        "csv_list_cell/pylist.csv": "paraphrases: is a Python list",
        "unicode_forms/facts.jsonl": "line 2: target_old: is the same as target_new",
        "data_vs_pipeline/twice.jsonl": "(?i)who leads A",
        "foreign_format/peak.json": "PEAK",
        "dry_run_wrong_file/facts.xlsx": "unknown kind of file",
    }.items():
        for reader in (drafts_of, lambda path: read("file", path)):
            with pytest.raises(CorsaError, match=message):
                reader(case(name))


def test_shared_files_that_are_read() -> None:
    (edit,) = read("file", case("semicolon_csv/semi_comma.csv")).edits
    assert (edit.target_new, edit.target_old) == ("1,5 euros", "2,5 euros")
    (edit,) = read("file", case("foreign_format/easyedit.json")).edits
    assert (edit.target_old, wordings(edit), len(wordings(edit, "neighbor"))) == (
        "Cy Moss",
        ["The head of Northfield is"],
        1,
    )


def test_shared_multi_hop_questions() -> None:
    within = read("mquake", case("repeated_multihop_question/repeat_within.json"))
    assert len(wordings(within.edits[0], "multihop")) == 2
    assert within.repeats.repeated == 1
    across = read("mquake", case("repeated_multihop_question/repeat_across.json"))
    records = json.loads(Path(case("repeated_multihop_question/repeat_across.json")).read_text())
    answers = {record["new_answer"] for record in records}
    assert len(answers) == 2
    assert {c.question for c in across.contradictions} == set(records[0]["questions"])
    assert all(set(c.answers) == answers for c in across.contradictions)
