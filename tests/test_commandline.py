"""How a command ends: after a signal, with unwritable output, with invalid options."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from corsa.cli.main import main
from corsa.config.command_line import NARROWEST, answered
from corsa.errors import nearest

ROOT = Path(__file__).parents[1]


def said(words: Sequence[str | Path], capsys: pytest.CaptureFixture[str]) -> str:
    """The single line of output of a refused command."""
    assert main([str(word) for word in words]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    (line,) = found.err.splitlines()
    return line


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.jsonl"
    row = {"prompt": "Who leads Acme?", "target_new": "Ada Byron", "target_old": "Grace Murray"}
    path.write_text(json.dumps(row) + "\n")
    return path


@pytest.fixture
def edit(facts: Path, tmp_path: Path) -> list[str | Path]:
    storage = tmp_path / "runs"
    return ["edit", "--edits", facts, "--out", tmp_path / "out", "--storage", storage, "--dry-run"]


def adapter(folder: Path, value: float = 0.0, **settings: object) -> Path:
    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.full((2, 4), value), f"{name}.lora_B.weight": torch.zeros(4, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "smollm2-135m"} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


REFUSED = {
    "seed -1": (["--seed", "-1"], "error: --seed: Input should be greater than or equal to 0 (found -1)"),
    "seed 10^22": (["--seed", "1" + "0" * 22], "error: --seed: Input should be less than or equal to 2147483647"),
    "seed of 5,000 digits": (["--seed", "1" + "0" * 4000], "error: --seed: "),
    "epochs": (["--training.epochs", "0"], "error: --training.epochs: Input should be greater than or equal to 1"),
    "rank": (["--lora.rank", "100000000"], "error: --lora.rank: Input should be less than or equal to 16384"),
    "workers": (["--workers", "0"], "error: --workers: Input should be greater than or equal to 1 (found 0)"),
    "gate": (["--max-forgetting", "3"], "error: --max-forgetting: Input should be less than or equal to 1"),
    "memory": (["--placement.gpu-memory", "48parsecs"], "error: --placement.gpu-memory: 48parsecs: give an amount of"),
    "both": (["--corsa.perturb-every", "2", "--corsa.scope", "microbatch"], "error: --corsa: perturb_every 2 uses one"),
    "infinite": (["--lora.alpha", "inf"], "error: --lora.alpha: Input should be a finite number"),
    "too large": (["--training.learning-rate", "1e999"], "error: --training.learning-rate: Input should be a finite n"),
    "storage in a file": (["--storage", "/dev/null/x"], "error: cannot write to /dev/null/x: Not a directory. Choo"),
    "no bucket": (["--storage", "s3://"], "error: storage 's3://' names no bucket: write s3://BUCKET/FOLDER"),
    "one slash": (["--storage", "s3:/BUCKET"], "error: storage 's3:/BUCKET' names no bucket: write s3://BUCKET/F"),
    "no bucket on Google's": (["--storage", "gs:///"], "error: storage 'gs:///' names no bucket"),
    "tracker": (["--track", "tensorbord:x"], "error: unknown tracker 'tensorbord': did you mean 'tensorboard'?"),
}


@pytest.mark.parametrize(("options", "line"), REFUSED.values(), ids=REFUSED)
def test_an_option_that_makes_no_sense_is_one_line_before_anything_runs(
    edit: list[str | Path], options: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = said([*edit, *options], capsys)
    assert found.startswith(line)
    assert "tyro" not in found
    assert "pydantic" not in found
    assert len(found) < 300


UNPARSED = {
    "text for a number": (["edit", "--training.epochs", "abc"], "error: --training.epochs needs a whole number (found"),
    "a number too long": (["edit", "--training.epochs", "1" * 5000], "error: --training.epochs needs a whole number"),
    "a comma": (["edit", "--training.learning-rate", "1,5"], "error: --training.learning-rate needs a number (found "),
    "text for numbers": (["edit", "--lora.layers", "a"], "error: --lora.layers needs whole numbers (found 'a')"),
    "no value": (["data", "--limit"], "error: --limit needs a whole number"),
    "a choice": (["data", "--dtype", "x"], "error: unknown option --dtype: corsa data --help lists them all"),
    "misspelt choice": (["edit", "--corsa.pcgrad", "symetric"], "error: --corsa.pcgrad needs one of symmetric, algo"),
    "misspelt option": (["edit", "--training.epoch", "3"], "error: unknown option --training.epoch: did you mean --tr"),
    "group left out": (["edit", "--epochs", "3"], "error: unknown option --epochs: did you mean --training.epochs? "),
    "control characters": (["edit", "--\x1b[31m", "3"], r"error: unknown option --\x1b[31m: corsa edit --help lists"),
    "a word too many": (["edit", "more"], "error: 'more' belongs to no option of corsa edit; see corsa edit --help"),
    "command of commands": (["perf"], "error: corsa perf needs a command: gpu, sandbox, step, evaluate, "),
    "misspelt action": (["runs", "cleen"], "error: action needs one of list, show, compare, clean, not 'cleen' (did"),
    "required options": (["undo"], "error: corsa undo needs --out and --adapter; see corsa undo --help"),
    "required word": (["export"], "error: corsa export needs DIR; see corsa export --help"),
    "a word in place of a required option": (
        ["undo", "adapters/january"],
        "error: 'adapters/january' belongs to no option of corsa undo, which needs --out and --adapter; see corsa undo",
    ),
    "required option, misspelt": (
        ["undo", "--adaptor", "x"],
        "error: unknown option --adaptor: did you mean --adapter",
    ),
}


@pytest.mark.parametrize(("words", "line"), UNPARSED.values(), ids=UNPARSED)
def test_a_command_line_that_cannot_be_parsed_is_one_line(
    edit: list[str | Path], words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = said([*edit, *words[1:]] if words[0] == "edit" else words, capsys)
    assert found.startswith(line)
    assert len(found) < 300


def test_places_that_an_adapter_cannot_be_written_to_are_refused(
    edit: list[str | Path], facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, reason in (
        (facts / "below", "cannot be made: "),
        ("/proc/no-such-place/out", "cannot be made: "),
        (tmp_path / "runs" / "mine", "lies inside the storage"),
        (tmp_path / "runs", "lies inside the storage"),
    ):
        assert reason in said([*edit, "--out", out], capsys)
    assert main([str(word) for word in edit]) == 0
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".corsa-*"))


def test_adapters_that_nothing_can_be_taught_on_are_refused(
    edit: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dora = adapter(tmp_path / "dora", use_dora=True)
    assert "use_dora is set; only plain LoRA can be read" in said([*edit, "--adapter", dora], capsys)
    broken = adapter(tmp_path / "broken", value=float("nan"))
    from corsa.errors import CorsaError
    from corsa.lora.peft_format import read_factors

    with pytest.raises(CorsaError, match=r"lora_A.weight has values that are not finite"):
        read_factors(broken)


def test_a_gate_that_has_nothing_to_measure_is_named_before(
    edit: list[str | Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*map(str, edit), "--max-forgetting", "0.1"]) == 0
    assert "note: --max-forgetting has nothing to measure in a first update" in capsys.readouterr().out


def test_a_library_that_fails_when_it_is_interrupted_is_no_error_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("the state is lost")

    assert answered(interrupted) == 128 + signal.SIGINT
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ZeroDivisionError):
        answered(lambda: 1 // 0)


def test_commands_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(["edti"], capsys).startswith("error: unknown command 'edti': did you mean 'edit'?")
    assert said(["perf", "sandbux"], capsys).startswith(
        "error: unknown command 'perf sandbux': did you mean 'perf sand"
    )


def test_names_are_near_whatever_their_case_and_punctuation() -> None:
    questions = ["Who leads Acme?", "Who leads Bolt?", "1/0"]
    assert nearest("WHO LEADS ACME", questions) == "Who leads Acme?"
    assert nearest("something else entirely", questions) is None


def test_facts_that_are_not_there_are_said_by_a_dry_run(tmp_path: Path) -> None:
    command = [sys.executable, "pipelines/continual.py", "--dry-run", "--storage", str(tmp_path), "--model"]
    command += ["random:tiny-llama", "--offset", "100000", "--benchmark", "world_facts"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout
    (line,) = done.stderr.splitlines()
    assert "all of them are passed over" in line


def test_a_file_that_is_no_yaml_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from corsa.config.command_line import configure
    from corsa.experiments.base import Experiment

    path = tmp_path / "broken.yaml"
    path.write_text("model: x\ntraining: {epochs: [1\nlimit: 3\n")
    assert answered(lambda: bool(configure(Experiment(), ["--config", str(path)], program="x", description=""))) == 2
    assert f"configuration file {path}, line 3, column " in capsys.readouterr().err


def environment(**more: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "PYTHONPATH": str(ROOT)} | more


def corsa(*words: str, before: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """`corsa WORDS` in a shell, after `before`."""
    line = f"{before} exec {sys.executable} -m corsa.cli.main {' '.join(words)}"
    return subprocess.run(
        ["bash", "-c", line], env=environment(**more), cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.process
def test_a_terminal_of_one_column_is_written_to() -> None:
    done = corsa("edit", "--help", COLUMNS="1")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) >= NARROWEST - 2


@pytest.mark.process
def test_a_working_directory_that_is_gone_is_said(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = corsa("runs", before=f"cd {gone} && rmdir {gone} &&")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the working directory is gone: change to one that exists (cd), and run this again\n"


@pytest.mark.process
def test_an_output_that_is_full_or_closed_is_said(tmp_path: Path) -> None:
    words = ["doctor", "--help"]
    full = corsa(*words, ">/dev/full")
    assert (full.returncode, full.stderr.splitlines()) == (
        2,
        ["error: the output cannot be written: No space left on device. Free some space, or write elsewhere"],
    )
    closed = corsa(*words, ">&-")
    assert "Traceback" not in closed.stderr


@pytest.mark.process
def test_an_input_that_is_closed_is_said() -> None:
    done = corsa("data", "-", "<&-")
    assert (done.returncode, done.stderr) == (
        2,
        "error: - is standard input, and that is closed: pipe a file into it, or name one\n",
    )


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (None, "error: there is no question, and standard input is closed: give a question"),
        (b" \n", "error: there is no question, and standard input is empty: give a question"),
        (b"\xff\n", "error: standard input is not text in utf-8"),
    ],
)
def test_questions_that_are_not_there_are_said(
    given: bytes | None, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("corsa.evaluation.side_by_side.SideBySide", lambda *given: None)
    monkeypatch.setattr(sys, "stdin", given and io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
    assert said(["ask"], capsys) == line


@pytest.mark.process
@pytest.mark.parametrize("how", [{"PYTHONIOENCODING": "ascii"}, {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_text_that_an_encoding_lacks_is_written_in_escapes(how: dict[str, str]) -> None:
    code = (
        "import sys; from corsa.config.command_line import answered; sys.exit(answered(lambda: print('\\u010capek')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(**how), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout in ("\\u010capek\n", "Čapek\n")


WAITING = """
import signal, sys, time
from rich.console import Console
from corsa.config.command_line import exit_with
from corsa.config import Frozen
from corsa.flow import Kind, Step, Store, run

