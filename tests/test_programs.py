"""Benchmarks of programs: reading them, making a program from an answer, and counting."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from benchmark_records import PUBLISHED
from code_files import task, update, write_lines
from tiny import tiny_model
from transformers import TopPLogitsWarper

from corsa.config.code_steps import CodeReportConfig, CodeShown
from corsa.config.sandbox import Limits
from corsa.data.benchmarks.programs import program_in, read_problems
from corsa.data.edit import from_table
from corsa.errors import CorsaError
from corsa.evaluation.generation import generate, nucleus, sample
from corsa.evaluation.pass_at_k import Tried, measure, pass_at, tried
from corsa.experiments.code.steps import as_edits, measured
from corsa.sandbox.batch import judge
from corsa.sandbox.worker import available

isolated = pytest.mark.skipif(available()[0] is None, reason=f"programs cannot be isolated here: {available()[1]}")


@pytest.fixture
def arena(tmp_path: Path) -> str:
    return str(write_lines(tmp_path / "arena.jsonl", [update("sin"), update("cos", 2)]))


@pytest.fixture
def humaneval(tmp_path: Path) -> str:
    return str(write_lines(tmp_path / "HumanEval.jsonl", [task(0), task(1)]))


def verdicts(programs: list) -> list[str]:
    engine = available()[0]
    assert engine
    return [v.outcome for v in judge(programs, engine=engine, limits=Limits(wall_s=5))]


@isolated
def test_reference_solutions_pass_only_with_the_update(arena: str) -> None:
    problems = read_problems(arena)
    assert [len([p for p in problems if f".{name}]" in p.id]) for name in ("sin", "cos")] == [3, 2]
    assert set(verdicts([p.program(p.solution, updated=True) for p in problems])) == {"passed"}
    assert "passed" not in verdicts([p.program(p.solution, updated=False) for p in problems])
    assert "passed" not in verdicts([p.program(p.blanked, updated=True) for p in problems])


@isolated
def test_canonical_solutions_pass_and_blanked_ones_do_not(humaneval: str) -> None:
    problems = read_problems(humaneval)
    assert set(verdicts([p.program(p.solution, updated=True) for p in problems])) == {"passed"}
    assert "passed" not in verdicts([p.program(p.blanked, updated=True) for p in problems])


@isolated
def test_a_program_that_redefines_the_prompts_helper_deceives_itself(humaneval: str) -> None:
    problem = read_problems(humaneval)[1]
    cheating = program_in("def helper(x):\n    return 0\n\ndef shifted_1(x):\n    return 0\n", problem.lead)
    assert verdicts([problem.program(cheating, updated=True)]) == ["failed"]


@isolated
def test_equal_programs_are_run_once_and_remembered(arena: str, tmp_path: Path) -> None:
    problem = read_problems(arena)[0]
    engine = available()[0]
    assert engine
    counts: list[int] = []
    program = problem.program(problem.solution, updated=True)
    cache = tmp_path / "verdicts"
    first = judge([program, program], engine=engine, cache=cache, done=counts.append)
    assert [v.outcome for v in first] == ["passed", "passed"]
    assert counts == [1]
    assert judge([program], engine=engine, cache=cache, done=counts.append)[0] == first[0]
    assert counts == [1]


def test_limit_and_offset_count_records(arena: str) -> None:
    assert {p.update for p in read_problems(arena, offset=1)} == {"[math.cos]:[add-argument]:[update-0]"}
    assert len(read_problems(arena, limit=1)) == 3
    with pytest.raises(CorsaError, match="no record is left"):
        read_problems(arena, offset=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["update"].pop("function_path"), "line 1: update.function_path: is missing"),
        (
            lambda r: r["prog_syn_examples"][1].update(ref_solution=" "),
            r"prog_syn_examples\[1\].ref_solution: is blank",
        ),
        (
            lambda r: r["prog_syn_examples"][0].update(unit_tests="def ("),
            r"prog_syn_examples\[0\].unit_tests: .* Python",
        ),
        (lambda r: r.update(prog_syn_examples=[]), "prog_syn_examples: is not a list with at least one problem"),
        (lambda r: r["prog_syn_examples"].append(r["prog_syn_examples"][0]), "was used before"),
    ],
)
def test_what_is_wrong_with_a_users_file_is_said(tmp_path: Path, change, said: str) -> None:
    record = update("sin")
    change(record)
    with pytest.raises(CorsaError, match=said):
        read_problems(str(write_lines(tmp_path / "mine.jsonl", [record])))


def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorsaError, match="neither HumanEval"):
        read_problems(str(write_lines(tmp_path / "x.jsonl", [{"prompt": "x"}])))
    (tmp_path / "x.jsonl").write_text("{")
    with pytest.raises(CorsaError, match="line 1: column 2: this is not JSON"):
        read_problems(str(tmp_path / "x.jsonl"))


def test_the_program_in_an_answer() -> None:
    fenced = "Here it is:\n```python\ndef f():\n    return 1\n```\nand ```python\nx\n```"
    assert program_in(fenced) == "def f():\n    return 1\n"
    assert program_in("def f():\n    pass") == "def f():\n    pass\n"
    assert program_in("```\ncut off") == "cut off\n"
    lead = "def f():\n    '''One.'''\n"
    for answer in ("return 1", "    return 1\n", "```python\ndef f():\n    return 1\n```"):
        namespace: dict = {}
        exec(lead + program_in(answer, lead), namespace)
        assert namespace["f"]() == 1


def test_published_files_are_read() -> None:
    if not PUBLISHED.is_dir():
        pytest.skip(f"the published files are not at {PUBLISHED}")
    problems = read_problems(str(PUBLISHED / "codeupdatearena/arena.jsonl"))
    assert (len(problems), len({p.update for p in problems})) == (577, 141)
    assert len(read_problems(str(PUBLISHED / "humaneval/HumanEval.jsonl.gz"))) == 164


# Counting


@pytest.mark.parametrize(("n", "c", "k"), [(5, 0, 1), (5, 2, 1), (5, 2, 5), (5, 1, 3), (6, 3, 2)])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_one(n: int, c: int, k: int) -> None:
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def rows(problem: str, outcomes: list[tuple[str, str | None]]) -> list[dict]:
    found = []
    for sample_, (with_, without) in enumerate(outcomes):
        found.append({"problem": problem, "sample": sample_, "updated": True, "outcome": with_})
        if without:
            found.append({"problem": problem, "sample": sample_, "updated": False, "outcome": without})
    return found


def test_a_program_counts_if_it_needs_the_update() -> None:
    table = rows("a", [("passed", "failed"), ("passed", "passed"), ("failed", "error"), ("passed", "timeout")])
    table += rows("b", [("failed", "failed"), ("passed", "exited")])
    found = tried(table, {"a": "u", "b": "u", "c": "v"}, updates=True)
    assert found == [Tried("a", "u", (True, False, False, True)), Tried("b", "u", (False, True))]
    assert tried(rows("h", [("passed", None), ("failed", None)]), {"h": "h"}, updates=False)[0].right == (True, False)


def test_a_problem_that_one_method_lost_to_the_sandbox_counts_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keeps methods paired, problem by problem."""
    lost = rows("a", [("sandbox", "sandbox"), ("passed", "failed")]) + rows("b", [("passed", "failed")] * 2)
    whole = rows("a", [("passed", "failed")] * 2) + rows("b", [("failed", "failed"), ("passed", "failed")])
    problems = [{"id": name, "update": f"of {name}", "part": "asked"} for name in ("a", "b")]
    inputs = {}
    for name, table in {"p": problems, "one": lost, "other": whole}.items():
        folder = tmp_path / name
        folder.mkdir()
        pq.write_table(
            pa.Table.from_pylist(table), folder / ("problems.parquet" if name == "p" else "verdicts.parquet")
        )
        inputs[name] = SimpleNamespace(local=folder.joinpath)
    monkeypatch.setattr("corsa.experiments.code.steps._notes", lambda task, lost: sorted(lost))
    shown = tuple(CodeShown(answers=n, problems="p", method=n, benchmark="updates", seed=0) for n in ("one", "other"))
    config = CodeReportConfig(title="", command="", experiment={}, shown=shown)
    task: Any = SimpleNamespace(inputs=inputs, step=SimpleNamespace(inputs={}))
    found = measured(task, config)
    rates = {row["method"]: row["metrics"]["upass_1"] for row in found["rows"]}
    assert {name: (rate["value"], rate["probes"]) for name, rate in rates.items()} == {"one": (1, 1), "other": (0.5, 1)}
    assert [c["difference"] for c in found["comparisons"] if c["metric"] == "upass_1"] == [0.5]
    assert found["notes"] == [("updates", "a")]


