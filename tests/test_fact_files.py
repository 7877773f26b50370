"""Accepted files: kinds, cells, characters, formats; and repeated questions.

The files are invented. Those of ../shared/cases are read if they are available.
"""

from __future__ import annotations

import time
import unicodedata
from pathlib import Path

import pytest
from fact_files import fact, table, wordings, written

from corsa.api import load_edits
from corsa.data.benchmarks import read
from corsa.data.benchmarks.file import drafts_of
from corsa.data.benchmarks.files import regular, stem
from corsa.data.edit import Edit, FieldError
from corsa.data.text import bare, composed, fault, folded, same_text, templated
from corsa.errors import CorsaError
from corsa.evaluation.matching import matches

# -- cells of a table -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        ('["A is led by", "Who heads A?"]', ["A is led by", "Who heads A?"]),
        (' [ "A is led by" , "Who, of A|B?" ] ', ["A is led by", "Who, of A|B?"]),
        ("A is led by|Who heads A?", ["A is led by", "Who heads A?"]),
        ("A is led by | Who heads A?", ["A is led by", "Who heads A?"]),
        ("A is led by |Who heads A?|", ["A is led by", "Who heads A?"]),
        ("[sic] Who heads A?", ["[sic] Who heads A?"]),
        ("The head (of A)", ["The head (of A)"]),
        ("A is led by\uff5cWho heads A?", ["A is led by", "Who heads A?"]),
        ('"A is led by"', ["A is led by"]),  # json.dumps of a string, of None and of pandas' missing value
        ("null", []),
        ("NaN", []),
        ("[]", []),
        ("", []),
    ],
)
def test_a_cell_is_a_list(tmp_path: Path, cell: str, items: list[str]) -> None:
    row = fact(prompt="Who?", paraphrases=cell, aliases_new=cell)
    path = table(tmp_path / "facts.csv", row)
    for edit in (read("file", path).edits[0], read("file", written(tmp_path / "facts.jsonl", row)).edits[0]):
        assert wordings(edit) == items
        assert list(edit.aliases_new) == items


@pytest.mark.parametrize(
    "cell",
    [
        "['A is led by', 'Who heads A?']",
        "('A is led by', 'x')",
        "{'A'}",
        "['A' 'B']",
        "[\"it's\", 'b']",
        "['a', None]",
        "array(['A is led by', 'Who heads A?'], dtype=object)",
        "frozenset({'A', 'B'})",
    ],
)
@pytest.mark.parametrize("column", ["paraphrases", "aliases_new", "aliases_old"])
def test_a_python_list_is_refused_by_name(tmp_path: Path, cell: str, column: str) -> None:
    for path in (
        table(tmp_path / "f.csv", fact(**{column: cell})),
        written(tmp_path / "f.jsonl", fact(**{column: cell})),
    ):
        with pytest.raises(CorsaError, match=rf"{column}: is a Python list.*json\.dumps.*a \| b"):
            read("file", path)


