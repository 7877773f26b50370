"""The `corsa` command on a store made by hand."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from synthetic_run import RUN, curves, predictions

from corsa.cli.commands.serve import _loading
from corsa.cli.main import main
from corsa.config import Frozen, ModelConfig
from corsa.editing import serve_application
from corsa.errors import CorsaError
from corsa.evaluation.metrics import compute
from corsa.flow.lease import Leases
from corsa.flow.step import Kind, Step, StepFunction
from corsa.flow.store import Store
from corsa.terminal import Console


def never_run() -> StepFunction:
    raise AssertionError("these steps are only read")


class Config(Frozen):
    """The difference between the two made-up runs."""

    seed: int


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "runs"
    store = Store(root)
    edits = Step("edits", Kind("edits", never_run, 1), Config(seed=0))
    store.commit(edits, store.workspace(edits), {"edits": 6}, 0.5)
    table = predictions(chains=6)
    metrics = json.dumps(compute(table))
    for seed, name in enumerate(("first", "second")):
        report = Step(f"report/{name}", Kind("report", never_run, 1), Config(seed=seed), inputs={"edits": edits})
        output = store.workspace(report)
        table.to_parquet(output / "predictions.parquet")
        curves().to_parquet(output / "curves.parquet")
        (output / "metrics.json").write_text(metrics)
        (output / "run.json").write_text(json.dumps(RUN | {"title": name}))
        (output / "report.html").write_text(f"page of {name}")
        store.commit(report, output, {}, 1.5)
    return root


@pytest.fixture
def storage(made: Path, tmp_path: Path) -> Path:
    """A copy of the store."""
    return shutil.copytree(made, tmp_path / "runs")


def ids(storage: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert main(["runs", "--storage", str(storage), "--json"]) == 0
    return {run["name"]: run["id"] for run in json.loads(capsys.readouterr().out)["runs"]}


def test_runs_are_listed_for_people_and_for_programs(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(ids(storage, capsys)) == {"first", "second"}
    assert main(["runs", "--storage", str(storage)]) == 0
    shown = capsys.readouterr().out
    assert "first" in shown
    assert "412 s" in shown
    assert "edits" not in shown
    assert main(["runs", "--storage", str(storage), "--steps"]) == 0
    assert "edits" in capsys.readouterr().out


def test_a_report_is_found_by_name_by_id_or_as_the_newest(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ids(storage, capsys)
    for wanted, name in ((["first"], "first"), ([found["first"][:6]], "first"), ([], "second")):
        assert main(["report", *wanted, "--storage", str(storage)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert Path(lines[-1]).read_text() == f"page of {name}"
        assert any("CoRSA" in line for line in lines)
        assert "\x1b" not in "".join(lines)


def test_the_page_can_be_written_anew(storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "second", "--storage", str(storage), "--output", str(tmp_path / "page")]) == 0
    page = Path(capsys.readouterr().out.splitlines()[-1])
    assert page == tmp_path / "page" / "report.html"
    assert "<h1>second</h1>" in page.read_text()


def test_metrics_as_json(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--storage", str(storage), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["methods"] == ["base", "lora", "corsa"]


def test_mistakes_are_explained(storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--storage", str(tmp_path / "absent")]) == 2
    assert "error: there is no store at" in capsys.readouterr().err
    assert main(["report", "frist", "--storage", str(storage)]) == 2
    assert "did you mean 'first'?" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", "--storage", str(tmp_path / "empty")]) == 2
    assert "no finished run" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["report", "--storage", str(storage), "--output", str(tmp_path / "file")]) == 2
    assert "cannot write to" in capsys.readouterr().err
    assert main(["rnus"]) == 2
    assert "unknown command 'rnus': did you mean 'runs'?" in capsys.readouterr().err


@pytest.mark.process
def test_help_is_quick_and_loads_nothing_heavy() -> None:
    """Each command's, in seconds of the processor: other work may be running."""
    code = (
        "import sys, time, corsa.cli.main as cli\n"
        "print('imported', time.process_time())\n"
        "for words in [[], *([name] for name in cli.app._subcommands)]:\n"
        "    began = time.process_time()\n"
        "    try: cli.main([*words, '--help'])\n"
        "    except SystemExit: pass\n"
        "    print('helped', *words, time.process_time() - began)\n"
        "print([m for m in ('torch', 'ray', 'pandas', 'plotly', 'scipy', 'pyarrow') if m in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    ).stdout.splitlines()
    (imported,) = [float(line.split()[1]) for line in shown if line.startswith("imported")]
    helped = {tuple(line.split()[1:-1]): float(line.split()[-1]) for line in shown if line.startswith("helped")}
    assert len(helped) > 12
    assert {words: seconds for words, seconds in helped.items() if imported + seconds > 1.5} == {}
    assert shown[-1] == "[]"


def test_help_lists_the_commands_in_the_order_of_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.findall(r"• (\w+) ", capsys.readouterr().out)
    assert listed[:7] == ["data", "edit", "ask", "evaluate", "undo", "export", "push"]
    assert {"doctor", "merge", "perf", "plan", "report", "runs"} <= set(listed[7:])


def test_one_run_is_shown_and_two_are_compared(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "show", "first", "--storage", str(storage), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["command"] == RUN["command"]
    assert main(["runs", "compare", "first", "second", "--storage", str(storage), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == []  # the two differ only in name
    assert {(row["method"], row["metric"]) for row in found["metrics"]} >= {
        ("corsa", "efficacy"),
        ("base", "generality"),
    }
    assert all(row["first"] == row["second"] for row in found["metrics"])
    assert main(["runs", "compare", "first", "second", "--storage", str(storage)]) == 0
    shown = capsys.readouterr().out
    assert "the same settings" in shown
    assert "+0.0 pt" in shown
    assert main(["runs", "compare", "first", "--storage", str(storage)]) == 2
    assert "compare takes two runs" in capsys.readouterr().err
    assert main(["runs", "list", "first", "--storage", str(storage)]) == 2
    assert "corsa runs show first" in capsys.readouterr().err


def test_cleaning_shows_what_would_go_and_removes_only_that(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(storage)
    orphan = Step("orphan", Kind("edits", never_run, 1), Config(seed=9))
    store.commit(orphan, store.workspace(orphan), {}, 0.5)
    held = Step("held", Kind("edits", never_run, 1), Config(seed=10))
    (store.workspace(held) / "half").write_text("written")
    leases = Leases(store)
    with leases.unfinished([held], print):
        assert main(["runs", "clean", "first", "--storage", str(storage)]) == 0
        preview = capsys.readouterr().out
        assert "no run that is kept rests on it: orphan" in preview
        assert "report/first" in preview
        assert "would be removed" in preview
        assert len(store.records()) == 4
        assert main(["runs", "clean", "first", "--storage", str(storage), "--yes"]) == 0
        capsys.readouterr()
        assert {record.name for record in store.records()} == {"edits", "report/second"}  # the second rests on edits
        assert list(storage.glob("steps/*/*/half"))  # it is running
    leases.close()
    assert set(ids(storage, capsys)) == {"second"}


def test_every_command_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    overview = capsys.readouterr().out
    assert "exit status:" in overview
    for name in ("ask", "data", "doctor", "edit", "evaluate", "export", "merge", "push", "report", "runs", "undo"):
        with pytest.raises(SystemExit) as left:
            main([name, "--help"])
        assert left.value.code == 0
        shown = capsys.readouterr().out
        assert f"Example: corsa {name}" in shown, name
        assert "\x1b" not in shown


@pytest.mark.process
def test_a_reader_that_goes_away_ends_a_command_without_a_traceback(storage: Path) -> None:
    command = [sys.executable, "-m", "corsa.cli.main", "runs", "--storage", str(storage), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1
    assert said == ""


def test_corsa_serve_says_that_it_still_loads_until_it_has_loaded() -> None:
    console = Console(width=80, file=io.StringIO())
    told = console.file
    assert isinstance(told, io.StringIO)
    with _loading("base, january", console, every=0.02):
        deadline = time.monotonic() + 20
        while "still loading" not in told.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = told.getvalue().splitlines()
    assert lines[:2] == ["loading base, january ...", "still loading, 0 s"]
    time.sleep(0.1)
    assert len(told.getvalue().splitlines()) <= len(lines) + 1  # one may have been under way


def test_corsa_serve_says_why_it_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = pytest.importorskip("ray").exceptions
    error = exceptions.RayTaskError(
        "ProxyActor.ready", "Traceback\n  ...", RuntimeError("port 8000 is taken\nsee logs")
    )
    served = MagicMock()
    served.start.side_effect = error.as_instanceof_cause()
    monkeypatch.setattr(serve_application, "ray_serve", lambda: served)
    with pytest.raises(CorsaError, match=r"^the server could not be started: port 8000 is taken$"):
        serve_application.run(ModelConfig(), {}, host="127.0.0.1", port=8000, gpu=False)


def test_corsa_serve_says_what_is_missing_before_it_loads_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr("corsa.flow.cluster.connect", lambda console: None)
    monkeypatch.delattr(ray, "serve", raising=False)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    assert main(["serve"]) == 2
    assert capsys.readouterr() == (
        "",
        "error: corsa serve needs Ray Serve: pip install 'corsa[serve]' (no module ray.serve)\n",
    )
