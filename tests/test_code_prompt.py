"""The prompt of the code domain: its structure, a user's template, and what prepend shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from code_files import update, write_lines

from corsa.config.code_steps import SamplesConfig
from corsa.data.benchmarks.code_prompt import TEMPLATE, prompt_of, read_template
from corsa.data.benchmarks.programs import read_problems
from corsa.errors import CorsaError
from corsa.experiments.code.base import CodeExperiment, code_report
from corsa.experiments.planner import Planner
from corsa.flow.step import topological


@pytest.fixture
def arena(tmp_path: Path) -> str:
    return str(write_lines(tmp_path / "arena.jsonl", [update("sin"), update("cos", 2)]))


def test_the_prompt_has_the_structure_of_the_papers_figure(arena: str) -> None:
    problem, example = read_problems(arena)[1], update("sin")["prog_syn_examples"][1]
    parts = [
        "[TASK]",
        "real-world scenario",
        f"Scenario: {example['scenario']}",
        f"Problem: {example['problem']}",
        "exactly this solution signature",
        example["solution_signature"],
        "[TEST]",
        f"```python\n{example['unit_tests'].strip()}\n```",
        "Python code only, without markdown",
        "exactly the solution signature",
    ]
    places = [problem.prompt.index(part) for part in parts]
    assert places == sorted(places)
    assert problem.prompt.count("```") == 2  # only the tests are fenced


def test_a_users_template_words_the_question(arena: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("{{x}} {solution_signature} | {scenario} | {problem} | {unit_tests} | {problem}\n")
    example = update("sin")["prog_syn_examples"][0]
    problem = read_problems(arena, template=read_template(mine))[0]
    assert problem.prompt == (
        f"{{x}} {example['solution_signature']} | {example['scenario']} | {example['problem']} | "
        f"{example['unit_tests'].strip()} | {example['problem']}"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{scenario} {problem} {solution_signature}", r"\{unit_tests\} is missing"),
        ("{scenario} {problem} {solution_signature} {unit_tests} {tests}", r"\{tests\} is no placeholder"),
        ("{scenario} {problem} {solution_signature} {unit_tests!r}", r"\{unit_tests!r\} is no placeholder"),
        ("{scenario} {problem.x} {solution_signature} {unit_tests}", r"\{problem.x\} is no placeholder"),
        ("{scenario} {problem} {solution_signature} {unit_tests} {}", r"\{\} is no placeholder"),
        ("{scenario} {problem} {solution_signature} {unit_tests} {", "a brace that is text is written twice"),
        ('{"a":\n 1} {scenario} {problem} {solution_signature} {unit_tests}', "is no placeholder"),
        ("", r"\{scenario\} is missing"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_template_is_refused_in_one_line(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "template.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CorsaError, match=said) as refused:
        read_template(path)
    assert "\n" not in str(refused.value)
    assert "template.txt" in str(refused.value)


def test_the_template_enters_the_identity_of_what_is_asked_by_its_text(arena: str, tmp_path: Path) -> None:
    def problems(template: Path | None) -> str:
        experiment = CodeExperiment(
            data=arena, methods=("prepend",), dry_run=True, prompt_template=str(template) if template else None
        )
        found = topological([code_report(Planner.of(experiment, ""), primary=())])
        return next(step.fingerprint for step in found if step.name == "problems/updates")

    one, same, other = (tmp_path / name for name in "abc")
    one.write_text("{scenario} {problem} {solution_signature} {unit_tests}")
    same.write_text(one.read_text())
    other.write_text(one.read_text() + "!")
    assert problems(one) == problems(same)
    assert len({problems(None), problems(one), problems(other)}) == 3
    own = tmp_path / "own.txt"
    own.write_text(TEMPLATE)
    assert problems(own) == problems(None)


def test_prepend_shows_the_description_and_the_code_only_if_it_is_asked_for(arena: str) -> None:
    problem, record = read_problems(arena)[0].model_dump(), update("sin")["update"]
    plain, told, all_ = (
        prompt_of(problem, described=described, implementation=implementation)
        for described, implementation in ((False, False), (True, False), (True, True))
    )
    assert plain == problem["prompt"]
    assert told.endswith("\n\n" + plain)
    assert all_.endswith("\n\n" + plain)
    assert all(text in told for text in (record["description"], record["docstring"], record["signature"]))
    assert "old_sin(" not in told
    assert record["implementation"].strip() in all_
    assert all_.index(record["description"]) < all_.index(record["implementation"].strip())


@pytest.mark.parametrize("chosen", [False, True])
def test_the_code_of_an_update_is_shown_to_prepend_alone(arena: str, chosen: bool) -> None:
    experiment = CodeExperiment(data=arena, methods=("prepend", "lora"), dry_run=True, prepend_implementation=chosen)
    steps = {step.name: step.config for step in topological([code_report(Planner.of(experiment, ""), primary=())])}
    for method in ("base", "prepend", "lora"):
        config = steps[f"updates/{method}/seed0/samples"]
        assert isinstance(config, SamplesConfig)
        assert (config.described, config.implementation) == (method == "prepend", method == "prepend" and chosen)