def test_a_file_at_an_address_is_read_under_its_own_name(tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text('{"prompt": "Who leads Acme?", "target_new": "Ada Byron"}\n')
    found = regular(f"file://{file}")
    assert (stem(found), found.read_bytes(), found.parent == tmp_path) == ("facts", file.read_bytes(), False)
    file.write_text("{")
    assert regular(f"file://{file}") == found  # it is fetched once
    with pytest.raises(CorsaError, match=f"file://{tmp_path}/none.jsonl does not exist"):
        regular(f"file://{tmp_path}/none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"target_new": "x"}\n')
    with pytest.raises(CorsaError, match=f"file://{tmp_path}/bad.jsonl, line 1: prompt: is missing"):
        drafts_of(regular(f"file://{tmp_path}/bad.jsonl"))


def test_a_list_in_brackets_that_is_no_json_is_refused(tmp_path: Path) -> None:
    for cell in ("[A is led by, Who heads A?]", "[A is led by | Who heads A?]", '["A is led by", ]'):
        with pytest.raises(CorsaError, match=r"paraphrases: .*no JSON.*json\.dumps"):
            read("file", table(tmp_path / "f.csv", fact(paraphrases=cell)))


def test_neighbors_as_python_writes_them_are_refused_by_name(tmp_path: Path) -> None:
    path = table(tmp_path / "f.csv", fact(neighbors="[{'prompt': 'Who?', 'answer': 'x'}]"))
    with pytest.raises(CorsaError, match=r"neighbors: is a Python list.*json\.dumps"):
        read("file", path)


@pytest.mark.parametrize(
    ("column", "cell", "reason"),
    [
        ("neighbors", '[{"prompt": "Who?", "answer": "x", "answer": "y"}]', "answer is given twice"),
        ("paraphrases", '[{"a": 1, "a": 2}]', "a is given twice"),
        ("aliases_new", '{"a": "b"}', "is not a list"),
        ("paraphrases", "[\"a\", \"['b', 'c']\"]", r"paraphrases\[1\]: is a list in a list"),
    ],
)
def test_a_cell_of_json_is_checked_as_a_file_is(tmp_path: Path, column: str, cell: str, reason: str) -> None:
    with pytest.raises(CorsaError, match=reason):
        read("file", table(tmp_path / "f.csv", fact(**{column: cell})))


def test_missing_values_that_json_dumps_writes_are_no_questions(tmp_path: Path) -> None:
    """pandas: df[column].map(json.dumps), the remedy for a Python list, writes NaN for a missing value."""
    near = '[{"prompt": "Who?", "answer": "x"}]'
    rows = [fact(neighbors=near, paraphrases='["p"]'), fact(prompt="2?", neighbors="NaN", paraphrases="NaN")]
    one, two = read("file", table(tmp_path / "f.csv", *rows)).edits
    assert (len(one.probes), len(two.probes)) == (3, 1)


FOREIGN = {
    "easyedit": {"prompt": "Who?", "target_new": "Bo", "ground_truth": "Cy", "rephrase_prompt": "Whom?"},
    "unke": {"question": "Who?", "answer": "Bo", "para_question": "Whom?", "sub_question": "Why?"},
    "wikibigedit": {"update": "Who?", "subject": "A", "ans": "Bo", "rephrase": "Whom?", "loc": "Near?", "loc_ans": "x"},
}


@pytest.mark.parametrize(
    ("name", "column", "field"),
    [
        ("easyedit", "target_new", "target_new"),
        ("easyedit", "ground_truth", "target_old"),
        ("easyedit", "rephrase_prompt", "paraphrases"),
        ("unke", "answer", "target_new"),
        ("unke", "para_question", "paraphrases"),
        ("wikibigedit", "ans", "target_new"),
        ("wikibigedit", "rephrase", "paraphrases"),
        ("wikibigedit", "loc_ans", "neighbors"),
    ],
)
def test_cells_of_foreign_formats_are_lists_too(tmp_path: Path, name: str, column: str, field: str) -> None:
    with pytest.raises(CorsaError, match=rf"{column}: is a Python list.*df\['{column}'\]"):
        drafts_of(table(tmp_path / "f.csv", {**FOREIGN[name], column: "['one', 'two']"}))
    (draft,) = drafts_of(table(tmp_path / "f.csv", {**FOREIGN[name], column: '["one", "two"]'}))
    found = draft.fields[field]
    if field == "paraphrases":
        assert found[:2] == ["one", "two"]
    elif field == "neighbors":
        assert found == [("Near?", "one", ["two"])]
    else:
        assert (found, draft.fields[f"aliases{field.removeprefix('target')}"]) == ("one", ["two"])


def test_localities_of_easyedit_in_a_cell(tmp_path: Path) -> None:
    row = {**FOREIGN["easyedit"], "portability": "{'a': 1}"}
    cell = '{"near": [{"prompt": "Near?", "ground_truth": ["x"]}]}'
    (draft,) = drafts_of(table(tmp_path / "f.csv", {**row, "locality": cell}))
    assert draft.fields["neighbors"] == [("Near?", "x", [])]
    with pytest.raises(CorsaError, match="locality: is a Python list"):
        drafts_of(table(tmp_path / "f.csv", {**row, "locality": cell.replace('"', "'")}))


def test_answers_of_zsre_in_a_cell(tmp_path: Path) -> None:
    row = {
        "src": "Who?",
        "alt": "Bo",
        "answers": '["Cy", "C. M."]',
        "rephrase": "Whom?",
        "loc": "Near?",
        "loc_ans": "x",
    }
    (edit,) = read("zsre", table(tmp_path / "z.csv", row)).edits
    assert (edit.target_old, edit.aliases_old) == ("Cy", ("C. M.",))
    with pytest.raises(CorsaError, match="answers: is a Python list"):
        read("zsre", table(tmp_path / "z.csv", row | {"answers": "['Cy', 'C. M.']"}))


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["facts.csv", "facts.tsv"])
def test_the_separator_is_found(tmp_path: Path, separator: str, name: str) -> None:
    row = fact(target_new="1,5; euros", target_old="2,5\teuros", paraphrases="a, b | c; d", subject="")
    (edit,) = read("file", table(tmp_path / name, row, separator=separator)).edits
    assert (edit.target_new, edit.target_old, wordings(edit)) == ("1,5; euros", "2,5\teuros", ["a, b", "c; d"])


def test_excels_first_line_and_a_header_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text(
        "\ufeffsep=;\r\n prompt ;target_new;target_old\r\nWho?;1,5;2,5\r\n;;\r\nWhy?;a\r\n", encoding="utf-8"
    )
    with pytest.raises(CorsaError, match=r"f\.csv, line 5: record: has 2 cells, the header 3; quote cells .*semicolon"):
        read("file", str(path))
    path.write_text("prompt|target_new|target_old\nWho?|a|b\n")
    with pytest.raises(
        CorsaError, match=r"one column alone, 'prompt.target_new.target_old'.*a comma, a semicolon or a tab"
    ):
        read("file", str(path))
    path.write_text(",prompt,target_new,target_old\n0,Who?,a,b\n")
    with pytest.raises(CorsaError, match=r"column 1 has no name.*index=False"):
        read("file", str(path))


# -- characters -----------------------------------------------------------------------------------------------------


def test_text_is_read_composed_and_compared_folded(tmp_path: Path) -> None:
    decomposed = fact(target_new="Zoe\u0308", prompt="Qui me\u0300ne\u00a0?", paraphrases=["Ze\u0301ro"])
    (edit,) = read("file", written(tmp_path / "f.jsonl", decomposed)).edits
    assert (edit.target_new, edit.prompt, wordings(edit)) == ("Zo\u00eb", "Qui m\u00e8ne\u00a0?", ["Z\u00e9ro"])
    assert drafts_of(tmp_path / "f.jsonl")[0].fields["target_new"] == "Zo\u00eb"
    assert Edit.build(id="a", prompt="p", target_new="e\u0301", target_old="b").target_new == "\u00e9"
    for text in ("Zoe\u0308", "\ufb01n", "\u1e9b\u0323", "\u0130stanbul", "\uff21\uff22", "\u03c2\u0345"):
        # the definition of compatibility caseless matching (Unicode, D146), on characters without quotes or blanks
        nfkd = unicodedata.normalize(
            "NFKD", unicodedata.normalize("NFKD", unicodedata.normalize("NFD", text).casefold()).casefold()
        )
        assert unicodedata.normalize("NFKD", folded(text)) == nfkd


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Zoe\u0308", "ZO\u00cb"),
        ("L\u2019Or\u00e9al", "l'or\u00e9al"),
        ("\u201cUp\u201d", '"up"'),
        ("\u00abUp\u00bb", '"Up"'),
        ("New\u00a0York", "New York"),
        ("10\u202fkm", "10 km"),
        ("Bo\u200bLind", "BoLind"),
        ("\ufb01nal", "FINAL"),
        ("\uff11\uff12", "12"),
        ("Stra\u00dfe", "STRASSE"),
        ("co\u2011op", "co-op"),
        ("1990\u20132000", "1990-2000"),
        ("\u22125 degrees", "-5 degrees"),
        ("Bo Lind.", "Bo Lind"),
        ("\u201cUp\u201d", "Up"),
        ("\u300c\u6771\u4eac\u300d", "\u6771\u4eac"),
    ],
)
def test_answers_that_differ_in_form_only_are_equal(tmp_path: Path, first: str, second: str) -> None:
    assert same_text(first, second)
    path = written(tmp_path / "f.jsonl", fact(target_new=first, target_old=second))
    for reader in (drafts_of, lambda path: read("file", path)):
        with pytest.raises(CorsaError, match="line 1: target_old: is the same as target_new"):
            reader(path)
    assert not same_text(first, second + "x")
    # Otherwise each output with the one would count as giving the other too.
    assert matches(first, (first, ()), (second, ()))[4:] == (True, True)


