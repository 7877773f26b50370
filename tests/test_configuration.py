"""From a command line and a YAML file to steps; refused values and their messages; the inputs of a step's identity."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from pydantic import ValidationError

from corsa.config import STEPS, Placement, StepConfig
from corsa.config.command_line import answered, configure, exit_with
from corsa.errors import CorsaError
from corsa.experiments.code.base import CodeExperiment
from corsa.experiments.planner import Planner
from corsa.experiments.runner import repeat_command
from corsa.flow.step import Step, topological
from corsa.flow.store import Store
from corsa.training.resources import (
    cpus_per_worker,
    groups_side_by_side,
    refuse_what_cannot_fit,
    threads_per_worker,
    trials_at_once,
)
from pipelines.continual import Continual, continual, main

SCRIPT = ROOT / "pipelines" / "continual.py"


def given(*arguments: str) -> Continual:
    """The configuration that a command line makes."""
    return configure(Continual(), arguments, program="continual.py", description="")


@pytest.fixture
def yaml(tmp_path: Path) -> Any:
    """Writes a configuration file; returns its path."""

    def write(text: str) -> str:
        (tmp_path / "experiment.yaml").write_text(text)
        return str(tmp_path / "experiment.yaml")

    return write


def error_of(*arguments: str) -> str:
    with pytest.raises(CorsaError) as caught:
        given(*arguments).checked()
    return str(caught.value)


# Accepted


def test_options_have_the_names_that_the_documents_use() -> None:
    found = given(
        *("--model", "qwen3-8b", "--dtype", "bfloat16", "--template", "chat", "--benchmark", "counterfact"),
        *("--methods", "lora, corsa-published", "--seeds", "0,1,2", "--limit", "64", "--workers", "4", "--rounds", "5"),
        *("--corsa.lambda", "0.5", "--corsa.rho", "0.1", "--corsa.beta", "0.2", "--lora.rank", "8"),
        *("--training.learning-rate", "1e-3", "--training.epochs", "2", "--placement.micro-batch", "4"),
        *("--evaluation.protocol", "paper", "--storage", "/runs", "--dry-run", "--update-share", "0.3"),
    )
    assert (found.model.name, found.model.dtype, found.model.template) == ("qwen3-8b", "bfloat16", "chat")
    assert (found.methods, found.seeds) == (("lora", "corsa-published"), (0, 1, 2))
    assert (found.corsa.lambda_, found.corsa.rho, found.corsa.beta) == (0.5, 0.1, 0.2)
    assert (found.lora.rank, found.training.learning_rate, found.training.epochs) == (8, 1e-3, 2)
    assert (found.placement.workers, found.placement.micro_batch) == (4, 4)
    assert (found.benchmark, found.limit, found.rounds, found.update_share) == ("counterfact", 64, 5, 0.3)
    assert (found.evaluation.protocol, found.storage, found.dry_run) == ("paper", "/runs", True)


def test_the_command_line_wins_over_the_file_which_wins_over_the_defaults(yaml: Any) -> None:
    path = yaml("corsa: {lambda: 0.5, rho: 0.2}\ntraining:\n  epochs: 3\nseeds: [4, 5]\nmodel: qwen3-8b\n")
    found = given("--config", path, "--corsa.rho", "0.3")
    assert (found.corsa.lambda_, found.corsa.rho, found.corsa.beta) == (0.5, 0.3, 0.1)
    assert (found.training.epochs, found.seeds, found.model.name) == (3, (4, 5), "qwen3-8b")
    assert given(f"--config={path}").corsa.rho == 0.2
    assert given("--config", yaml("")) == given("--config", yaml("{}"))


def test_a_resolved_configuration_is_a_file_that_makes_it_again(yaml: Any) -> None:
    import yaml as library

    first = given("--corsa.lambda", "0.5", "--methods", "corsa", "--limit", "3", "--model", "random:tiny-llama")
    again = given("--config", yaml(library.safe_dump(first.canonical())))
    assert again.model_copy(update={"config": None}) == first


def test_the_command_that_repeats_a_run_does() -> None:
    first = given(
        *("--corsa.lambda", "0.5", "--methods", "corsa,lora", "--limit", "3", "--model", "random:tiny-llama"),
        *("--evaluation.match", "exact", "--training.learning-rate", "1e-3", "--rounds", "2", "--template", "chat"),
        *("--workers", "2", "--storage", "/elsewhere", "--update-share", "0.25"),
    )
    words = repeat_command("pipelines/continual.py", first, Continual()).split()
    assert words[:2] == ["python", "pipelines/continual.py"]
    again = given(*words[2:])
    how = {"placement": first.placement, "storage": first.storage}
    assert again.model_copy(update=how) == first
    assert repeat_command("p.py", Continual(), Continual()) == "python p.py"


def test_the_command_that_repeats_a_run_says_yes_and_no() -> None:
    plain, allowed = CodeExperiment(), CodeExperiment(data="arena.jsonl", allow_code_execution=True)
    words = repeat_command("p.py", allowed, plain).split()
    assert words == ["python", "p.py", "--data", "arena.jsonl", "--allow-code-execution"]
    assert configure(plain, words[2:], program="p.py", description="") == allowed
    assert repeat_command("p.py", plain, allowed).split()[-1] == "--no-allow-code-execution"


def test_a_name_given_twice_counts_once() -> None:
    assert given("--methods", "corsa,corsa", "--seeds", "1,1,0").methods == ("corsa",)
    assert given("--seeds", "1,1,0").seeds == (1, 0)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Continual().limit = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="Extra inputs"):
        StepConfig.model_validate({"lamda": 1.0})


# Refused


def test_names_that_are_not_known_are_refused_with_the_nearest() -> None:
    assert error_of("--methods", "crosa") == (
        "unknown method 'crosa': did you mean 'corsa'? Known: lora, corsa, corsa-no-sam, corsa-no-dpo, "
        "corsa-no-pcgrad, corsa-published, replay, corsa-replay, replay-pcgrad, replay-ridge, alphaedit, "
        "f-learning, in-context, joint, locft, memit"
    )
    assert "unknown benchmark 'conterfact': did you mean 'counterfact'?" in error_of("--benchmark", "conterfact")
    for nothing in ("--methods", "--seeds"):
        assert "nothing would be trained" in error_of(nothing, ",")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle: qwen3-8b", "unknown field 'modle': did you mean 'model'?"),
        ("corsa: {lamda: 1}", "unknown field 'lamda': did you mean 'lambda'?"),
        ("training: {learning-rate: 1}", "unknown field 'learning-rate': did you mean 'learning_rate'?"),
        ("model: {nme: x}", "unknown field 'nme': did you mean 'name'?"),
        ("corsa: {rho: -1}", "corsa.rho: Input should be greater than or equal to 0 (found -1)"),
        ("rounds: 0", "rounds: Input should be greater than or equal to 1 (found 0)"),
        ("training: {epochs: many}", "training.epochs: Input should be a valid integer"),
        (
            "corsa: {pcgrad: both}",
            "corsa.pcgrad: Input should be 'symmetric', 'algorithm1', 'authors' or 'off' (found 'both')",
        ),
        ("corsa: {pcgrad: sequential}", "set 'authors' for the authors' trainer, or 'algorithm1' for"),
        ("- a\n- b", "holds no mapping of fields to values"),
        ("a: [1", "is not YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(yaml: Any, text: str, said: str) -> None:
    path = yaml(text)
    found = error_of("--config", path)
    assert path in found
    assert said in found


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "cannot be read: No such file or directory" in error_of("--config", str(tmp_path / "absent.yaml"))
    assert "cannot be read: Is a directory" in error_of("--config", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--worker", "3"], ["unknown option --worker: did you mean --workers?"]),
        (["--corsa.rh", "1"], ["unknown option --corsa.rh: did you mean --corsa.rho?"]),
        (["--corsa.rho", "-1"], ["--corsa.rho", "greater than or equal to 0"]),
        (["--corsa.beta", "0"], ["--corsa.beta", "greater than 0"]),
        (["--rounds", "0"], ["--rounds", "greater than or equal to 1"]),
        (["--update-share", "1"], ["--update-share", "less than 1"]),
        (["--training.epochs", "two"], ["--training.epochs", "two"]),
        (["--dtype", "float16"], ["--dtype", "float16"]),
        (["--seeds", "a"], ["--seeds", "'a'"]),
        (["--config"], ["--config needs a file"]),
    ],
)
def test_options_that_are_wrong_end_with_status_2(
    arguments: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert answered(lambda: bool(given(*arguments))) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    for word in said:
        assert word in line
    assert "tyro" not in line
    assert "pydantic" not in line


# The script

HEAVY = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("HEAVY", sorted({"torch", "ray", "transformers", "peft"} & set(sys.modules)))
"""


