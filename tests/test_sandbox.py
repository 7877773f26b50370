"""Programs that try to escape, to exhaust resources, or to pass with a wrong answer."""
# ruff: noqa: E501 (programs as they are)

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import hostile_programs as hostile
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sandbox_processes import below

from corsa.config.sandbox import Limits
from corsa.evaluation.pass_at_k import unjudged
from corsa.sandbox.batch import judge
from corsa.sandbox.worker import Engine, Program, Sandbox, SandboxError, available, engine

pytestmark = pytest.mark.process

TESTS = "def test_twice():\n    assert twice(21) == 42\n"
RIGHT = "def twice(x):\n    return 2 * x\n"
LIMITS = Limits(wall_s=3.0, cpu_s=2, memory=256 << 20, processes=24)

isolated = pytest.mark.skipif(available()[0] is None, reason=f"programs cannot be isolated here: {available()[1]}")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(engine(), limits=LIMITS) as started:
        yield started


@isolated
def test_a_value_has_no_methods_of_the_programs_own(sandbox: Sandbox) -> None:
    tests = "def test_most_common():\n    assert twice(21).most_common() == [(21, 2)]\n"
    own = "import collections\nclass Counter(collections.Counter):\n    def most_common(self):\n        return [(21, 2)]\n"
    verdict = sandbox.run(Program(own + "def twice(x):\n    return Counter()\n", tests))
    assert verdict.outcome == "error"
    assert "not plain data" in verdict.detail
    plain = "import collections\ndef twice(x):\n    return collections.Counter({x: 2})\n"
    assert sandbox.run(Program(plain, tests)).passed


@isolated
def test_a_keyword_argument_may_have_any_name(sandbox: Sandbox) -> None:
    own = "def how(value, kind='stable', target=0, **more):\n    return [value, kind, target, more]\n"
    tests = "def test_how():\n    assert how(1, kind='next', target=2, name=3, self=4) == [1, 'next', 2, {'name': 3, 'self': 4}]\n"
    verdict = sandbox.run(Program(own, tests))
    assert verdict.passed, verdict
    back = "def apply(f):\n    return f(1, kind='call', number=2)\n"
    tests = (
        "def test_apply():\n    assert apply(lambda *a, **k: [list(a), k]) == [[1], {'kind': 'call', 'number': 2}]\n"
    )
    verdict = sandbox.run(Program(back, tests))
    assert verdict.passed, verdict


EATERS = {
    "infinite loop": ("while True:\n    pass\n", {"timeout", "cpu"}),
    "sleep": ("import time\ntime.sleep(60)\n", {"timeout"}),
    "fork bomb": ("import os\nwhile True:\n    os.fork()\n", {"processes"}),
    "quiet fork bomb": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n",
        {"timeout", "cpu"},
    ),
    "memory bomb": ("x = []\nwhile True:\n    x.append(bytearray(1 << 24))\n", {"memory"}),
    "memory bomb of many": (
        """
import os, time
for _ in range(8):
    if os.fork() == 0:
        break
x = b'x' * (100 << 20)
time.sleep(9)
""",
        {"memory"},
    ),
    "disk filler": (
        "n = 0\nwhile True:\n    n += 1\n    with open(f'/tmp/{n}', 'wb') as f:\n        f.write(bytes(8 << 20))\n",
        {"disk"},
    ),
    "one large file": ("with open('/tmp/x', 'wb') as f:\n    f.write(bytes(48 << 20))\n", {"disk"}),
    "many files open": ("kept = [open('/dev/null') for _ in range(1000)]\n", {"files"}),
    "output flood": ("while True:\n    print('x' * 1000)\n", {"output"}),
    "crash of an extension": ("import ctypes\nctypes.string_at(0)\n", {"crashed"}),
    "deep recursion": ("def f(n):\n    return f(n + 1)\nf(0)\n", {"error"}),
    "deeper recursion": (
        """
import sys
sys.setrecursionlimit(10**9)
class A:
    def __repr__(self):
        return repr(self)
repr(A())
""",
        {"crashed", "memory"},
    ),
    "kills itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", {"crashed"}),
    "all signals": (
        """
import os, signal
for s in signal.valid_signals():
    try:
        os.kill(os.getpid(), s)
    except OSError:
        pass
""",
        {"crashed", "cpu"},
    ),
}


