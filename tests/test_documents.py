"""The documents are correct: links point to the names they give, commands are accepted, examples work."""

from __future__ import annotations

import functools
import gzip
import importlib
import json
import re
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from code_files import task, update
from documents import DOCUMENTS, ROOT, Block, blocks, inline_commands, wrong_links
from tyro.extras import SubcommandApp

import corsa.cli.main
import corsa.config.method
import corsa.data.benchmarks
from corsa.cli.commands import app
from corsa.config.command_line import answered

SHELL = [block for block in blocks() if not block.elsewhere and list(block.commands())]

FILES = ("--data", "--then-data", "--other-data", "--temporal-data", "--memit.corpus", "--humaneval")


# Links


def test_links_to_lines_lead_to_what_they_name() -> None:
    assert wrong_links() == [], "run `make links`"


def test_links_to_files_lead_somewhere() -> None:
    missing = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in DOCUMENTS
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
        if not target.startswith(("http:", "https:", "mailto:")) and not (path.parent / target).exists()
    ]
    assert missing == []


# Commands


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory in which commands are planned."""
    monkeypatch.chdir(tmp_path)
    for folder in ("pipelines", "tune"):
        monkeypatch.syspath_prepend(ROOT / folder)
    return tmp_path


def laid_out(words: list[str]) -> None:
    """Creates the files that a command names, because its plan hashes them."""
    for option, value in pairwise(words):
        if option in FILES:
            problems = {"--humaneval": task(0), "--data": update("sin")}
            text = json.dumps(problems.get(option, {})).encode()
            Path(value).write_bytes(gzip.compress(text) if value.endswith(".gz") else text)
        for model in value.split(",") if option in ("--model", "--models") else []:
            if model.endswith(".gguf"):
                Path(model).parent.mkdir(parents=True, exist_ok=True)
                Path(model).write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 0, 0))
        if option == "--config":
            Path(value).write_text("limit: 3\n")
        if option == "--mmlu" and value != "hub":
            for part in ("dev", "test"):
                (Path(value) / part).mkdir(parents=True, exist_ok=True)
                (Path(value) / part / f"anatomy_{part}.csv").write_text("q,1,2,3,4,A\n" * 5)


def planned(words: list[str], monkeypatch: pytest.MonkeyPatch, storage: Path) -> None:
    """Runs a scenario's main until it shows its steps."""
    script, *options = words[words.index("python") + 1 :] if "python" in words else words
    laid_out(options)
    for module in ("corsa.experiments.runner", "sweep"):  # a document names files that do not exist here
        monkeypatch.setattr(importlib.import_module(module), "check_files", lambda _: None)
    if "--help" not in options:
        options = [*options, "--dry-run", "--storage", str(storage)]
    monkeypatch.setattr(sys, "argv", [script, *options])
    main = importlib.import_module(Path(script).stem).main
    try:
        status: Any = answered(main)
    except SystemExit as left:
        status = left.code
    assert status == 0, f"{script} {options} exits with {status}"


def accepted(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the arguments of `corsa` without running the command."""
    reached: list[str] = []

    def silent(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def stub(*args: Any, **kwargs: Any) -> int:
            reached.append(command.__name__)
            return 0

        return stub

    def silence(commands: SubcommandApp) -> None:
        specs = dict(commands._subcommands)
        for name, spec in specs.items():
            if isinstance(spec.target, SubcommandApp):
                silence(spec.target)
            else:
                specs[name] = replace(spec, target=silent(spec.target))
        monkeypatch.setattr(commands, "_subcommands", specs)

    silence(app)
    try:
        status: Any = corsa.cli.main.main(words[1:])
    except SystemExit as left:
        status = left.code
    assert not status, f"corsa refuses {words[1:]}"
    assert reached or "--help" in words, f"corsa ran nothing for {words[1:]}"


def tried(words: list[str], monkeypatch: pytest.MonkeyPatch, storage: Path) -> None:
    """Tries a command as far as that is cheap. An unknown command is an error."""
    first = words[0]
    if first == "ray":
        assert words[:3] == ["ray", "job", "submit"]
        words = words[words.index("--") + 1 :]
    if any(word.startswith(("pipelines/", "tune/")) for word in words[:2]):
        planned(words, monkeypatch, storage)
    elif first == "corsa":
        accepted(words, monkeypatch)
    elif first == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif first == "pip":
        extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
        known = (ROOT / "pyproject.toml").read_text()
        assert words[1] == "install"
        assert all(f"\n{extra} = [" in known for group in extras for extra in group.split(","))
    else:
        assert first in ("source", "git", "export", "cd"), f"no test knows how to try {words}: mark it `# needs ...`"


@pytest.mark.parametrize("block", SHELL, ids=lambda block: f"{block.document}:{block.line}")
def test_commands_in_blocks_are_accepted(block: Block, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in block.commands():
        tried(words, monkeypatch, files / "runs")


def test_a_command_that_does_not_exist_is_found_out(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted(["corsa", "report", "--json"], monkeypatch)
    for wrong in (["corsa", "report", "--jsno"], ["python", "pipelines/continual.py", "--rho", "0.1"], ["crosa"]):
        with pytest.raises(AssertionError):
            tried(wrong, monkeypatch, files / "runs")


def test_commands_within_lines_are_accepted(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(inline_commands())
    assert len(found) > 5
    for _, words in found:
        tried(words, monkeypatch, files / "runs")


@pytest.mark.process
def test_the_dry_run_of_the_demo_draws_its_steps(files: Path) -> None:
    command = [sys.executable, ROOT / "pipelines" / "continual.py", "--dry-run", "--storage", files]
    drawn = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "0 done" in drawn
    assert "corsa/seed0/round3" in drawn


def test_python_blocks_compile() -> None:
    for block in blocks():
        if block.language == "python":
            compile(textwrap.dedent(block.text), f"{block.document}:{block.line}", "exec")


def test_examples_of_facts_are_read(tmp_path: Path) -> None:
    texts = [block.text for block in blocks() if block.language == "json" and "target_new" in block.text]
    assert texts
    path = tmp_path / "facts.jsonl"
    for text in texts:
        path.write_text(text)
        wanted = [json.loads(line)["target_new"] for line in text.splitlines()]
        edits = corsa.data.benchmarks.read("file", str(path)).edits
        assert [edit.target_new for edit in edits] == wanted
        assert {probe.kind for probe in edits[0].probes} == {"edit", "paraphrase", "neighbor"}