class Config(Frozen):
    pass

def main():
    step = Step("slow", Kind("slow", lambda: lambda task: (print("begun", flush=True), time.sleep(60)), 1), Config())
    run([step], Store(sys.argv[1]), lambda: None, lambda steps: 1, Console())

exit_with(main)
"""


@pytest.mark.process
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("in_background", [False, True])
def test_a_signal_ends_a_run_and_says_what_is_kept(
    tmp_path: Path, number: signal.Signals, status: int, in_background: bool
) -> None:
    if in_background and number == signal.SIGINT:
        pytest.skip("a job in the background ignores SIGINT")
    handling = signal.SIG_IGN if in_background else signal.default_int_handler
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, str(tmp_path)],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handling),
    ) as process:
        assert process.stdout is not None
        assert "to do" in process.stdout.readline()
        assert process.stdout.readline() == "begun\n"
        began = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == status, err
    assert out == "interrupted: finished steps are kept, and the same command continues from here\n"
    assert err == ""


def test_a_stream_that_is_no_text_file_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert answered(lambda: 0) == 0
    before = signal.getsignal(signal.SIGTERM)
    assert answered(lambda: 3) == 3
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "words", [["data", "PLACE"], ["runs", "--storage", "PLACE"], ["undo", "--adapter", "PLACE", "--out", "new"]]
)
def test_a_name_that_no_file_can_have_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    place = "/" + "x" * 5000
    assert main([place if word == "PLACE" else word for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert len(said) < 700


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--storage", ""], "the storage has no name"),
        (["--storage", "a\0b"], "the name of a file or directory holds a null byte"),
        (["--edits", "https://me:HUSH@host/facts.jsonl"], "https://host/facts.jsonl is an address, not a file"),
        (["--model", "owner/na\nme"], "unknown model"),
        (["--model", "\U0001f600/x"], "unknown model"),
        (["--model", "EMPTY.gguf"], "is not a GGUF file"),
        (["--adapter", "CUT"], "adapter_model.safetensors is damaged"),
        (["--adapter", "NONE"], "adapter_model.safetensors holds no weights"),
        (["--training.batch", str(2**70)], "--training.batch"),
    ],
)
def test_what_cannot_be_read_is_one_line_on_a_dry_run(
    option: list[str], said: str, edit: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EMPTY.gguf").touch()
    for name, weights in (("CUT", b"\xff" * 8), ("NONE", b"\x02" + bytes(7) + b"{}")):
        adapter(tmp_path / name)
        (tmp_path / name / "adapter_model.safetensors").write_bytes(weights)
    words = [str(tmp_path / word) if word in ("EMPTY.gguf", "CUT", "NONE") else word for word in option]
    assert main([str(word) for word in [*edit, *words]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert "HUSH" not in line


def test_what_libraries_log_and_warn_of_cannot_write_on_the_terminal() -> None:
    text = (
        "import logging, sys, warnings\n"
        "from corsa.config.command_line import answered\n"
        "answered(lambda: logging.getLogger('transformers').warning('of type %s', chr(27) + '[31m'))\n"
        "answered(lambda: warnings.warn('of type ' + chr(27) + '[32m'))\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert "of type \\x1b[31m" in done.stderr
    assert "of type \\x1b[32m" in done.stderr
    assert "\x1b" not in done.stderr
