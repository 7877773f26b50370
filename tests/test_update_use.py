"""What counts as using an update: a program that only checks whether the update exists does not count."""
# ruff: noqa: E501 (programs and messages as they are)

from __future__ import annotations

import math
from pathlib import Path
from types import FunctionType

import pytest
from code_files import update, write_lines

from corsa.config.sandbox import Limits
from corsa.data.benchmarks.mutants import disguised, mutants, plain
from corsa.data.benchmarks.programs import Problem, read_problems
from corsa.evaluation.pass_at_k import tried
from corsa.sandbox.batch import judge
from corsa.sandbox.verdicts import Verdict
from corsa.sandbox.worker import Program, available
from corsa.training.running_tests import TRIALS, UNUSED, judged

isolated = pytest.mark.skipif(available()[0] is None, reason=f"programs cannot be isolated here: {available()[1]}")

OWN = """
import cmath, math
def wave_1(degrees):
    if not there():
        raise RuntimeError('no update')
    return [cmath.sin(math.radians(d)).real for d in degrees]
"""
"""Solves the problem without the update, and fails where it sees none."""

LOOKS = {
    "its signature": "import inspect, math\ndef there():\n    return 'unit' in str(inspect.signature(math.sin))\n",
    "its kind": "import math, types\ndef there():\n    return isinstance(math.sin, types.FunctionType)\n",
    "its code": "import math\ndef there():\n    return math.sin.__code__.co_filename == '<before>'\n",
    "its module": "import math\ndef there():\n    return math.sin.__module__ == '__program__'\n",
    "its names": "import math\ndef there():\n    return math.sin.__code__.co_varnames[:2] == ('x', 'unit')\n",
    "its place in the code": "import math\ndef there():\n    return math.sin.__code__.co_firstlineno\n",
    "its defaults": "import math\ndef there():\n    return math.sin.__defaults__ == ('radians',)\n",
    "names beside its own": "import sys\ndef there():\n    return 'sin' in vars(sys.modules['__program__'])\n",
    "the old function": "import math\ndef there():\n    return math.sin is not old_sin\n",
    "whether it takes the argument": "import math\ntry:\n    math.sin(0, unit='degrees')\n    found = True\n"
    "except TypeError:\n    found = False\ndef there():\n    return found\n",
    "whether it takes the argument, each time": "import math\ndef there():\n    math.sin(0, unit='degrees')\n"
    "    return True\n",
    "that it returns a number": "import math\ndef there():\n    return isinstance(math.sin(1.0, unit='degrees'), float)\n",
    "objects that the collector knows": "import gc, types\ndef there():\n    return any(isinstance(f, types.FunctionType)"
    " and f.__name__ == 'sin' for f in gc.get_objects())\n",
    "modules that are loaded": "import sys\ndef there():\n    return any(getattr(getattr(m, 'sin', 0), '__code__', 0)"
    " for m in list(sys.modules.values()))\n",
    "its text": """
import sys
CODE = "    return old_sin(x if unit == 'radians' else x * math.pi / 180)\\n"
def there():
    frame = sys._getframe()
    while 'before' not in (frame.f_locals.get('request') or ()):
        frame = frame.f_back
    return CODE in frame.f_locals['request']['before']
""",
    "its bytecode": """
import math, types
CODE = "def sin(x, unit='radians'):\\n    return old_sin(x if unit == 'radians' else x * math.pi / 180)\\n"
KNOWN = next(c for c in compile(CODE, '', 'exec').co_consts if isinstance(c, types.CodeType))
def there():
    return isinstance(math.sin, types.FunctionType) and math.sin.__code__.co_code == KNOWN.co_code
""",
    "frames": "import sys\nframe = sys._getframe()\nfound = [n for n in ('sin',) if n in frame.f_globals]\n"
    "def there():\n    return found\n",
}


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    return read_problems(str(write_lines(tmp_path / "arena.jsonl", [update("sin")])))[1]


