"""MQuAKE: cases of edits with multi-hop questions, repeated edits and contradicting edits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_records import PUBLISHED

from corsa.config.steps import RoundsConfig
from corsa.data.benchmarks import read
from corsa.data.schedule import assign
from corsa.errors import CorsaError


def rewrite(subject: str, new: str, old: str = "Oldland", flat: bool = False) -> dict[str, Any]:
    targets = {"target_new": {"str": new}, "target_true": {"str": old}}
    if flat:
        targets = {"target_new_str": new, "target_true_str": old}
    return {
        "prompt": "{} is a citizen of",
        "relation_id": "P27",
        "subject": subject,
        "question": f"What is the country of citizenship of {subject}?",
        **targets,
    }


def case(number: int, *rewrites: dict[str, Any]) -> dict[str, Any]:
    hops = [{"question": r["question"], "cloze": "", "answer": "x", "answer_alias": ["the Old"]} for r in rewrites]
    new_hops = [h | {"answer_alias": ["the New"]} for h in hops]
    return {
        "case_id": number,
        "requested_rewrite": list(rewrites),
        "questions": [f"Who rules the country of case {number}?", f"Whose rule is case {number} under?"],
        "answer": "Old Ruler",
        "new_answer": f"Ruler {number}",
        "new_answer_alias": ["", f"R{number}"],
        "single_hops": hops,
        "new_single_hops": new_hops,
    }


def written(folder: Path, *cases: dict[str, Any]) -> str:
    path = folder / "mquake.json"
    path.write_text(json.dumps(cases))
    return str(path)


@pytest.mark.parametrize("flat", [False, True], ids=["original", "remastered"])
def test_a_case_is_its_edits_and_one_multi_hop_probe(tmp_path: Path, flat: bool) -> None:
    edits = read(
        "mquake", written(tmp_path, case(7, rewrite("Ann", "A", flat=flat), rewrite("Bob", "B", flat=flat)))
    ).edits
    assert [e.id for e in edits] == ["mquake/7/1", "mquake/7/2"]
    assert {e.case for e in edits} == {"mquake/7"}
    first, last = edits
    assert (first.prompt, first.target_new, first.target_old) == ("Ann is a citizen of", "A", "Oldland")
    assert (first.aliases_new, first.aliases_old) == (("the New",), ("the Old",))
    assert [p.kind for p in first.probes] == ["edit", "paraphrase"]
    assert first.probes[1].prompts == ("What is the country of citizenship of Ann?",)
    multihop = last.probes[-1]
    assert multihop.kind == "multihop"
    assert (multihop.answer, multihop.aliases, len(multihop.prompts)) == ("Ruler 7", ("R7",), 2)


def test_an_edit_that_returns_is_taught_once_and_asks_for_both_cases(tmp_path: Path) -> None:
    data = written(tmp_path, case(1, rewrite("Ann", "A")), case(2, rewrite("Ann", "A")), case(3, rewrite("Bob", "B")))
    edits = read("mquake", data).edits
    assert [e.id for e in edits] == ["mquake/1/1", "mquake/3/1"]
    assert [p.answer for p in edits[0].probes if p.kind == "multihop"] == ["Ruler 1", "Ruler 2"]
    assert [p.kind for p in edits[0].probes].count("edit") == 1


def test_limits_count_cases_and_the_papers_protocol_takes_the_first_edit(tmp_path: Path) -> None:
    cases = [case(n, rewrite(f"Ann {n}", "A"), rewrite(f"Bob {n}", "B")) for n in range(4)]
    data = written(tmp_path, *cases)
    assert len(read("mquake", data, limit=2, offset=1).edits) == 4
    alone = read("mquake", data, whole_cases=False).edits
    assert [e.subject for e in alone] == ["Ann 0", "Ann 1", "Ann 2", "Ann 3"]
    assert not any(p.kind == "multihop" for e in alone for p in e.probes)


def test_a_case_is_never_cut_between_rounds(tmp_path: Path) -> None:
    cases = [case(n, *(rewrite(f"Ann {n}.{i}", "A") for i in range(3))) for n in range(4)]
    edits = read("mquake", written(tmp_path, *cases)).edits
    rows = assign(edits, RoundsConfig(rounds=3)).to_pylist()
    rounds = {row["edit"].rsplit("/", 1)[0]: set() for row in rows}
    for row in rows:
        rounds[row["edit"].rsplit("/", 1)[0]].add(row["learnt"])
    assert all(len(found) == 1 for found in rounds.values())
    assert {row["learnt"] for row in rows} == {1, 2, 3}


def test_contradictions_are_reported_refused_or_the_first_is_kept(tmp_path: Path) -> None:
    later = case(3, rewrite("Ann", "Z"), rewrite("Cyd", "C"))
    data = written(tmp_path, case(1, rewrite("Ann", "A")), case(2, rewrite("Bob", "B")), later)
    found = read("mquake", data)
    assert len(found.edits) == 4
    assert [str(c) for c in found.contradictions] == [
        "'Ann is a citizen of' is taught 'A' (mquake/1/1) and 'Z' (mquake/3/1)"
    ]
    kept = read("mquake", data, on_contradiction="keep-first")
    assert [e.id for e in kept.edits] == ["mquake/1/1", "mquake/2/1"], (
        "a case goes whole: its questions rest on all of it"
    )
    with pytest.raises(CorsaError, match=r"\(1 such in all\): correct the data, or pass --on-contradiction keep-first"):
        read("mquake", data, on_contradiction="refuse")


def test_a_persons_own_file_is_looked_through_as_well(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    rows = [{"prompt": "Who leads Acme?", "target_new": new, "target_old": "Cy"} for new in ("Al", "Bo")]
    path.write_text("".join(json.dumps(row | {"id": str(i)}) + "\n" for i, row in enumerate(rows)))
    assert len(read("file", str(path), on_contradiction="report").contradictions) == 1
    with pytest.raises(CorsaError, match=r"is taught 'Al' \(0\) and 'Bo' \(1\)"):  # as `corsa edit` refuses it
        read("file", str(path))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("single_hops", [], "single_hops: is missing: a case has its single hops"),
        ("new_single_hops", None, "new_single_hops: is missing"),
        ("questions", [], "questions: is missing: there is no multi-hop question"),
        ("requested_rewrite", [], "requested_rewrite: is missing: there is no edit"),
        ("new_answer", "", "new_answer: is missing"),
        ("case_id", None, "case_id: is missing"),
    ],
)
def test_a_case_that_lacks_something_is_a_bad_record(tmp_path: Path, field: str, value: Any, reason: str) -> None:
    good = case(1, rewrite("Ann", "A"))
    bad = copy.deepcopy(case(2, rewrite("Bob", "B"))) | {field: value}
    data = written(tmp_path, good, bad)
    found = read("mquake", data)
    assert len(found.edits) == 1
    assert reason in str(found.skipped[0])
    with pytest.raises(CorsaError, match=field):
        read("mquake", data, on_bad_record="stop")


def test_the_published_file() -> None:
    path = PUBLISHED / "mquake" / "MQuAKE-CF-3k.json"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    found = read("mquake", str(path))
    assert not found.skipped
    assert len(found.contradictions) == 22
    assert sum(p.kind == "multihop" for e in found.edits for p in e.probes) == 1392
    assert len(found.edits) == 1289 + 22  # every fact once, and the second answer of facts that have two
