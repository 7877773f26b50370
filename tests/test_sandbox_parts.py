"""Parts of the sandbox in isolation: values, texts, the system call filter, cgroups."""
# ruff: noqa: E501 (programs and messages as they are)

from __future__ import annotations

import collections
import datetime
import itertools
import math
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from corsa.sandbox import cgroup, memory, packages, syscalls
from corsa.sandbox.expressions import read_expression
from corsa.sandbox.protocol import Peer, ProgramGone
from corsa.sandbox.texts import clean
from corsa.sandbox.values import DEPTH, CannotCrossError, decoded, encoded
from corsa.sandbox.verdicts import Verdict, verdict


def crossed(value: Any) -> Any:
    raw, area = encoded(value)
    return decoded(raw, memoryview(area))


def test_plain_values_cross_as_they_are() -> None:
    zone = datetime.timezone(datetime.timedelta(hours=-3, minutes=30))
    values = [
        [None, True, 0, -1, 1 << 100, -(1 << 63), 1.5, "ä\ud800", b"\0\xff", bytearray(b"x")],
        (1, [2, {"a": {3, 4}}], frozenset({5}), {(1, 2): [3]}),
        [1 + 2j, range(1, 9, 2), slice(1, None, 2), Decimal("1.50"), Fraction(1, 3)],
        [collections.Counter("aab"), collections.OrderedDict(b=1, a=2), collections.deque([1, 2], 3)],
        [datetime.date(2020, 2, 29), datetime.datetime(2020, 1, 2, 3, 4, 5, 6, zone), datetime.time(1, 2, fold=1)],
        [datetime.timedelta(-1, 5, 7), zone, re.compile("a+", re.IGNORECASE), re.IGNORECASE, int, str],
        [collections.defaultdict(list, {1: [2]}), float("inf")],
    ]
    for value in values:
        back = crossed(value)
        assert back == value
        assert type(back) is type(value)
    assert math.isnan(crossed(float("nan")))
    assert math.copysign(1, crossed(-0.0)) == -1
    assert crossed(re.search("b+", "abbc")).span() == (1, 3)


def test_arrays_cross_by_name_shape_and_bytes() -> None:
    arrays = [
        np.arange(6.0).reshape(2, 3).T,
        np.zeros((0, 3), np.int8),
        np.array(3, np.uint64),
        np.array([True, False]),
    ]
    arrays += [np.array(["a", "bcd"]), np.array([1, 2], ">i4"), np.array(["2020-01-01"], "datetime64[D]")]
    for array in arrays:
        back = crossed(array)
        assert back.dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(back, array)
    assert type(crossed(np.float32(1.5))) is np.float32
    back = crossed(torch.arange(6, dtype=torch.bfloat16).reshape(2, 3))
    assert torch.equal(back, torch.arange(6, dtype=torch.bfloat16).reshape(2, 3))
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", None]}, index=pd.Index(["p", "q"], name="i"))
    pd.testing.assert_frame_equal(crossed(frame), frame)
    pd.testing.assert_series_equal(crossed(frame.a), frame.a)


@pytest.mark.parametrize("value", [np.array([object()]), np.zeros(2, [("a", "O")]), np.zeros(2, "V8"), object(), print])
def test_objects_do_not_cross(value: Any) -> None:
    with pytest.raises(CannotCrossError):
        encoded(value)


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\xff", b"nul", b"{}", b'{"a": 1, "b": 2}', b'{"tuple": 1}', b'{"dict": [1]}', b'{"dict": [[1]]}',
        b'{"set": [[]]}', b'{"int": "9"}', b'{"int": "__import__"}', b'{"class": "os.system"}', b'{"range": ["a"]}',
        b'{"array": ["O", [1], [0, 8]]}', b'{"array": ["float64", [2], [0, 8]]}', b'{"array": ["float64", [-1], [0, 8]]}',
        b'{"array": ["float64", [1], [8, 8]]}', b'{"array": ["float64", [true], [0, 8]]}', b'{"array": [["a"], [1], [0, 8]]}',
        b'{"number": ["float64", [1], [0, 8]]}', b'{"texts": [[1], "O", ["a"]]}', b'{"bytes": [0, 9]}', b'{"bytes": [-1, 1]}',
        b'{"numpy class": "load"}', b'{"numpy class": "object_"}', b'{"torch class": "load"}', b'{"torch dtype": "load"}',
        b'{"function": 1}', b'{"named": ["os", "system"]}', b'{"own": 0}', b'{"frame": [[["category", []]], 1, 1]}',
        b'{"match": ["a", 0, "b", 0, 1]}', b'{"defaultdict": [1, []]}', b'{"date": [2020, 13, 1]}', b"[" * 200_000,
        b"[" * (DEPTH + 9) + b"]" * (DEPTH + 9), b'{"expression": "__import__(\'os\')"}', b"9" * 10_000,
        pickle.dumps(print),
    ],
)  # fmt: skip
def test_nothing_is_built_of_what_is_no_value(raw: bytes) -> None:
    with pytest.raises(CannotCrossError):
        decoded(raw, memoryview(b"\x41" * 8))