@isolated
@pytest.mark.parametrize(("text", "outcomes"), EATERS.values(), ids=EATERS)
def test_what_uses_everything_up_is_stopped_and_named(sandbox: Sandbox, text: str, outcomes: set[str]) -> None:
    sandbox.start()
    before = below(sandbox)
    began = time.monotonic()
    verdict = sandbox.run(Program(text, TESTS))
    assert verdict.outcome in outcomes, verdict
    assert time.monotonic() - began < LIMITS.wall_s + 3
    assert below(sandbox) == before  # no process is left, and the sandbox was not restarted
    assert sandbox.run(Program(RIGHT, TESTS)).passed


@isolated
def test_a_program_sees_no_environment_no_process_and_an_empty_directory(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    text = """
import ctypes, os
def seen():
    environ = ctypes.c_void_p.in_dll(ctypes.CDLL(None), 'environ').value
    first = environ and ctypes.c_void_p.from_address(environ).value
    open('/tmp/left', 'w').write('x')
    return dict(os.environ), first, os.listdir('/proc'), os.listdir('/tmp'), os.getuid() != 0, sorted(os.listdir('/'))
"""
    tests = f"""
PYTHON = {[Path(sys.prefix).parts[2]] if sys.prefix.startswith("/tmp/") else []}
def test_seen():
    environment, raw, processes, files, humble, root = seen()
    assert environment == dict() and raw is None
    assert processes == ['cpuinfo'] and set(files) - set(PYTHON) == set(['left']) and humble
    assert not {{'home', 'var', 'sys', 'run', 'mnt', 'opt'}} & set(root), root
"""
    for _ in range(2):  # the second finds nothing of the first
        verdict = sandbox.run(Program(text, tests))
        assert verdict.passed, verdict


@isolated
def test_threads_and_children_end_with_the_program(sandbox: Sandbox) -> None:
    text = """
import os, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
def twice(x):
    return 2 * x
"""
    sandbox.start()
    before = below(sandbox)
    verdict = sandbox.run(Program(text, TESTS))
    assert verdict.passed
    assert verdict.seconds < 2
    assert below(sandbox) == before


@isolated
def test_the_sandbox_ends_with_its_owner() -> None:
    sandbox = Sandbox(engine(), limits=LIMITS)
    sandbox.start()
    inside = below(sandbox)
    assert sandbox._process
    os.killpg(sandbox._process.pid, 9)
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{p}/exe").exists() for p in inside) and time.monotonic() < deadline:
        sandbox._process.poll()
        time.sleep(0.02)
    assert not any(Path(f"/proc/{p}/exe").exists() for p in inside)
    assert sandbox.run(Program(RIGHT, TESTS)).passed  # it broke and was restarted
    sandbox.close()


@isolated
def test_slots_of_root_are_users_of_their_own(sandbox: Sandbox) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root has other users to become")
    sandbox.start()
    owners = {os.stat(f"/proc/{p}").st_uid for p in below(sandbox)}
    assert max(owners) >= 1 << 30
    with Sandbox(engine(), limits=LIMITS) as other:
        other.start()
        assert max(os.stat(f"/proc/{p}").st_uid for p in below(other)) not in owners


# Verdicts


@isolated
def test_a_verdict_says_which_test_went_wrong_and_how(sandbox: Sandbox) -> None:
    tests = TESTS + "def test_half():\n    assert half(4) == 2, 'no half'\n"
    verdict = sandbox.run(Program(RIGHT + "print('hello')\ndef half(x):\n    return x\n", tests))
    assert verdict.outcome == "failed"
    assert verdict.tests == {"test_twice": "", "test_half": "AssertionError: no half"}
    assert verdict.output == "hello\n"
    wrong = sandbox.run(Program("def twice(x):\n    return x.y\n", TESTS))
    assert (wrong.outcome, wrong.detail) == ("error", "test_twice: AttributeError: 'int' object has no attribute 'y'")
    assert sandbox.run(Program("def twice(x:\n", TESTS)).detail.startswith("SyntaxError")
    assert "twice" in sandbox.run(Program("", TESTS)).detail


@isolated
def test_tests_that_nobody_can_run_are_not_the_programs_fault(sandbox: Sandbox) -> None:
    for tests in ("import nowhere\n", "x = 1\n"):
        with pytest.raises(SandboxError, match="tests cannot be run"):
            sandbox.run(Program(RIGHT, tests))


@isolated
def test_what_a_program_causes_is_its_failure(sandbox: Sandbox) -> None:
    """Also if the tests call it at import, or catch every exception."""
    loaded = "found = twice(21)\ndef test_twice():\n    assert found == 42\n"
    assert sandbox.run(Program(RIGHT, loaded, known_good=RIGHT)).passed
    for known_good in (RIGHT, ""):
        verdict = sandbox.run(Program("def twice(x):\n    raise ValueError\n", loaded, known_good=known_good))
        assert verdict.outcome == "error"
    lenient = "def test_twice():\n    try:\n        twice(21)\n    except:\n        pass\n"
    assert sandbox.run(Program("def twice(x):\n    raise ValueError\n", lenient)).passed
    assert sandbox.run(Program("import os\ndef twice(x):\n    os._exit(0)\n", lenient)).outcome == "exited"
    stops = "def test_twice():\n    assert all(map(lambda x: twice(x) == 2 * x, [1, 2]))\n"
    assert sandbox.run(Program(RIGHT, stops)).passed
    assert sandbox.run(Program("def twice(x):\n    raise StopIteration\n", stops)).outcome == "error"


@isolated
def test_a_fault_of_the_sandbox_is_not_the_programs(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A known-good program distinguishes the two, while a supervisor gives no verdict for some time."""
    answers: list[dict] = []
    receive = Sandbox._receive

    def broken(self: Sandbox, seconds: float) -> dict:
        found = receive(self, seconds)
        return answers.pop(0) if answers and "ready" not in found else found

    monkeypatch.setattr(Sandbox, "_receive", broken)
    no_verdict = {"outcome": "broken", "detail": "gone"}
    answers[:] = [no_verdict]  # once: the known-good program passes, then this one does
    assert sandbox.run(Program(RIGHT, TESTS, known_good=RIGHT)).passed
    answers[:] = [no_verdict, no_verdict]  # for the known-good program as well
    with pytest.raises(SandboxError, match="gone"):
        sandbox.run(Program(RIGHT, TESTS, known_good=RIGHT))
    ours = {"outcome": "passed", "detail": "", "tests": {}, "seconds": 0.1}
    for said in (no_verdict, {"outcome": "sandbox?"}, {"no": "outcome"}):
        answers[:] = [said, ours, said, ours]  # only for this program: the program is the cause
        verdict = sandbox.run(Program(RIGHT, TESTS, known_good=RIGHT))
        assert verdict.outcome == "crashed"
        assert "known-good" in verdict.detail


@isolated
def test_the_process_of_the_tests_has_limits_of_its_own(sandbox: Sandbox) -> None:
    tests = """
import os, resource
def test_limits():
    kinds = ('AS', 'NPROC', 'FSIZE', 'NOFILE', 'CPU', 'CORE')
    limits = [resource.getrlimit(getattr(resource, 'RLIMIT_' + kind))[1] for kind in kinds]
    assert all(0 <= limit < 1 << 40 for limit in limits), limits
def test_value():
    assert len(twice(21)) == 10**7
"""
    verdict = sandbox.run(Program("def twice(x):\n    return [[] for _ in range(10**7)]\n", tests))
    assert verdict.outcome in ("memory", "error", "timeout"), verdict
    assert verdict.tests.get("test_limits", "") == ""


@isolated
def test_text_of_a_program_is_not_evaluated_by_sympy() -> None:
    """`sympy.simplify` and others read text with `eval`, here in the process that decides."""
    tests = "import sympy\ndef test_it():\n    assert sympy.simplify(answer(1)) == sympy.Symbol('x')\n"
    forged = "def answer(x):\n    return 'exec(\"import os; os._exit(0)\") or Symbol(\\'x\\')'\n"
    with Sandbox(engine(), ("sympy",), Limits(wall_s=20, cpu_s=20)) as sandbox:
        assert sandbox.run(Program("def answer(x):\n    return 'x'\n", tests)).passed
        verdict = sandbox.run(Program(forged, tests))
        assert verdict.outcome == "error"
        assert "would be evaluated" in verdict.detail


@isolated
def test_an_expression_of_a_program_compiles_to_no_call_of_python() -> None:
    """`sympy.lambdify` writes functions by their names: one named `eval` is then Python's own."""
    tests = "import sympy\nx = sympy.Symbol('x')\ndef test_it():\n    assert sympy.lambdify(x, secret(x))(2) == 8\n"
    code = ", ".join(f"Integer({byte})" for byte in b"__import__('os')._exit(0)")
    forged = hostile.returns({"expression": f"Function('eval')(Function('bytes')(Tuple({code})))"})
    with Sandbox(engine(), ("sympy",), Limits(wall_s=20, cpu_s=20)) as sandbox:
        assert sandbox.run(Program("def secret(x):\n    return x**3\n", tests)).passed
        verdict = sandbox.run(Program(forged, tests))
        assert verdict.outcome == "error"
        assert "would call" in verdict.detail


@isolated
def test_programs_and_tests_do_not_share_their_addresses(sandbox: Sandbox) -> None:
    text = (
        "import ctypes\ndef place():\n    return ctypes.addressof(ctypes.c_int.in_dll(ctypes.CDLL(None), 'opterr'))\n"
    )
    tests = "import ctypes\ndef test_it():\n    assert place() != ctypes.addressof("
    tests += "ctypes.c_int.in_dll(ctypes.CDLL(None), 'opterr'))\n"
    verdict = sandbox.run(Program(text, tests))
    assert verdict.passed, verdict


@isolated
def test_no_program_removes_a_problem(tmp_path: Path) -> None:
    """The outcome `sandbox` excludes a problem for every method. No program that avoids a verdict can cause it."""
    programs = [Program(text, hostile.TESTS, known_good=hostile.KNOWN_GOOD) for text in hostile.REFUSING.values()]
    found = judge(programs, engine=engine(), limits=Limits(wall_s=2, cpu_s=2, memory=256 << 20), slots=2)
    rows = [{"problem": str(i), "outcome": verdict.outcome} for i, verdict in enumerate(found)]
    assert unjudged(rows) == set()
    assert "passed" not in {verdict.outcome for verdict in found}
    table = pa.Table.from_pylist([asdict(v) | {"tests": str(v.tests)} for v in found])
    pq.write_table(table, tmp_path / "verdicts.parquet")  # every text can be written


@isolated
def test_values_functions_and_iterators_cross(sandbox: Sandbox) -> None:
    text = """
import re
def double_all(f, xs):
    for i, x in enumerate(xs):
        xs[i] = f(x)
def count(n):
    yield from range(n)
def adder(n):
    return lambda x: x + n
def total(xs):
    return sum(xs)
def fail():
    raise ValueError('no')
def found(text):
    return re.search('b+', text)
"""
    tests = """
def test_arguments_change_in_place():
    xs = [1, 2]
    double_all(lambda x: 2 * x, xs)
    assert xs == [2, 4]
def test_iterators():
    assert list(count(3)) == [0, 1, 2]
    assert total(iter([1, 2])) == total(x for x in (1, 2)) == 3
def test_functions():
    assert adder(2)(3) == 5
def test_exceptions():
    try:
        fail()
    except ValueError as error:
        assert str(error) == 'no'
    else:
        assert False
def test_values():
    assert found('abbc').span() == (1, 3)
"""
    verdict = sandbox.run(Program(text, tests))
    assert verdict.passed, verdict


@isolated
def test_values_of_packages_cross_as_data() -> None:
    text = """
import numpy as np, pandas as pd, sympy, torch
def values():
    x = sympy.Symbol('x')
    frame = pd.DataFrame({'a': [1, 2], 'b': ['x', None]}, index=['p', 'q'])
    arrays = np.arange(3.0), np.float32(2), torch.ones(2, 3, dtype=torch.bfloat16)
    return *arrays, frame, frame.a, x**2 / 3 + sympy.sin(x), sympy.Matrix([[x, 1]])
"""
    tests = """
import numpy as np, pandas as pd, sympy, torch
def test_values():
    array, number, tensor, frame, series, expression, matrix = values()
    x = sympy.Symbol('x')
    assert (array == np.arange(3.0)).all() and type(number) is np.float32
    assert tensor.dtype is torch.bfloat16 and tensor.shape == (2, 3) and bool((tensor == 1).all())
    assert list(frame.index) == ['p', 'q'] and list(series) == [1, 2] and series.name == 'a'
    assert expression == x**2 / 3 + sympy.sin(x) and matrix == sympy.Matrix([[x, 1]])
"""
    modules = ("numpy", "pandas", "pyarrow", "sympy", "torch")
    with Sandbox(engine(), modules, Limits(wall_s=60, cpu_s=60)) as sandbox:
        verdict = sandbox.run(Program(text, tests))
    assert verdict.passed, verdict


def test_unprotected_is_only_run_when_asked_for_in_so_many_words(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Engine = engine("none")
    with Sandbox(asked, limits=LIMITS) as sandbox:
        assert sandbox.run(Program(RIGHT, TESTS)).passed
        assert sandbox.run(Program("while True:\n    pass\n", TESTS)).outcome in ("timeout", "cpu")
    monkeypatch.setattr("corsa.sandbox.worker.available", lambda: (None, "no namespaces"))
    with pytest.raises(SandboxError, match="--sandbox none"):
        engine()
