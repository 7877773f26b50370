"""`corsa data --convert`: a file written in the project's form is read back as the same edits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_records import published
from fact_files import fact, written
from test_files import EASYEDIT, KNOWEDIT

from corsa.cli.main import main
from corsa.data.benchmarks import read
from corsa.data.edit import Edit

Capture = pytest.CaptureFixture[str]


def converted(tmp_path: Path, *arguments: str) -> Path:
    out = tmp_path / "out.jsonl"
    assert main(["data", *arguments, "--convert", str(out), "--show", "0"]) == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    return out


def told(edit: Edit) -> tuple[object, ...]:
    """All that the form has columns for."""
    probes = [probe for probe in edit.probes if probe.kind in ("edit", "paraphrase", "neighbor")]
    return (
        edit.id,
        edit.prompt,
        edit.subject,
        edit.target_new,
        edit.target_old,
        edit.aliases_new,
        edit.aliases_old,
        probes,
    )


@pytest.mark.usefixtures("encoder")
@pytest.mark.parametrize("record", [EASYEDIT, KNOWEDIT], ids=["easyedit", "knowedit"])
def test_a_foreign_format_is_the_same_facts_afterwards(record: dict[str, object], tmp_path: Path) -> None:
    source = written(tmp_path / "theirs.json", record)
    out = converted(tmp_path, source)
    (line,) = [json.loads(text) for text in out.read_text().splitlines()]
    assert line["prompt"] == "Northfield is led by"
    assert line["target_old"] == "Cy Moss"
    assert "portability" not in line
    assert [told(edit) for edit in read("file", str(out)).edits] == [told(edit) for edit in read("file", source).edits]


@pytest.mark.usefixtures("encoder")
@pytest.mark.parametrize(
    ("name", "file", "left_out"),
    [
        ("counterfact", "counterfact/counterfact.json", ""),
        ("mquake", "mquake/MQuAKE-CF-3k.json", "multihop questions have no column in this form and are left out"),
    ],
)
def test_a_benchmark_is_the_same_facts_afterwards(
    name: str, file: str, left_out: str, tmp_path: Path, capsys: Capture
) -> None:
    source = published(file)
    out = converted(tmp_path, source, "--benchmark", name, "--limit", "20")
    assert left_out in capsys.readouterr().out
    theirs = read(name, source, limit=20).edits
    assert len(theirs) >= 20
    assert [told(edit) for edit in read("file", str(out)).edits] == [told(edit) for edit in theirs]


@pytest.mark.usefixtures("encoder")
def test_every_round_of_a_chain_is_kept(tmp_path: Path) -> None:
    rounds = [fact(id=f"acme/{n}", chain="acme", round=n, target_new=f"Bo {n}") for n in (1, 2)]
    source = written(tmp_path / "chain.jsonl", *rounds, fact(prompt="Where is Acme?", id="place"))
    out = converted(tmp_path, source)
    assert [(edit.chain, edit.round) for edit in read("file", str(out), rounds=2).edits] == [
        ("acme", 1),
        ("acme", 2),
        ("place", 1),
    ]


@pytest.mark.usefixtures("encoder")
def test_a_file_that_is_there_is_kept(tmp_path: Path, capsys: Capture) -> None:
    source = written(tmp_path / "facts.jsonl", fact())
    assert main(["data", source, "--convert", source]) == 2
    assert "exists: name a new file" in capsys.readouterr().err
    assert main(["data", source, "--convert", str(tmp_path / "no" / "out.jsonl")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err
    assert main(["data", "--convert", str(tmp_path / "out.jsonl")]) == 2
    assert "--convert needs a file" in capsys.readouterr().err
