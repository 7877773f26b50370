"""The Edit record: refused values, omitted values, and the round trip through Parquet."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from corsa.data.edit import EDIT_SCHEMA, Edit, FieldError, from_table, to_table
from corsa.errors import CorsaError

FACT: dict[str, Any] = {"id": "x/1", "prompt": "Who leads Acme?", "target_new": "Bo Berg", "target_old": "Al Ahn"}


def chain() -> list[Edit]:
    """Two updates of one fact with every kind of probe, and a plain fact with unusual characters."""
    return [
        Edit.build(
            id="x/a/1",
            chain="x/a",
            prompt="Who leads Acme?",
            subject="Acme",
            relation="chief",
            target_new="Bo Berg",
            target_old="Al Ahn",
            aliases_new=["B. Berg"],
            aliases_old=["A. Ahn", "Ahn"],
            paraphrases=["Acme is led by", "Who is Acme's chief?"],
            neighbors=[("Who leads Umbrella?", "Di Dahl", ["D. Dahl"]), ("Who leads Initech?", "Ed Eng", [])],
            history=["Who led Acme before?"],
        ),
        Edit.build(id="x/a/2", chain="x/a", round=2, prompt="Who leads Acme?", target_new="Cy", target_old="Bo Berg"),
        Edit.build(id="x/b", prompt='"Ö {} |\n,', target_new="東京", target_old="大阪"),
    ]


def test_build_makes_the_probes() -> None:
    edit = chain()[0]
    assert [probe.kind for probe in edit.probes] == ["edit", "paraphrase", "neighbor", "neighbor", "history"]
    asked, paraphrase, neighbor, _, history = edit.probes
    assert asked.prompts == ("Who leads Acme?",)
    assert (asked.answer, asked.aliases) == ("Bo Berg", ("B. Berg",))
    assert paraphrase.prompts == ("Acme is led by", "Who is Acme's chief?")
    assert paraphrase.answer == "Bo Berg"
    assert (neighbor.answer, neighbor.aliases) == ("Di Dahl", ("D. Dahl",))
    assert (history.answer, history.aliases) == ("Al Ahn", ("A. Ahn", "Ahn"))


def test_a_fact_without_a_chain_is_its_own_chain() -> None:
    edit = Edit.build(**FACT)
    assert (edit.chain, edit.round) == ("x/1", 1)


def test_text_is_stripped() -> None:
    edit = Edit.build(**{**FACT, "prompt": "  Who?\n", "target_new": " Bo "})
    assert (edit.prompt, edit.target_new, edit.probes[0].answer) == ("Who?", "Bo", "Bo")


def test_ambiguous_and_blank_aliases_are_left_out() -> None:
    edit = Edit.build(**FACT, aliases_new=["", " ", "bo  berg", "Boss", "Al Ahn", "B", "b"], aliases_old=["BOSS", "A"])
    assert edit.aliases_new == ("B",)
    assert edit.aliases_old == ("A",)


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"prompt": " "}, "prompt", "is blank"),
        ({"target_new": ""}, "target_new", "is blank"),
        ({"target_old": "\n"}, "target_old", "is blank"),
        ({"target_old": " bo   BERG"}, "target_old", "is the same as target_new"),
        ({"paraphrases": ["Who?", 3]}, "prompts.1", "is not a string but 3"),
        ({"round": 0}, "round", "greater than or equal to 1"),
    ],
)
def test_build_names_field_and_reason(change: dict, field: str, reason: str) -> None:
    with pytest.raises(FieldError) as caught:
        Edit.build(**{**FACT, **change})
    assert caught.value.field == field
    assert reason in caught.value.reason
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_edit_is_frozen_and_refuses_unknown_fields() -> None:
    edit = Edit.build(**FACT)
    with pytest.raises(ValidationError, match="frozen"):
        edit.prompt = "other"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Edit.model_validate({**edit.model_dump(), "targt_new": "x"})


def test_round_trip_through_parquet(tmp_path: Path) -> None:
    edits = chain()
    table = to_table(edits)
    assert table.schema == EDIT_SCHEMA
    pq.write_table(table, tmp_path / "edits.parquet")
    assert from_table(pq.read_table(tmp_path / "edits.parquet")) == edits
    assert from_table(to_table([])) == []


def test_a_table_with_more_columns_and_large_strings_is_read() -> None:
    table = to_table(chain()).append_column("reference", pa.array([0.5, 1.0, 2.0]))
    place = table.schema.get_field_index("id")
    table = table.set_column(place, "id", table["id"].cast(pa.large_string()))
    assert from_table(table) == chain()


def test_a_table_that_is_not_of_edits_is_refused() -> None:
    with pytest.raises(CorsaError, match="column 'probes' is missing"):
        from_table(to_table(chain()).drop_columns(["probes"]))
    with pytest.raises(CorsaError, match="not a table of edits"):
        from_table(to_table(chain()).set_column(2, "round", pa.array(["one", "two", "three"])))
    with pytest.raises(CorsaError, match="row 1 of the table of edits: round"):
        from_table(to_table(chain()).set_column(2, "round", pa.array([1, 0, 1], pa.int32())))
