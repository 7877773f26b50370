"""The documents are correct: links point to the names they give, commands are accepted, examples work."""

from __future__ import annotations

import functools
import gzip
import importlib
import json
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from textwrap import indent
from types import ModuleType
from typing import Any, cast

import pandas as pd
import pytest
import torch
from code_files import task, update
from documents import DOCUMENTS, ROOT, Block, blocks, inline_commands, wrong_links
from flow_steps import execute
from test_metrics import hand
from tiny import CPU, LORA, Bench, round_config, triplets
from tyro.extras import SubcommandApp

import corsa.cli.main
import corsa.config.method
import corsa.data.benchmarks
from corsa import config, methods
from corsa.algorithm import objectives
from corsa.algorithm.batch import MicroBatch, counts
from corsa.algorithm.logprobs import packing_is_exact
from corsa.algorithm.packing import NO_OLD_ANSWER, Triplet, pack
from corsa.algorithm.row_settings import RowSettings
from corsa.cli.commands import app
from corsa.config import RunSettings, StepConfig
from corsa.config.command_line import answered
from corsa.evaluation import metric_definitions
from corsa.evaluation.metrics import compute
from corsa.experiments import trackers
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Planner
from corsa.flow import Store
from corsa.lora.factors import Adapter
from corsa.methods import METHODS
from corsa.models import registry
from corsa.training.loop import curves_table

SHELL = [block for block in blocks() if not block.elsewhere and list(block.commands())]
OPTIONS_OF_ALL = "--training.batch"
"""docs/results.md has a block of options that follow each of its commands."""

FILES = ("--data", "--then-data", "--other-data", "--temporal-data", "--memit.corpus", "--humaneval")


