"""A sweep's journal after a full disk, a lost node, or a manual change."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_tuning import ask, study

from corsa.errors import CorsaError
from corsa.flow import Store
from corsa.tuning.journal import mended
from corsa.tuning.study import SweepStudy


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """The journal of a study with three trials."""
    made = study(tmp_path)
    for _ in range(3):
        ask(made)
    return tmp_path / "studies" / "s" / "journal.log"


def test_a_whole_journal_is_left_as_it_is(journal: Path, tmp_path: Path) -> None:
    before = journal.read_bytes()
    assert mended(journal) is None
    assert mended(tmp_path / "none") is None
    assert journal.read_bytes() == before


def test_a_journal_cut_anywhere_in_its_last_line_goes_on_without_it(journal: Path, tmp_path: Path) -> None:
    whole = journal.read_bytes()
    count = whole.count(b"\n")
    start = whole[:-1].rindex(b"\n") + 1
    for cut in (start + 1, start + 20, len(whole) - 1):
        journal.write_bytes(whole[:cut])
        said = mended(journal)
        assert said == f"the journal {journal} was cut in its last line, {count}: the sweep goes on without that entry"
        assert journal.read_bytes() == whole[:start]
    for rest in (
        b"\x00" * 100,
        b"\x00" * 100 + b"\n",
        b"{\n",
        b'"text"\n',
        b"[" * 100_000 + b"\n",
    ):  # after a power cut
        journal.write_bytes(whole + rest)
        assert mended(journal)
        assert journal.read_bytes() == whole
    journal.write_bytes(whole[:-20])
    made = study(tmp_path)
    settings = [made.setting(trial) for trial in made.trials]
    assert len(settings) >= 2
    number, setting = ask(made)
    assert setting not in settings
    again = study(tmp_path)  # later entries are read
    assert again.setting(again.study.trials[number]) == setting


def test_a_cut_is_said_where_the_study_is_opened(
    journal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.write_bytes(journal.read_bytes()[:-5])
    said: list[str] = []
    first = SweepStudy.__init__
    monkeypatch.setattr(SweepStudy, "__init__", lambda self, *a, **k: first(self, *a, **k, say=said.append))
    study(tmp_path)
    assert len(said) == 1
    assert "was cut in its last line" in said[0]


@pytest.mark.parametrize("broken", [b"{", b"", b"\x00\x00", b"[1]", b'{"op_code": "x"}', b"\xff"])
@pytest.mark.parametrize("line", [1, 3])
def test_a_broken_line_in_the_middle_is_named(journal: Path, tmp_path: Path, line: int, broken: bytes) -> None:
    lines = journal.read_bytes().split(b"\n")
    count = len(lines) - 1
    lines[line - 1] = broken
    journal.write_bytes(b"\n".join(lines))
    with pytest.raises(CorsaError) as caught:
        study(tmp_path)
    assert f"the journal {journal} is broken in line {line} of {count}: bring it back" in str(caught.value)
    assert journal.read_bytes() == b"\n".join(lines)
    journal.write_bytes(b"\n".join(lines)[:-3])  # truncated too
    with pytest.raises(CorsaError, match=f"broken in line {line} of"):
        study(tmp_path)


def test_a_journal_that_is_not_a_studys_is_refused(journal: Path, tmp_path: Path) -> None:
    journal.write_bytes(b'{"op_code": 4}\n{"op_code": 99}\n')
    with pytest.raises(CorsaError, match=r"is not one of Optuna's .*: give another --study"):
        study(tmp_path)


@pytest.mark.parametrize("name", ["../out", "a/b", "/tmp/x", ".."])
def test_a_studys_name_stays_in_the_store(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorsaError, match=r"--study: .* is not the name"):
        study(tmp_path / "store", name)
    assert not (tmp_path / "out").exists()
    assert Store(tmp_path / "store").files.names("studies") == []