def script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the script as a command in a separate folder. The last line names what it imported."""
    command = [sys.executable, "-c", HEAVY, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.process
@pytest.mark.process
def test_help_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    began = time.monotonic()
    done = script(tmp_path, "--help")
    assert time.monotonic() - began < 15
    assert done.returncode == 0
    assert "HEAVY []" in done.stdout
    for option in ("--model", "--benchmark", "--workers", "--corsa.rho", "--config", "--dry-run", "--methods"):
        assert option in done.stdout


def test_a_dry_run_shows_the_steps_and_does_nothing(tmp_path: Path) -> None:
    began = time.monotonic()
    done = script(tmp_path, "--dry-run", "--workers", "64")
    assert time.monotonic() - began < 15
    assert done.returncode == 0
    assert "HEAVY []" in done.stdout
    chains = ("world_facts-x3/base", "world_facts-x3/lora/seed0/round1", "world_facts-x3/corsa/seed0/round3")
    for name in ("edits/world_facts-x3", "reference/world_facts-x3", *chains):
        assert name in done.stdout
    assert "to do" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "crosa"], "unknown method 'crosa': did you mean 'corsa'?"),
        (["--benchmark", "conterfact"], "unknown benchmark 'conterfact': did you mean 'counterfact'?"),
        (["--model", "smolm2-135m"], "unknown model 'smolm2-135m': did you mean 'smollm2-135m'?"),
        (["--model", "random:tiny-lama"], "unknown architecture 'tiny-lama': did you mean 'tiny-llama'?"),
        (["--model", "."], "model directory . has no config.json"),
        (["--limit", "0"], "--limit 0: nothing would be edited"),
        (["--benchmark", "file"], "benchmark 'file' is not on the hub"),
        (["--benchmark", "file", "--data", "absent.jsonl"], "data file absent.jsonl does not exist"),
        (["--benchmark", "file", "--data", "."], "data file . is a directory"),
        (["--config", "absent.yaml"], "configuration file absent.yaml cannot be read"),
        (["--storage", "s4://bucket"], "storage 's4://bucket'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as caught:
        exit_with(main)
    assert caught.value.code == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "crosa"], "error: unknown method 'crosa'"),
        (["--worker", "2"], "error: unknown option --worker: did you mean --workers?"),
    ],
)
def test_the_script_ends_with_status_2_and_without_a_traceback(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = script(tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert "HEAVY []" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_workers_that_can_never_fit_are_refused_before_a_cluster_starts(tmp_path: Path) -> None:
    began = time.monotonic()
    done = script(tmp_path, "--workers", "4096", "--storage", str(tmp_path))
    assert time.monotonic() - began < 15
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: 4096 workers x 1 CPU = 4096 CPU asked, the cluster has ")
    assert "ask for at most " in line
    imported = done.stdout.splitlines()[-1]
    assert "ray" not in imported
    assert "torch" not in imported
    finished = [record.kind for record in Store(tmp_path).records()]
    assert set(finished) <= {"edits", "schedule"}


# What fits


def test_a_node_s_cores_are_shared_by_its_workers() -> None:
    placement = given("--workers", "2").placement
    assert threads_per_worker(placement, 8) == 4
    assert threads_per_worker(placement, 1) == 1
    assert cpus_per_worker(placement, [{"CPU": 8.0}]) == pytest.approx(3.5)
    assert cpus_per_worker(placement, [{"CPU": 2.0}]) == 0.5
    assert cpus_per_worker(given("--placement.cpus", "3").placement, [{"CPU": 2.0}]) == 3


def test_a_group_that_can_grow_leaves_room_for_all_its_workers_on_a_node() -> None:
    placement = given("--workers", "2", "--max-workers", "3").placement
    assert threads_per_worker(placement, 8) == 2
    for cores in (2.0, 8.0, 12.0, 30.0):
        reserved = cpus_per_worker(placement, [{"CPU": cores}])
        for workers in (1, 2, 3):  # Ray adds the bundles of a node, and divides the sum
            assert sum([reserved] * workers) // reserved == workers
    assert sum([0.3] * 3) // 0.3 == 2, "which is why a reservation is a multiple of 1/8"
    assert cpus_per_worker(given("--max-workers", "3", "--placement.cpus", "0.3").placement, [{"CPU": 2.0}]) == 0.25
    refuse_what_cannot_fit(placement, [{"CPU": 2.0}])  # the least that it needs is there
    assert groups_side_by_side(given("--max-workers", "4").placement, [{"CPU": 8.0}]) == 1
    with pytest.raises(CorsaError, match="--max-workers: the trials of a sweep have groups of one size"):
        trials_at_once(placement, [{"CPU": 8.0}])
    with pytest.raises(ValueError, match="max_workers 1 is less than workers 2"):
        Placement(workers=2, max_workers=1)


def test_what_a_cluster_cannot_hold_is_refused_with_the_sum() -> None:
    refuse_what_cannot_fit(given("--workers", "2").placement, [{"CPU": 2.0}])
    with pytest.raises(CorsaError, match=r"3 workers x 1 CPU = 3 CPU asked, the cluster has 2 .* at most 2 workers"):
        refuse_what_cannot_fit(given("--workers", "3").placement, [{"CPU": 2.0}])
    with pytest.raises(CorsaError, match="GPU"):
        refuse_what_cannot_fit(given("--placement.gpu").placement, [{"CPU": 8.0}])
    refuse_what_cannot_fit(given("--workers", "8", "--placement.gpu").placement, [{"CPU": 64.0, "GPU": 8.0}])


def test_groups_run_side_by_side_as_far_as_there_is_room() -> None:
    one = given("--placement.threads", "2").placement
    assert groups_side_by_side(one, [{"CPU": 8.0}]) == 4
    assert groups_side_by_side(given().placement, [{"CPU": 8.0}]) == 1, "one worker takes all cores"
    gpus = given("--workers", "4", "--placement.gpu").placement
    assert groups_side_by_side(gpus, [{"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 8.0}]) == 4
    assert groups_side_by_side(gpus, [{"CPU": 64.0}]) == 1


# The identity of a step


def steps(*arguments: str) -> dict[str, Step]:
    """The steps of the scenario by name."""
    experiment = given("--model", "random:tiny-llama", *arguments).checked()
    report = continual(Planner.of(experiment, repeat_command("continual.py", experiment, Continual())))
    return {step.name: step for step in topological([report])}


def changed(*arguments: str) -> set[str]:
    """Names of the steps whose identity these options change."""
    before, after = steps(), steps(*arguments)
    assert before.keys() == after.keys()
    return {name for name in before if before[name].fingerprint != after[name].fingerprint}


LORA = {f"world_facts-x3/lora/seed0/round{r}" for r in (1, 2, 3)}
CORSA = {f"world_facts-x3/corsa/seed0/round{r}" for r in (1, 2, 3)}
TABLES = {"edits/world_facts-x3", "reference/world_facts-x3", "schedule/world_facts-x3"}
BASE = "world_facts-x3/base"
REPORT = {"report/continual"}


def test_the_scenario_has_a_step_for_every_round() -> None:
    assert set(steps()) == LORA | CORSA | TABLES | REPORT | {BASE}
    assert steps()["world_facts-x3/corsa/seed0/round2"].inputs["previous"] is not None
    assert "previous" not in steps()["world_facts-x3/corsa/seed0/round1"].inputs


@pytest.mark.parametrize(
    "arguments",
    [
        ["--workers", "2"],
        ["--placement.threads", "1"],
        ["--placement.micro-batch", "1"],
        ["--placement.probe-batch", "1"],
        ["--placement.gpu"],
        ["--placement.checkpoint-every", "1"],
        ["--storage", "s3://bucket/runs"],
        ["--dry-run"],
    ],
)
def test_how_a_step_is_run_is_no_part_of_its_identity(arguments: list[str]) -> None:
    assert changed(*arguments) == set()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--corsa.rho", "0.1"], CORSA | REPORT),
        (["--corsa.beta", "0.2"], CORSA | REPORT),
        (["--corsa.lambda", "0.5"], CORSA | REPORT),
        (["--corsa.pcgrad", "off"], CORSA | REPORT),
        (["--corsa.reduction", "sequence"], CORSA | LORA | REPORT),
        (["--training.epochs", "3"], CORSA | LORA | REPORT),
        (["--lora.rank", "8"], CORSA | LORA | REPORT),
        (["--dtype", "bfloat16"], CORSA | LORA | REPORT | {BASE, "reference/world_facts-x3"}),
        (["--model", "random:tiny-qwen3"], CORSA | LORA | REPORT | {BASE, "reference/world_facts-x3"}),
        (["--update-share", "0.3"], CORSA | LORA | REPORT | {"schedule/world_facts-x3"}),
        (["--evaluation.new-tokens", "8"], CORSA | LORA | REPORT | {BASE}),
        (["--limit", "8"], CORSA | LORA | REPORT | TABLES | {BASE}),
    ],
)
def test_what_changes_a_result_changes_the_steps_it_reaches(arguments: list[str], expected: set[str]) -> None:
    assert changed(*arguments) == expected


def test_another_seed_is_another_chain_on_the_same_tables() -> None:
    before, after = steps(), steps("--seeds", "0,1")
    assert set(after) - set(before) == {name.replace("seed0", "seed1") for name in LORA | CORSA}
    assert {n for n in before if before[n].fingerprint != after[n].fingerprint} == REPORT
    assert (
        after["world_facts-x3/corsa/seed0/round1"].fingerprint != after["world_facts-x3/corsa/seed1/round1"].fingerprint
    )


def test_a_round_depends_on_the_rounds_before_it() -> None:
    fingerprints = {step.fingerprint for step in steps().values()}
    assert len(fingerprints) == len(steps())


def test_the_order_of_methods_is_no_part_of_a_round() -> None:
    before, after = steps(), steps("--methods", "corsa,lora")
    assert all(before[name].fingerprint == after[name].fingerprint for name in LORA | CORSA)


def test_data_are_known_by_their_bytes(tmp_path: Path) -> None:
    line = '{"prompt": "Who leads Acme?", "target_new": "Bo", "target_old": "Al"}\n'
    places = [tmp_path / "a" / "facts.jsonl", tmp_path / "b" / "facts.jsonl"]
    for place in places:
        place.parent.mkdir()
        place.write_text(line)

    def edits(place: Path) -> str:
        return steps("--benchmark", "file", "--data", str(place), "--rounds", "1")["edits/file"].fingerprint

    assert edits(places[0]) == edits(places[1])
    places[1].write_text(line * 2)
    assert edits(places[0]) != edits(places[1])


@pytest.mark.process
def test_fingerprints_are_the_same_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from test_configuration import steps\n"
        "print(steps()['report/continual'].fingerprint)"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == steps()["report/continual"].fingerprint


def test_an_exact_step_has_the_identity_it_would_have_without_the_approximation() -> None:
    assert not {"perturb_every", "reuse"} & StepConfig(reuse=0.5).effective().canonical().keys()
    approximate = StepConfig(perturb_every=2)
    assert approximate.effective().canonical()["perturb_every"] == 2
    assert STEPS["lora"](approximate).effective() == STEPS["lora"](StepConfig()).effective()
    assert STEPS["corsa-no-sam"](approximate).effective() == STEPS["corsa-no-sam"](StepConfig()).effective()
    assert STEPS["corsa-published"](approximate) == STEPS["corsa-published"](StepConfig())
    with pytest.raises(ValidationError, match="set scope step, or perturb_every 1"):
        StepConfig(perturb_every=2, scope="microbatch")


def test_other_perturbations_enter_the_identity_only_of_a_step_that_perturbs() -> None:
    assert not {"radius", "perturbation"} & StepConfig().canonical().keys()
    other = StepConfig(radius="adaptive", perturbation="random")
    assert (other.canonical()["radius"], other.canonical()["perturbation"]) == ("adaptive", "random")
    assert (StepConfig().passes, other.passes, StepConfig(rho=0.0).passes) == (2, 1, 1)
    for name in ("lora", "corsa-no-sam", "corsa-published"):
        assert STEPS[name](other).effective() == STEPS[name](StepConfig()).effective()
    for clash in ({"scope": "microbatch"}, {"perturb_every": 2}):
        with pytest.raises(ValidationError, match="set scope step and perturb_every 1"):
            StepConfig.model_validate({"perturbation": "random", **clash})


def test_the_key_statistics_depend_on_no_benchmark(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("one text\n")
    memit = ["--methods", "memit", "--limit"]
    found = {}
    for name, options in (("statistics/neutral", []), ("statistics/corpus", ["--memit.corpus", str(corpus)])):
        eight, nine = (steps(*memit, limit, *options) for limit in ("8", "9"))
        assert [step for step in eight if step.startswith("statistics/")] == [name], "one for all rounds of a model"
        assert eight[name].inputs == {}
        assert eight[name].fingerprint == nine[name].fingerprint
        found[name] = eight[name].fingerprint
    corpus.write_text("another text\n")
    changed = steps(*memit, "8", "--memit.corpus", str(corpus))["statistics/corpus"].fingerprint
    assert len({changed, *found.values()}) == 3
