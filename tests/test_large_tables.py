"""Tables of any length: what a step keeps of them, and writes, grows with their rows and not faster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_run import predictions
from test_metrics import hand

from corsa.config.steps import Shown
from corsa.data.edit import BLOCK, Edit, EditTable, to_table
from corsa.evaluation import tallies
from corsa.evaluation.metrics import compute
from corsa.evaluation.prepared_predictions import parts
from corsa.experiments.reported import TEXTS, read_reported, reported, write_reported
from corsa.report import answers

CASES = {
    "revised facts and an evaluation set": lambda: hand(both=True),
    "several seeds and rounds": lambda: predictions(chains=4, rounds=2, wordings=1, seeds=2),
}


@pytest.mark.parametrize("table", CASES.values(), ids=CASES)
def test_metrics_of_parts_are_those_of_the_whole(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table()
    whole = compute(rows, taught_questions=True)
    seen: list[int] = []

    def watched(found: pd.DataFrame, units: int) -> Iterator[pd.DataFrame]:
        for part in parts(found, units):
            seen.append(part.chain.nunique())
            yield part

    monkeypatch.setattr(tallies, "parts", watched)
    monkeypatch.setattr(tallies, "UNITS", 1)
    assert json.dumps(compute(rows, taught_questions=True)) == json.dumps(whole)
    assert len(seen) == rows.chain.nunique() > 1  # a part holds one fact
    assert set(seen) == {1}


def test_metrics_of_coded_texts_are_those_of_texts() -> None:
    rows = hand()
    coded = rows.astype({name: "category" for name in TEXTS if name in rows})
    assert json.dumps(compute(coded)) == json.dumps(compute(rows))


def test_facts_of_one_case_are_in_one_part() -> None:
    rows = hand().assign(case=lambda table: table.chain.map({"A": "x", "B": "x"}).fillna(""))
    assert [sorted(part.chain.unique()) for part in parts(rows, 1)] == [["C"], ["A", "B"]]


def test_a_chain_with_edits_of_several_cases_is_in_one_part() -> None:
    rows = hand()
    rows["case"] = rows.edit.where(rows.chain == "C", "")
    (part,) = parts(rows, 1)
    assert len(part) == len(rows)


def edits(count: int) -> list[Edit]:
    return [Edit.build(id=f"x/{i}", prompt=f"Who is {i}?", target_new="Ada", target_old="Bob") for i in range(count)]


def test_edits_of_a_table_are_made_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    table = EditTable(to_table(edits(BLOCK + 3)))
    made: list[int] = []
    make = EditTable._made
    monkeypatch.setattr(EditTable, "_made", lambda self, places: made.append(len(places)) or make(self, places))
    assert [edit.id for edit in table] == [f"x/{i}" for i in range(BLOCK + 3)]
    assert made == [BLOCK, 3]
    chosen = table.only([5, 1])
    assert ([edit.id for edit in chosen], chosen[1].id, chosen.column("id")) == (["x/5", "x/1"], "x/1", ["x/5", "x/1"])
    assert table.only([9, 8, 7]).only([2])[0].id == "x/7"


def test_a_report_s_table_has_each_text_once_and_is_written_as_text(tmp_path: Path) -> None:
    rows = hand(both=True)
    rows.insert(0, "case", "")
    base, edited = rows[rows.method == "base"], rows[rows.method != "base"]
    for name, part in {"base": base, "lora": edited[edited.method == "lora"]}.items():
        pq.write_table(pa.Table.from_pandas(part.drop(columns="case"), preserve_index=False), tmp_path / name)
    schedule = pa.table({"edit": ["A/1", "B/1"], "learnt": [2, 1], "part": ["update", "evaluation"]})
    cases = pa.table({"edit": ["B/1"], "case": ["together"]})
    shown = [(tmp_path / name, Shown(answers=name, method=name)) for name in ("lora", "base")]
    table = reported(shown, schedule, cases)
    assert all(pa.types.is_dictionary(table.schema.field(name).type) for name in (*TEXTS, "case"))
    found = table.to_pandas()
    assert list(found.method.unique()) == ["base", "lora"]
    assert set(found.edit[found.method == "base"]) == {"A/1", "B/1"}  # C is not taught
    assert set(found.learnt[(found.method == "base") & (found.edit == "A/1")]) == {2}
    assert set(found["case"][found.edit == "B/1"]) == {"together"}
    assert len(found[found.method == "lora"]) == len(edited[edited.method == "lora"])
    write_reported(table, tmp_path / "predictions.parquet")
    assert not any(pa.types.is_dictionary(field.type) for field in pq.read_schema(tmp_path / "predictions.parquet"))
    again = read_reported(tmp_path / "predictions.parquet").to_pandas()
    pd.testing.assert_frame_equal(answers.text(again), answers.text(found))
    # the table of a report is read beside a step's, as that of the adapter that an update goes on from
    earlier = tmp_path / "predictions.parquet", Shown(answers="line", method="earlier")
    both = reported([earlier, *shown], schedule, cases).to_pandas()
    assert set(both["case"][(both.method == "earlier") & (both.edit == "B/1")]) == {"together"}
    assert len(both[both.method == "earlier"]) == len(found)


def test_a_page_shows_whole_facts_of_a_large_table(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = predictions()
    assert len(answers.sampled(rows)) == len(rows)
    few = answers.sampled(rows, len(rows) // 3)
    assert 0 < len(few) <= len(rows) // 3 + rows.groupby("chain").size().max()
    sizes = rows.groupby("chain").size()
    assert (few.groupby("chain").size() == sizes[few.chain.unique()].sort_index()).all()
    monkeypatch.setattr(answers.sampled, "__defaults__", (len(rows) // 3,))
    folded = answers.folded_answers({"run": (rows, "contains")})
    assert folded["rows"] < folded["of"] == (rows.method != "base").sum()