def test_an_old_answer_is_kept_if_it_runs_and_does_not_pass(tmp_path: Path) -> None:
    outcomes = {
        "kept": ("failed", True),
        "passes": ("passed", True),
        "broken": ("error", False),
        "lost": ("sandbox", False),
    }
    tables: dict[str, list[dict[str, Any]]] = {
        "problems": [{"id": n, "prompt": f"Write {n}.", "solution": "return 1", "part": "taught"} for n in outcomes],
        "answers": [{"problem": n, "output": f" return {i} "} for i, n in enumerate(outcomes, start=2)],
        "verdicts": [
            {"problem": n, "updated": True, "outcome": outcome, "loaded": loaded}
            for n, (outcome, loaded) in outcomes.items()
        ],
    }
    for name, table in tables.items():
        pq.write_table(pa.Table.from_pylist(table), tmp_path / f"{name}.parquet")
    task: Any = SimpleNamespace(inputs=dict.fromkeys(tables, SimpleNamespace(local=tmp_path.joinpath)), output=tmp_path)
    counts = as_edits(task)
    edits = from_table(pq.read_table(tmp_path / "edits.parquet"))
    assert [(e.id, e.target_new, e.target_old) for e in edits] == [
        ("kept", "return 1", "return 2"),
        *((name, "return 1", "") for name in ("passes", "broken", "lost")),
    ]
    assert counts["without_old_answer"] == 3
    assert counts["old_answer_not_judged"] == 1