@pytest.mark.parametrize(("new", "old"), [("C", "C++"), (".NET", "NET"), ("5", "-5"), ("A+", "A"), ("10 km", "10 m")])
def test_answers_that_differ_in_more_than_form_are_taken(tmp_path: Path, new: str, old: str) -> None:
    path = written(tmp_path / "f.jsonl", fact(target_new=new, target_old=old))
    assert read("file", path).edits[0].target_old == old


def test_an_alias_that_is_the_other_answer_in_another_form_is_left_out() -> None:
    edit = Edit.build(
        id="a",
        prompt="Who?",
        target_new="Bo Lind",
        target_old="Cy Moss",
        aliases_new=["\u201cCy Moss\u201d", "B. L."],
        aliases_old=["B. L", "C. M."],
    )
    assert (edit.aliases_new, edit.aliases_old) == ((), ("C. M.",))


@pytest.mark.parametrize(
    "text", ["\u200b", "\u2060\ufeff", "\u00ad", "\u3164", "\u2800", "\u0301", "\0", "\ufe0f", "\u202e"]
)
@pytest.mark.parametrize("column", ["prompt", "target_new", "target_old"])
def test_what_nobody_can_see_is_no_text(tmp_path: Path, text: str, column: str) -> None:
    path = written(tmp_path / "f.jsonl", fact(**{column: text}))
    with pytest.raises(CorsaError, match=f"line 1: {column}: has no visible character"):
        read("file", path)
    with pytest.raises(FieldError, match="has no visible character"):
        Edit.build(**fact(id="a", **{column: text}))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Bo\0Lind", r"the control character U\+0000"),
        ("Bo\x1b[31m", r"the control character U\+001B"),
        ("Bo\x85", r"the control character U\+0085"),
        ("Bo\ud800", r"U\+D800, half of a character"),
        ("x" * 100_001, "has 100,001 characters, and 100,000 are the most"),
    ],
)
def test_what_is_no_plain_text_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(CorsaError, match=rf"line 1: target_new: .*{reason}"):
        read("file", written(tmp_path / "f.jsonl", fact(target_new=text)))
    with pytest.raises(CorsaError, match=rf"record \[0\]: .*{reason}"):
        load_edits([fact(target_new=text)])