def test_a_truth_value_is_one_of_two() -> None:
    """A byte of 2 in an array of bools would be true but not equal to True."""
    array = decoded(b'{"array": ["bool", [2], [0, 2]]}', memoryview(b"\x02\x00"))
    assert array.view(np.uint8).tolist() == [1, 0]
    tensor = decoded(b'{"tensor": ["bool", [2], [0, 2], false]}', memoryview(b"\x02\x00"))
    assert tensor.view(torch.uint8).tolist() == [1, 0]


def test_only_packages_that_are_loaded_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(packages.sys.modules, "torch")
    with pytest.raises(CannotCrossError, match="do not load"):
        decoded(b'{"tensor": ["float32", [1], [0, 4], false]}', memoryview(bytes(4)))


@pytest.mark.parametrize("text", ["exit()", "Symbol('x').name", "Symbol('a.b()')", "Function('f()')(Symbol('x'))",
                                  "Float('x')", "lambda: 1", "Add('1')", "[x for x in (1,)]", "S('exit()')",
                                  "Function('eval')(Function('bytes')(Tuple(Integer(49))))", "Function('ｅval')(Integer(1))",
                                  "Function('0-eval')(Integer(1))", "Function('exec')", "Function('fromfile')(Integer(0))",
                                  "Function('open', commutative=False)"])  # fmt: skip
def test_an_expression_calls_constructors_alone(text: str) -> None:
    sympy = pytest.importorskip("sympy")
    with pytest.raises(CannotCrossError):
        read_expression(text)
    x = sympy.Symbol("x")
    for one in (x**2 / 3 + sympy.sin(x), sympy.Matrix([[x, 1]]), sympy.Eq(x, sympy.pi), sympy.Function("f")(x)):
        assert read_expression(sympy.srepr(one)) == one


def test_a_peer_says_so_whatever_a_test_catches() -> None:
    ours, theirs = socket.socketpair()
    peer = Peer(ours, strict=True)
    theirs.sendall(struct.pack("!II", 4, 0) + b"null")
    with pytest.raises(CannotCrossError):
        peer.call("f")
    assert isinstance(peer.spoilt, CannotCrossError)
    theirs.close()
    with pytest.raises(ProgramGone):
        peer.call("f")
    assert isinstance(peer.spoilt, CannotCrossError)  # what came first


def test_texts_are_bounded_and_fit_any_table_and_terminal() -> None:
    assert clean("a\nb\tc", 9) == "a\nb\tc"
    assert clean("\x1b]0;x\x07\r\x9b\ud800\u202e\u2028", 99).replace("\ufffd", "") == "]0;x"
    assert clean("x" * 10_000_000, 10) == "x" * 10
    assert clean(7, 10) == ""
    said = Verdict("error", "\ud800" * 5000, {"\x1b": "\x07" * 5000}, "\x00" * 5000)
    said.detail.encode()
    assert max(map(len, (said.detail, said.output, *said.tests, *said.tests.values()))) <= 2000
    assert not any(c in said.detail + said.output + str(said.tests) for c in "\x00\x07\x1b")


