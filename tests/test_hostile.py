"""Every engine contains every hostile program: it gets a verdict, does not pass, and leaves nothing behind."""

from __future__ import annotations

import ctypes
import shutil
import socket
import time
from collections.abc import Iterator

import hostile_escapes as escapes
import hostile_programs as hostile
import pytest
from sandbox_processes import below

from corsa.config.sandbox import Limits
from corsa.sandbox.texts import clean
from corsa.sandbox.verdicts import Verdict
from corsa.sandbox.worker import Engine, Program, Sandbox, available

LIMITS = Limits(wall_s=3.0, cpu_s=2, memory=256 << 20, processes=24)
LONG = LIMITS.model_copy(update={"wall_s": 60.0, "cpu_s": 30})
"""For programs that must end in a certain way: on a busy machine, the short limits may end them before."""

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(available()[0] is None, reason=f"programs cannot be isolated here: {available()[1]}"),
]


@pytest.fixture(scope="module", params=["namespaces", "bubblewrap"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    engine: Engine = request.param
    if engine == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    _host_key()
    with Sandbox(engine, limits=LIMITS) as started:
        yield started


def _host_key() -> None:
    """Puts a key into this process's session keyring, which a sandbox must not inherit."""
    ctypes.CDLL(None).syscall(248, b"user", b"corsa-test", b"secret", 6, -3)


def judged(sandbox: Sandbox, text: str, tests: str = hostile.TESTS, limits: Limits = LIMITS) -> Verdict:
    """The verdict on a program. Asserts that it comes in time, nothing is left, and the sandbox still works."""
    sandbox.start()
    sandbox.limits = limits
    before, began = below(sandbox), time.monotonic()
    verdict = sandbox.run(Program(text, tests, known_good=hostile.KNOWN_GOOD))  # raises where it is not judged
    took = time.monotonic() - began
    assert below(sandbox) == before
    for said in (verdict.detail, verdict.output, *verdict.tests, *verdict.tests.values()):
        assert said == clean(said, 2000)
    sandbox.limits, began = LONG, time.monotonic()
    assert sandbox.run(Program(hostile.KNOWN_GOOD, hostile.TESTS)).passed
    usual = time.monotonic() - began  # shows how busy the machine is
    assert took < limits.wall_s + 3 + 20 * usual
    return verdict


@pytest.mark.parametrize("name", hostile.FORGING)
def test_no_forgery_passes(sandbox: Sandbox, name: str) -> None:
    assert judged(sandbox, hostile.FORGING[name], limits=LONG).outcome in ("failed", "error", "exited")


@pytest.mark.parametrize("name", hostile.READING)
def test_no_program_reads_its_tests(sandbox: Sandbox, name: str) -> None:
    verdict = judged(sandbox, hostile.READING[name])
    assert not verdict.passed
    assert hostile.SECRET not in verdict.output


@pytest.mark.parametrize("name", hostile.IN_THE_RUNNER)
def test_no_value_runs_code(sandbox: Sandbox, name: str) -> None:
    # `gone` would mean that the tests' process ended; a value that is not data is an error of the program.
    verdict = judged(sandbox, hostile.IN_THE_RUNNER[name])
    assert verdict.outcome in ("failed", "error", "timeout", "exited", "memory", "cpu"), verdict


@pytest.mark.parametrize("name", hostile.REFUSING)
def test_no_program_avoids_its_verdict(sandbox: Sandbox, name: str) -> None:
    verdict = judged(sandbox, hostile.REFUSING[name])
    assert verdict.outcome not in ("passed", "sandbox")
    assert "known-good" not in verdict.detail  # none of them breaks the sandbox
    assert len(verdict.detail) <= 1000


@pytest.mark.parametrize("name", escapes.DENYING)
def test_what_uses_everything_up_is_stopped(sandbox: Sandbox, name: str) -> None:
    verdict = judged(sandbox, escapes.DENYING[name], limits=LONG if name in escapes.NAMED else LIMITS)
    assert not verdict.passed
    assert verdict.outcome in escapes.NAMED.get(name, {verdict.outcome}), verdict


@pytest.mark.parametrize("name", escapes.ESCAPES)
def test_the_machine_is_out_of_reach(sandbox: Sandbox, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        attempt = escapes.ESCAPES[name].replace("LISTENING_PORT", str(server.getsockname()[1]))
        verdict = judged(sandbox, *refused(attempt), limits=LONG)
    assert verdict.passed, verdict


def refused(attempt: str) -> tuple[str, str]:
    """A program that reports whether an attempt raised OSError (ValueError for Python's own limits), and its tests."""
    indented = "".join(f"        {line}\n" for line in attempt.splitlines())
    text = f"""
def tried():
    try:
{indented}    except (OSError, ValueError) as error:
        return type(error).__name__
    return 'done'
"""
    return text, "def test_tried():\n    assert tried() != 'done', tried()\n"


@pytest.mark.parametrize("name", escapes.LEFTOVERS)
def test_a_program_finds_nothing_of_an_earlier_one(sandbox: Sandbox, name: str) -> None:
    leaving, looking = escapes.LEFTOVERS[name]
    judged(sandbox, leaving)
    verdict = judged(sandbox, *refused(looking), limits=LONG)
    assert verdict.passed, verdict


def test_forks_of_a_program_do_not_answer_its_tests(sandbox: Sandbox) -> None:
    """A fork continues where the program was, also to the end of it. Then it must not read the connection."""
    text = "import os\nmine = os.getpid()\nfor _ in range(9):\n    if os.getpid() == mine:\n        os.fork()\n"
    text += "def forked():\n    return os.getpid() != mine\n"
    tests = "def test_all():\n    assert not any([forked() for _ in range(50)])\n"
    verdict = judged(sandbox, text, tests, limits=LONG)
    assert verdict.passed, verdict


NOTHING = "def test_none():\n    found = secret(1)\n    assert found == [], found\n"


def test_a_program_finds_no_answer_of_an_earlier_one(sandbox: Sandbox) -> None:
    """Nor any tests: the process from which all programs are forked has read neither."""
    judged(sandbox, f"answer = 'hidden-0123456789ab'\n{hostile.KNOWN_GOOD}")
    for name in ("collector's objects", "the heap", "pages beside small objects"):
        text = hostile.READING[name].replace("found[0].decode() if found else ''", "sorted(set(found))")
        verdict = judged(sandbox, text, NOTHING, limits=LONG)
        assert verdict.passed, verdict


def test_the_searches_find_what_is_there(sandbox: Sandbox) -> None:
    """Shows that the searches work, so that an empty result is meaningful."""
    for name in ("collector's objects", "the heap", "pages beside small objects", "frames"):
        own = "kept = ['hidden-' + 'abcdef' * 2 + '!' * n for n in range(2000)]\n"
        tests = "def test_found():\n    assert secret(1) == 'hidden-abcdefabcdef'\n"
        verdict = judged(sandbox, own + hostile.READING[name], tests, limits=LONG)
        assert verdict.passed, (name, verdict)


def test_there_are_enough_of_them() -> None:
    families = [hostile.FORGING, hostile.READING, hostile.IN_THE_RUNNER, hostile.REFUSING]
    families += [escapes.DENYING, escapes.ESCAPES, escapes.LEFTOVERS]
    assert sum(map(len, families)) >= 80