def test_text_that_is_sound_stays(tmp_path: Path) -> None:
    for text in (
        "\u0646\u06cc\u200c\u0634\u0627\u0628\u0648\u0631",
        "\U0001f469\u200d\U0001f680",
        "\u6771\u4eac",
        "4",
        "a\tb\nc",
    ):
        assert fault(text) is None
        assert composed(text) == text
        assert read("file", written(tmp_path / "f.jsonl", fact(target_new=text))).edits[0].target_new == text
    assert composed("\u200b\ufeffBo\u00a0\u200b") == "Bo"
    assert bare("\u201cWho leads Acme\u00a0?\u201d") == bare("who leads acme")
    assert bare("?") == "?"


@pytest.mark.parametrize(
    "prompt",
    [
        "Q: Who leads Acme?\nA:",
        "Q: Who leads Acme?",
        "question : Who leads Acme?\nAnswer:",
        "Who leads Acme?\nA:",
        "Who leads Acme? Answer:",
        "<|im_start|>user\nWho leads Acme?<|im_end|>\n<|im_start|>assistant\n",
        "<s>[INST] Who leads Acme? [/INST]",
        "<start_of_turn>user\nWho leads Acme?<end_of_turn>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWho?",
        "### Instruction:\nWho leads Acme?\n\n### Response:",
        "Human: Who leads Acme?\n\nAssistant:",
        "Q\uff1aWho leads Acme?",
        "Q1: Who leads Acme?",
        "Q. Who leads Acme? A.",
        "**Q:** Who leads Acme? **A:**",
        "Who leads Acme?\n**Answer:**",
        "### Question:\nWho leads Acme?\n### Answer:",
        "Below is an instruction.\n\n### Instruction:\nWho leads Acme?\n\n### Response:",
        "Frage: Wer leitet Acme?\nAntwort:",
        "\u95ee\uff1a\u8c01\uff1f\u7b54\uff1a",
        "\u8c01\uff1f\u7b54\uff1a",
        "Who leads Acme? [/INST]",
    ],
)
def test_a_prompt_in_a_template_is_refused(tmp_path: Path, prompt: str) -> None:
    assert templated(prompt)
    for row in (
        fact(prompt=prompt),
        fact(paraphrases=["Who?", prompt]),
        fact(neighbors=[{"prompt": prompt, "answer": "x"}]),
    ):
        with pytest.raises(CorsaError, match=r"line 1: .*stands in a template already.*give the question alone"):
            read("file", written(tmp_path / "f.jsonl", row))


@pytest.mark.parametrize(
    "prompt",
    [
        "Who wrote Q & A?",
        "Vitamin A:",
        "The user: who is it?",
        "Acme was founded in",
        "Q",
        "Q. T. Smith was born in",
        "What does [INST] mean?",
        "What does <|im_start|> mean?",
        "Who leads Acme? The answer is",
        "Users: how many has Acme?",
        "Q1 2024 revenue was",
    ],
)
def test_a_prompt_that_is_none_stays(prompt: str) -> None:
    assert not templated(prompt)


def test_a_long_prompt_is_looked_at_in_little_time() -> None:
    """No part of the pattern takes time that grows with the square of the length."""
    started = time.monotonic()
    for text in ("a ", "\n", "? ", "*", "\n* ", "### "):
        assert not templated(text * (100_000 // len(text)) + "b")
    assert time.monotonic() - started < 3