def test_rates_and_intervals_are_over_problems_and_updates() -> None:
    found = [
        Tried("a", "u", (True, False)),
        Tried("b", "u", (False, False)),
        Tried("c", "v", (False, True)),
        Tried("d", "w", (False, False)),
    ]
    one, sums = measure("upass_1", found, 1)
    assert one["value"] == pytest.approx((0.5 + 0 + 0.5 + 0) / 4)
    assert (one["edits"], one["probes"]) == (3, 4)
    assert one["low"] <= one["value"] <= one["high"]
    assert sums.denominator.tolist() == [[2], [1], [1]]  # groups x seeds
    assert measure("upass_single", found, None)[0]["value"] == pytest.approx(1 / 4)
    assert measure("upass_2", found, 2)[0]["value"] == pytest.approx(2 / 4)
    none = measure("upass_5", found, 5)[0]
    assert none["value"] is None
    assert "no problem has 5 samples" in none["reason"]


def test_several_seeds_are_averaged_and_their_spread_is_given() -> None:
    found = [
        Tried("a", "u", (True,)),
        Tried("b", "v", (False,)),
        Tried("a", "u", (True,), 1),
        Tried("b", "v", (True,), 1),
    ]
    one = measure("upass_1", found, 1)[0]
    assert one["value"] == pytest.approx(3 / 4)
    assert (one["edits"], one["probes"]) == (2, 2)
    assert one["seeds"] == {"values": {"0": 0.5, "1": 1.0}, "spread": pytest.approx(0.5**0.5 / 2)}
    assert measure("upass_1", found[:2], 1)[0]["seeds"] is None