def run(programs: list[Program]) -> list[Verdict]:
    engine = available()[0]
    assert engine
    return judge(programs, engine=engine, limits=Limits(wall_s=10))


@isolated
@pytest.mark.process
def test_a_program_that_looks_for_the_update_does_not_use_it(problem: Problem) -> None:
    texts = {"the reference": problem.solution, "never looks": OWN.replace("not there()", "False")}
    texts |= {name: look + OWN for name, look in LOOKS.items()}
    rows = judged([(problem, number, text) for number, text in enumerate(texts.values())], run)
    with_update = {name: row["outcome"] for name, row in zip(texts, rows[::2], strict=True)}
    assert set(with_update.values()) == {"passed"}, with_update
    (found,) = tried(rows, {problem.id: problem.update}, updates=True)
    assert dict(zip(texts, found.right, strict=True)) == {name: name == "the reference" for name in texts}
    assert {row["detail"] for row in rows[3::2]} == {"", UNUSED}  # "": passes without the update, unchanged


@pytest.mark.parametrize("passing", ["the first", "the odd ones"])
def test_a_program_that_counts_its_runs_does_not_use_it(problem: Problem, passing: str) -> None:
    """What an earlier run has read is quicker to read: a program can find out that it is not the first, and fail."""
    runs = 0

    def counted(programs: list[Program]) -> list[Verdict]:
        nonlocal runs
        found = []
        for program in programs:
            there = "def sin" in program.before
            right = there and installed(program.before)(90, unit="degrees") == math.sin(math.pi / 2)
            runs += there and program.text == "counts"
            passes = runs == 1 or (runs % 2 == 1 and passing == "the odd ones") if program.text == "counts" else right
            found.append(Verdict("passed" if there and passes else "failed", tests={"t": ""}))
        return found

    for _ in range(20):  # one order in 924 is the one that it expects
        runs = 0
        rows = judged([(problem, 0, "counts"), (problem, 1, problem.solution)], counted)
        if rows[1]["outcome"] == "passed":
            break
    assert (rows[0]["outcome"], rows[1]["outcome"], rows[1]["detail"]) == ("passed", "passed", UNUSED)
    assert (rows[2]["outcome"], rows[3]["outcome"]) == ("passed", "failed")
    assert runs == 1 + TRIALS


def test_a_disguise_changes_no_result(problem: Problem) -> None:
    """It changes what a program could know of the update: its text, and its constants."""
    right, disguise = installed(plain(problem.before)), installed(disguised(problem.before, "77"))
    assert disguise(90, unit="degrees") == right(90, unit="degrees")
    assert "77" in disguise.__code__.co_consts
    assert disguise.__code__.co_varnames == right.__code__.co_varnames
    assert disguise.__code__.co_firstlineno == right.__code__.co_firstlineno


def test_mutants_differ_in_their_results_alone(problem: Problem) -> None:
    found = mutants(problem.before)
    assert len(found) == 4  # of conditions, of operators, of numbers, of results
    right = installed(plain(problem.before))
    for wrong in map(installed, found):
        assert wrong.__code__.co_varnames == right.__code__.co_varnames
        assert wrong.__code__.co_firstlineno == right.__code__.co_firstlineno
        assert wrong(90, unit="degrees") != right(90, unit="degrees")


def installed(before: str) -> FunctionType:
    """Adds the function of an update, and removes it afterwards."""
    namespace: dict = {}
    exec(before, namespace)
    math.sin = namespace["old_sin"]
    return namespace["sin"]


def test_nothing_is_said_where_no_mutant_fails(problem: Problem) -> None:
    """The program's own verdict then decides, as published."""

    def always(programs: list[Program]) -> list[Verdict]:
        return [Verdict("failed" if "old_sin(x if" not in p.before else "passed", tests={"t": ""}) for p in programs]

    blind = problem.model_copy(update={"before": f"{problem.imports}\nimport math\n"})
    assert mutants(blind.before) == []
    rows = judged([(blind, 0, "x")], always)
    assert [row["outcome"] for row in rows] == ["failed", "failed"]