@pytest.mark.parametrize(
    "found", [None, [], {}, {"outcome": "fine"}, {"outcome": []}, {"outcome": "passed", "detail": 1}]
)
def test_what_is_no_verdict_is_none(found: Any) -> None:
    assert verdict(found) is None
    assert verdict({"outcome": "failed", "no": 1, "tests": 7}) == Verdict("failed")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_denies_what_it_names(machine: str) -> None:
    """Against an interpreter of classic BPF written here from its definition (Linux, filter.h)."""
    code = syscalls._instructions(machine)
    column = list(syscalls._MACHINES).index(machine)

    def returned(number: int, *arguments: int) -> int:
        data = struct.pack("<iIQ6Q", number, syscalls._MACHINES[machine], 0, *(*arguments, *[0] * (6 - len(arguments))))
        place, word = 0, 0
        while True:
            what, yes, no, operand = code[place]
            place += 1
            if what == 0x20:
                (word,) = struct.unpack_from("<I", data, operand)
            elif what == 0x54:
                word &= operand
            elif what == 0x06:
                return operand
            else:
                holds = {0x15: word == operand, 0x35: word >= operand, 0x45: bool(word & operand)}[what]
                place += yes if holds else no

    allow, error = 0x7FFF0000, 0x00050000
    for name, numbers in syscalls._DENIED.items():
        if numbers[column] is not None:
            assert returned(int(numbers[column] or 0)) == error | 1, name
    read, clone, socket_, mmap = ((0, 56, 41, 9), (63, 220, 198, 222))[column]
    assert returned(read) == allow
    assert returned(clone, 17) == allow
    assert returned(clone, 0x10000000 | 17) == error | 1
    assert returned(socket_, 1) == allow
    assert all(returned(socket_, family) == error | 97 for family in (2, 10, 16, 17, 38, 40))
    fcntl, flock = ((72, 73), (25, 32))[column]
    assert returned(fcntl, 3, 2) == allow  # F_SETFD
    assert all(returned(fcntl, 3, command) == error | 37 for command in (6, 7, 37, 38, 1024, 1026))
    assert returned(flock, 3, 2) == error | 37
    prctl, sendto, sendmsg = ((157, 44, 46), (167, 206, 211))[column]
    assert returned(prctl, 22, 2) == error | 1  # a filter of its own
    assert returned(prctl, 15) == allow  # PR_SET_NAME
    recvfrom, recvmsg, sendmmsg, recvmmsg = ((45, 47, 307, 299), (207, 212, 269, 243))[column]
    for call in (sendto, recvfrom, sendmmsg, recvmmsg):
        assert returned(call, 3, 1, 1, 0x4000) == allow  # MSG_NOSIGNAL
        assert returned(call, 3, 0, 0, 0x4001) == error | 95
    for call in (sendmsg, recvmsg):
        assert returned(call, 3, 1, 0x40) == allow
        assert returned(call, 3, 0, 1) == error | 95
    assert returned(449) == allow
    assert all(returned(number) == error | 38 for number in (450, 457, 458, 467, 0x40000000 + 39))
    assert returned(mmap, 0, 4096, 3, 0x22) == allow  # private pages
    assert returned(mmap, 0, 4096, 1, 0x01) == allow  # of a file
    assert returned(mmap, 0, 4096, 3, 0x21) == error | 1  # shared, without a file
    assert returned(mmap, 0, 4096, 3, 0x23) == error | 1
    assert returned(mmap, 0, 4096, 3, 0x40022) == error | 1  # huge pages


def test_a_cgroup_is_made_where_memory_is_delegated(tmp_path: Path) -> None:
    """Tests on a directory tree like the kernel's."""
    own = tmp_path / "sys/fs/cgroup/user/session"
    own.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mounts").write_text("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    (tmp_path / "proc/self/cgroup").write_text("1:cpu:/x\n0::/user/session\n")
    assert cgroup.own_group(tmp_path) == own
    assert cgroup.make(tmp_path) is None  # no controller is delegated
    (own.parent / "cgroup.subtree_control").write_text("cpu memory\n")
    assert cgroup.make(tmp_path) is None  # a directory that the kernel does not turn into a cgroup is removed again
    assert [p.name for p in own.parent.iterdir() if p.is_dir()] == ["session"]
    place = own.parent / "one"
    place.mkdir()
    for name, text in {"cgroup.procs": "", "memory.current": str(1 << 20), "memory.max": "max"}.items():
        (place / name).write_text(text)
    group = cgroup.Group(place)
    group.bound(1 << 30)
    assert (place / "memory.max").read_text() == str((1 << 20) + (1 << 30) + cgroup._SLACK)
    cgroup.join(os.dup(group.procs))
    assert (place / "cgroup.procs").read_text() == "0"
    group.close()


def test_memory_counts_if_the_first_thread_of_its_process_has_ended() -> None:
    """The kernel shows such a process as a zombie without memory."""
    text = """
import ctypes, threading, time
def use():
    global kept
    kept = b'x' * (64 << 20)
    print('ready', flush=True)
    time.sleep(60)
threading.Thread(target=use).start()
ctypes.CDLL(None).pthread_exit(None)
"""
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            while "(zombie)" not in Path(f"/proc/{process.pid}/status").read_text():
                time.sleep(0.01)
            for most in (1 << 40, 0):  # the quick count and the exact one
                assert 64 << 20 <= memory.held([process.pid], most) < 128 << 20
        finally:
            process.kill()
    assert memory.held([process.pid], 0) == 0


def test_memory_of_a_process_whose_threads_cannot_be_read_exceeds_any_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each thread ended, and another began, between the listing and the reading."""
    numbers = itertools.count(10**8)
    monkeypatch.setattr("corsa.sandbox.memory.os.listdir", lambda place: [str(next(numbers))])
    assert memory.held([10**8], 1 << 50) > 1 << 50
