"""Programs that try to get out, to use everything up, or to pass without being right."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from corsa.sandbox.worker import Engine, Limits, Program, Sandbox, SandboxError, available, engine

pytestmark = pytest.mark.process

TESTS = "def test_twice():\n    assert twice(21) == 42\n"
RIGHT = "def twice(x):\n    return 2 * x\n"
LIMITS = Limits(wall_s=3.0, cpu_s=2, memory=256 << 20, processes=24)

isolated = pytest.mark.skipif(available()[0] is None, reason=f"programs cannot be isolated here: {available()[1]}")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(engine(), limits=LIMITS) as started:
        yield started


def below(sandbox: Sandbox) -> set[int]:
    """All processes of the sandbox."""
    assert sandbox._process is not None
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {sandbox._process.pid}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return found


FUNCTION = b"X\x08\0\0\0functionK\0\x86Q"  # in a pickle: a stand-in for a function of the program
COUNTER = b"ccollections\nCounter\n"


def by_hand(value: bytes, answer: bytes) -> str:
    """A program that writes its messages itself: a value (opcodes of pickle), then one answer to whatever is asked."""
    return f"""
import os, struct
def say(value):
    raw = b'\\x80\\x04(X\\x08\\0\\0\\0returned' + value + b'Nt.'
    os.write(3, struct.pack('!I', len(raw)) + raw)
def twice(x):
    say({value!r})
    while os.read(3, 1 << 16):
        say({answer!r})
"""


FORGERIES = {
    "exits 0": "import os\nos._exit(0)\n",
    "exits 0 when called": "import os\ndef twice(x):\n    os._exit(0)\n",
    "sys.exit": "import sys\ndef twice(x):\n    sys.exit(0)\n",
    "atexit": """
import atexit
def leave():
    raise SystemExit(0)
atexit.register(leave)
def twice(x):
    return 0
""",
    "prints a pass": 'print(\'{"outcome": "passed", "tests": {}}\')\ndef twice(x):\n    return 0\n',
    "writes a pass to every file": """
import os
def twice(x):
    for file in range(1, 256):
        try:
            os.write(file, b'{"outcome": "passed", "tests": {"test_twice": ""}, "detail": ""}')
        except OSError:
            pass
    os._exit(0)
""",
    "redefines what tests are made of": """
import builtins
AssertionError = type('AssertionError', (Exception,), {})
builtins.AssertionError = AssertionError
builtins.isinstance = builtins.all = lambda *a: True
def test_twice():
    pass
def twice(x):
    return 0
""",
    "patches the runner": """
import sys
for module in list(sys.modules.values()):
    for name in ('examine', 'report', 'exec', 'compile'):
        if hasattr(module, name):
            setattr(module, name, lambda *a, **k: {'outcome': 'passed', 'detail': '', 'tests': {}})
def twice(x):
    return 0
""",
    "is equal to everything": """
class Yes(int):
    def __eq__(self, other):
        return True
def twice(x):
    return Yes(0)
""",
    "looks through the frames": """
import gc, sys
def twice(x):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_globals.values()) + list(frame.f_locals.values()):
            if isinstance(value, dict) and 'outcome' in value:
                value['outcome'] = 'passed'
        frame = frame.f_back
    return 0
""",
    "sends a pickle that runs code": """
import os, pickle, struct
class Evil:
    def __reduce__(self):
        return exec, ("import os; os._exit(0)",)
def twice(x):
    raw = pickle.dumps(('returned', Evil(), None))
    os.write(3, struct.pack('!I', len(raw)) + raw)
    return 0
""",
    "gives a class its own idea of equality": by_hand(
        COUNTER + b"N}X\x06\0\0\0__eq__" + FUNCTION + b"s\x86b" + b")R", answer=b"\x88"
    ),
    "says that it is ready and was right": """
import os, pickle, struct
ready = ('ready', ['twice', 'test_twice'], {'test_twice': 1})
for message in (ready, ('passed',), ('raised', [('builtins', 'SystemExit')], '')):
    raw = pickle.dumps(message)
    os.write(3, struct.pack('!I', len(raw)) + raw)
""",
    "raises what a runner may not catch": "def twice(x):\n    raise KeyboardInterrupt\n",
}


@isolated
@pytest.mark.parametrize("text", FORGERIES.values(), ids=FORGERIES)
def test_no_forgery_passes(sandbox: Sandbox, text: str) -> None:
    verdict = sandbox.run(Program(text, TESTS))
    assert not verdict.passed
    assert verdict.outcome in ("failed", "error", "exited")
    assert sandbox.run(Program(RIGHT, TESTS)).passed


@isolated
def test_a_value_has_no_methods_of_the_programs_own(sandbox: Sandbox) -> None:
    forged = by_hand(COUNTER + b")R" + b"}X\x0b\0\0\0most_common" + FUNCTION + b"sb", answer=b"]K\x01a")
    verdict = sandbox.run(Program(forged, "def test_most_common():\n    assert twice(21).most_common() == [1]\n"))
    assert verdict.outcome == "error"
    assert "attributes would be set" in verdict.detail
    plain = "import collections\ndef twice(x):\n    return collections.Counter({x: 2})\n"
    assert sandbox.run(Program(plain, "def test_it():\n    assert twice(21).most_common() == [(21, 2)]\n")).passed


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
    assert below(sandbox) == before  # no process is left, and the sandbox is the same
    assert sandbox.run(Program(RIGHT, TESTS)).passed


def refused(attempt: str) -> Program:
    """A program that says whether an attempt raised OSError."""
    indented = "".join(f"        {line}\n" for line in attempt.splitlines())
    text = f"""
def tried():
    try:
{indented}    except OSError as error:
        return type(error).__name__
    return 'done'
"""
    return Program(text, "def test_tried():\n    assert tried() != 'done', tried()\n")


ATTEMPTS = {
    "reads a file of the host": "open('/etc/passwd').read()",
    "reads a home": "import os\nos.listdir('/root')\nos.listdir('/home')",
    "reads this test": f"open({__file__!r}).read()",
    "writes outside": "import sys\nopen(sys.prefix + '/lib/x', 'w')",
    "writes to the root": "open('/x', 'w')",
    "reads another process": "open('/proc/1/environ').read()",
    "kills the first process": """
import os, time
os.kill(os.getppid(), 9)
time.sleep(0.2)
os.kill(os.getppid(), 0)
raise OSError('it lives')""",
    "connects to this machine": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)",
    "looks up a name": "import socket\nsocket.getaddrinfo('pypi.org', 443)",
    "becomes root": "import os\nos.setuid(0)",
    "mounts": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.mount(b'none', b'/tmp', b'tmpfs', 0, b''):
    raise OSError(ctypes.get_errno(), '')""",
    "makes namespaces": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x10000000):
    raise OSError(ctypes.get_errno(), '')""",
}


@isolated
@pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS)
def test_the_machine_is_out_of_reach(sandbox: Sandbox, attempt: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        attempt = attempt.replace("PORT", str(server.getsockname()[1]))
        verdict = sandbox.run(refused(attempt))
    assert verdict.passed, verdict


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
    assert sandbox.run(Program(RIGHT, TESTS)).passed  # it broke, and was started again
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


# What is judged


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