def example(start: str) -> str:
    """The Python block of extending.md that begins with this comment."""
    (found,) = [
        block.text
        for block in blocks()
        if block.document == "docs/extending.md" and textwrap.dedent(block.text).startswith(f"# {start}\n")
    ]
    assert len(found.splitlines()) < 60
    return textwrap.dedent(found)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Writes an example into its package, for the length of a test, and imports it."""
    known = set(sys.modules)

    def install(path: str) -> ModuleType:
        file = tmp_path / "examples" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(example(path))
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        package = importlib.import_module(name.rpartition(".")[0])
        place = str(tmp_path / "examples" / package.__name__.replace(".", "/"))
        if place not in package.__path__:
            monkeypatch.setattr(package, "__path__", [*package.__path__, place])
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield install
    for name in sorted(set(sys.modules) - known, reverse=True):  # the modules of a package before the package
        if (file := getattr(sys.modules[name], "__file__", None)) and file.startswith(str(tmp_path)):
            package, _, last = name.rpartition(".")
            vars(sys.modules[package]).pop(last, None)
            del sys.modules[name]


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
                Path(model).touch()
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
    if first == OPTIONS_OF_ALL:
        words = ["python", "pipelines/single_update.py", *words]
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


# The examples of extending.md


def test_the_example_of_a_benchmark_reads_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: Callable[[str], ModuleType]
) -> None:
    installed("corsa/data/benchmarks/capitals.py")
    entry = eval(example("an entry of BENCHMARKS"), dict(vars(corsa.data.benchmarks)))
    monkeypatch.setitem(corsa.data.benchmarks.BENCHMARKS, entry.name, entry)
    data = tmp_path / "moved.csv"
    data.write_text("country,old,new,continent\nNigeria,Lagos,Abuja,Africa\nBrazil,Rio de Janeiro,Brasilia,\n")
    reading = corsa.data.benchmarks.read("capitals", str(data))
    (edit,) = reading.edits
    assert (edit.id, edit.target_old, edit.target_new) == ("capitals/Nigeria", "Lagos", "Abuja")
    assert [probe.kind for probe in edit.probes] == ["edit", "paraphrase", "neighbor"]
    (bad,) = reading.skipped
    assert bad.field == "continent"


def test_the_example_of_a_setting_of_the_step_trains(tmp_path: Path) -> None:
    ((name, setting),) = eval(example("an entry of STEPS"), dict(vars(config))).items()
    assert name not in METHODS
    step = setting(StepConfig()).effective()
    assert (step.lambda_, step.rho) == (0.0, 0.2)
    trained = Bench(triplets(4)).train(round_config(step=step.canonical()), tmp_path)
    assert trained.curves[-1]["logp_new"] > trained.curves[0]["logp_new"]


def test_the_example_of_a_loss_term_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {**vars(corsa.config.method), **vars(objectives)}
    exec("class Changed(StepConfig):\n" + indent(example("in StepConfig"), "    "), names)
    exec(example("in corsa/algorithm/objectives.py"), names)
    added = eval(example("an entry of OBJECTIVES"), names)
    monkeypatch.setattr(objectives, "OBJECTIVES", (*objectives.OBJECTIVES, added))
    step = names["Changed"].model_validate({"simpo": 0.5, "lambda": 0.0, "rho": 0.0})
    rounds = round_config(batch=5, epochs=4).model_copy(update={"step": step})  # every step sees all edits
    bench = Bench(triplets(5))
    *paired, last_one = bench.edits
    unpaired = replace(last_one, old=[], reference=(last_one.reference[0], NO_OLD_ANSWER))  # L_SFT alone teaches it
    trained = bench.train(rounds, tmp_path, edits=[*paired, unpaired])
    first, last = trained.curves[0], trained.curves[-1]
    assert last["loss_simpo"] < first["loss_simpo"]
    assert last["loss_sft"] < first["loss_sft"]
    assert first["cosine"] is not None
    assert first["loss_dpo"] is None
    assert curves_table(trained.curves)["loss_simpo"].to_pylist() == [row["loss_simpo"] for row in trained.curves]


def test_the_loss_of_the_example_is_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """SimPO (Meng et al. 2024), Eq. 6, with beta 2 and gamma 1."""
    names = dict(vars(objectives))
    exec(example("in corsa/algorithm/objectives.py"), names)
    edits = [Triplet([5], [6, 7, 2], [8, 2]), Triplet([5], [6, 2], [8, 9, 9, 2]), Triplet([5], [6, 2], [])]
    logp = torch.tensor([[[-3.0, -1.0, -4.0]], [[-2.0, -6.0, 0.0]]])
    reference = torch.tensor([[[0.0] * 3], [[0.0, 0.0, NO_OLD_ANSWER]]])
    part = MicroBatch(pack(edits), reference)
    answers = objectives.Answers(logp, None, part, counts([edits], "cpu")[0], None)
    margins = [2 * -3 / 3 - 2 * -2 / 2 - 1, 2 * -1 / 2 - 2 * -6 / 4 - 1]
    expected = sum(math.log(1 + math.exp(-margin)) for margin in margins) / 2
    found = names["simpo"](answers, RowSettings.of([StepConfig()], "cpu"))
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.process
def test_the_example_of_a_scenario_draws_its_steps(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(example("pipelines/ranks.py"))
    options = ["--model", "random:tiny-llama", "--limit", "3", "--methods", "lora", "--ranks", "1,2"]
    command = [sys.executable, script, *options, "--storage", tmp_path / "runs", "--dry-run"]
    drawn = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "world_facts/lora-rank1/seed0/round1" in drawn
    assert "report/ranks" in drawn


def test_the_example_of_a_method_with_two_phases_is_found_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: Callable[[str], ModuleType]
) -> None:
    package = installed("corsa/methods/pairs_first/__init__.py")
    installed("corsa/methods/pairs_first/teach.py")
    method = {method.name: method for method in methods.records()}["pairs-first"]
    assert method in package.METHODS
    monkeypatch.setitem(METHODS, method.name, method)
    config = method.round_config(RunSettings(lora=LORA, training=round_config().training), 3, 1)
    assert methods.method_of(config) is method
    assert method.load_teach is not None
    edits = [replace(edit, old=edit.old if i % 2 else []) for i, edit in enumerate(triplets(4))]
    bench = Bench(edits)
    first = bench.teach(method.load_teach(), config, tmp_path / "first")
    assert first.metrics == {"pairs": 2}
    assert first.curves is not None
    assert first.curves[-1]["logp_new"] > first.curves[0]["logp_new"]
    second = bench.teach(method.load_teach(), config, tmp_path / "second", before=first.change)
    ranks = [{factors.rank for factors in cast(Adapter, taught.change).values()} for taught in (first, second)]
    assert ranks == [{LORA.rank}, {2 * LORA.rank}]
    assert second.curves is not None
    assert second.curves[0]["logp_new"] > first.curves[0]["logp_new"]


def test_the_example_of_a_metric_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ((name, metric),) = eval(example("an entry of METRICS"), dict(vars(metric_definitions))).items()
    monkeypatch.setitem(metric_definitions.METRICS, name, metric)
    (lora,) = [row for row in compute(hand())["rows"] if row["method"] == "lora"]
    assert lora["metrics"][name]["value"] == 1 / 6  # of the wordings after round 2, one has the mark "."


def test_the_example_of_a_tracker_writes_all_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = dict(vars(trackers)) | {"TRACKERS": {}}
    exec(example("a tracker"), names)
    (name,) = names["TRACKERS"]
    monkeypatch.setitem(trackers.TRACKERS, name, names["TRACKERS"][name])
    trackers.check([f"{name}:{tmp_path}"])
    metrics = compute(hand())
    file = trackers.track(f"{name}:{tmp_path}", title="A run", config={}, metrics=metrics, curves=pd.DataFrame())
    assert Path(file).parent == tmp_path
    found = pd.read_csv(file).set_index(["position", "name"]).value
    assert found[2, "lora/generality"] == pytest.approx(4 / 6)
    assert len(found) == sum(v["value"] is not None for row in metrics["series"] for v in row["metrics"].values())


def test_the_example_of_a_model_family_packs_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((name, shape),) = eval(example("an entry of ARCHITECTURES"), dict(vars(registry))).items()
    assert name not in registry.ARCHITECTURES
    monkeypatch.setitem(registry.ARCHITECTURES, name, shape)
    bench = Bench(triplets(4), family=name.removeprefix("tiny-"))
    assert bench.loaded.model.config.model_type == shape["model_type"]
    assert packing_is_exact(bench.loaded.model, bench.edits, torch.float32, CPU)
    trained = bench.train(round_config(), tmp_path)
    assert trained.curves[-1]["logp_new"] > trained.curves[0]["logp_new"]


def test_the_example_of_a_stage_runs(tmp_path: Path, installed: Callable[[str], ModuleType]) -> None:
    module = installed("corsa/experiments/relations.py")
    file = tmp_path / "facts.jsonl"
    rows = [
        {"prompt": f"Who leads {i}?", "target_new": "Bo", "target_old": "Al", "relation": "leader" if i else "place"}
        for i in range(3)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    step = module.relations(Planner.of(Experiment(benchmark="file", data=str(file)), "").facts(), least=2)
    outcome, _, connections = execute(Store(tmp_path / "store"), step)
    assert not outcome.failed
    assert json.loads(outcome.artifacts[step.fingerprint].read("relations.json")) == {"leader": 2}
    assert connections == 0