# Drawing


def drawn(prompts: list[list[int]], seeds: list[tuple[int, ...]], batch: int = 8, **how: Any) -> list[list[int]]:
    stops = torch.zeros(1024, dtype=torch.bool)
    options: dict[str, Any] = {"temperature": 0.8, "top_p": 0.7} | how
    return sample(tiny_model(), prompts, seeds=seeds, stops=stops, new_tokens=6, batch=batch, device="cpu", **options)


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    prompts = [[5, 6, 7], [5, 6, 7], [9, 8, 7, 6, 5]]
    seeds = [(0, 1, 0), (0, 1, 1), (0, 2, 0)]
    together = drawn(prompts, seeds, top_p=1.0, temperature=2.0)
    assert together[0] != together[1]
    alone = [drawn([p], [s], top_p=1.0, temperature=2.0)[0] for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone == drawn(prompts, seeds, batch=1, top_p=1.0, temperature=2.0)


def test_a_narrow_draw_is_greedy() -> None:
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5]]
    stops = torch.zeros(1024, dtype=torch.bool)
    greedy = generate(tiny_model(), prompts, stops=stops, new_tokens=6, batch=8, device="cpu")
    assert drawn(prompts, [(0,), (1,)], top_p=1e-9) == greedy
    assert drawn(prompts, [(0,), (1,)], temperature=1e-4, top_p=1.0) == greedy


def test_draws_follow_the_distribution_that_top_p_leaves() -> None:
    class Fixed:
        config = tiny_model().config

        def __call__(self, input_ids: torch.Tensor, **_: object) -> object:
            logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(len(input_ids), 1, 4)
            return type("Output", (), {"logits": logits})

    stops = torch.zeros(4, dtype=torch.bool)
    count = 3000
    found = sample(
        Fixed(),
        [[0]] * count,
        seeds=[(i,) for i in range(count)],
        temperature=1.0,
        top_p=0.7,
        stops=stops,
        new_tokens=1,
        batch=count,
        device="cpu",
    )
    shares = np.bincount([tokens[0] for tokens in found], minlength=4) / count
    assert shares[2] == shares[3] == 0
    assert math.isclose(shares[0], 0.625, abs_tol=0.03)


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.7, 0.95, 0.9999])
def test_the_nucleus_is_that_of_transformers(top_p: float) -> None:
    """At several widths: few tokens hold the nucleus of a sharp distribution, nearly all that of a flat one."""
    logits = torch.randn(12, 20_000, generator=torch.Generator().manual_seed(0)).double()
    logits *= torch.tensor([20.0, 5.0, 1.0, 0.01]).repeat(3)[:, None]
    theirs: Any = TopPLogitsWarper(top_p)
    kept = theirs(None, logits).isfinite()
    p = logits.softmax(-1)
    assert torch.equal(nucleus(p, top_p), p * kept)


def test_of_equally_likely_tokens_the_first_stay() -> None:
    """The definition, literally: in the order of a stable sort, the shortest beginning that holds `top_p`."""
    p = torch.tensor([[4, 8, 4, 4, 8, 4], [1, 1, 1, 1, 1, 1], [0, 0, 9, 0, 0, 0]]).double()
    p /= p.sum(-1, keepdim=True)
    for top_p in (0.1, 0.5, 0.6, 0.8, 0.99):
        for row, found in zip(p, nucleus(p, top_p), strict=True):
            kept, held = set[int](), 0.0
            for i in sorted(range(6), key=lambda i: -float(row[i])):
                if held < top_p:
                    kept.add(i)
                held += float(row[i])
            assert set(found.nonzero()[:, 0].tolist()) == kept & set(row.nonzero()[:, 0].tolist())
