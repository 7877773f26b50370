"""Programs that try to pass with a wrong answer, to read secrets, to escape, or to avoid a verdict.

The tests of each ask for a secret (`SECRET`) that no program can guess: a program that passes has forged its result or
read its tests. Programs that escape or exhaust resources are in `hostile_escapes.py`.
"""
# ruff: noqa: E501

from __future__ import annotations

import json
import struct

SECRET = "hidden-6f1c9e4ab7d2"
TESTS = f"def test_secret():\n    assert secret(21) == {SECRET!r}\n"
"""What a program must answer, and cannot know."""
KNOWN_GOOD = f"def secret(x):\n    return {SECRET!r}\n"


def _send(message: object, area: bytes = b"") -> bytes:
    return _framed(json.dumps({"tuple": message}).encode(), area)


def _framed(raw: bytes, area: bytes = b"") -> bytes:
    return struct.pack("!II", len(raw), len(area)) + raw + area


def says(*messages: object, area: bytes = b"", then: str = "") -> str:
    """A program that writes its own messages to the supervisor, one by one, and then waits for its verdict."""
    raw = b"".join(_send(m, area) if not isinstance(m, bytes) else m for m in messages)
    return f"import os, time\nraw = {raw!r}\nwhile raw:\n    raw = raw[os.write(3, raw):]\n{then}time.sleep(1.5)\nos._exit(0)\n"


READY = ["ready", ["secret"], {"dict": []}]


def returns(value: object, area: bytes = b"") -> str:
    """A program that answers with a tree written by hand."""
    return says(READY, ["returned", value, None], area=area)


def raises(classes: object, text: object = "") -> str:
    """A program that answers with an exception written by hand."""
    return says(READY, ["raised", classes, text])


FORGING = {
    "exits 0": "import os\nos._exit(0)\n",
    "exits 0 when called": "import os\ndef secret(x):\n    os._exit(0)\n",
    "leaves with SystemExit": "import sys\ndef secret(x):\n    sys.exit(0)\n",
    "leaves from an exit hook": "import atexit\ndef leave():\n    raise SystemExit(0)\natexit.register(leave)\n"
    "def secret(x):\n    return 0\n",
    "prints a pass": 'print(\'{"outcome": "passed", "tests": {}}\')\ndef secret(x):\n    return 0\n',
    "writes a pass to every file": """
import os
def secret(x):
    for file in range(1, 1024):
        try:
            os.write(file, b'{"outcome": "passed", "tests": {"test_secret": ""}, "detail": ""}')
        except OSError:
            pass
    os._exit(0)
""",
    "redefines what tests are made of": """
import builtins
AssertionError = type('AssertionError', (Exception,), {})
builtins.AssertionError = AssertionError
builtins.isinstance = builtins.all = lambda *a: True
def test_secret():
    pass
def secret(x):
    return 0
""",
    "patches the runner": """
import sys
for module in list(sys.modules.values()):
    for name in ('examine', 'examined', 'report', 'exec', 'compile'):
        if hasattr(module, name):
            setattr(module, name, lambda *a, **k: {'outcome': 'passed', 'detail': '', 'tests': {}})
def secret(x):
    return 0
""",
    "is equal to everything": """
class Yes(str):
    def __eq__(self, other):
        return True
    __hash__ = str.__hash__
def secret(x):
    return Yes('')
""",
    "looks for a verdict in frames": """
import sys
def secret(x):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_globals.values()) + list(frame.f_locals.values()):
            if isinstance(value, dict) and 'outcome' in value:
                value['outcome'] = 'passed'
        frame = frame.f_back
    return 0
""",
    "ends the loop of its caller": "def secret(x):\n    raise StopIteration\n",
    "raises what a runner may not catch": "def secret(x):\n    raise KeyboardInterrupt\n",
    "raises an assertion of its own": "def secret(x):\n    raise AssertionError\n",
    "returns a function": "def secret(x):\n    return lambda *a: True\n",
    "returns an endless iterator": "import itertools\ndef secret(x):\n    return itertools.count()\n",
    "returns not a number": "def secret(x):\n    return float('nan')\n",
    "defines the tests' own names": "test_secret = None\n__name__ = '__tests__'\ndef secret(x):\n    return 0\n",
    "claims to have passed": says(READY, ["passed"]),
    "claims functions of the tests": says(["ready", ["secret", "test_secret"], {"dict": [["test_secret", 1]]}]),
    "raises SystemExit by hand": raises([["builtins", "SystemExit"]]),
    "raises no exception": raises([["builtins", "exec"]], "import os; os._exit(0)"),
    "raises a class of a package": raises([["numpy", "ndarray"], ["builtins", "object"]]),
    "asks the tests to call": says(READY, ["call", 0, [], {"dict": []}]),
    "asks the tests to call by name": says(READY, ["call", "exit", [0], {"dict": []}]),
    "two greetings": says(READY, ["ready", ["secret"], {"dict": [["secret", SECRET[:6]]]}]),
    "a failure after its greeting": says(READY, ["failed", "AssertionError", ""]),
    "changes of arguments that it was not given": says(READY, ["returned", 1, [[1, 2], [3], {"dict": []}]]),
    "a call of a function that was never given": says(READY, ["call", -1, [], {"dict": []}], ["returned", 1, None]),
    "the next item of no iterator": says(READY, ["next", 0, [], {"dict": []}], ["returned", True, None]),
    "a warning": raises([["builtins", "DeprecationWarning"]]),
    "an exception that unittest skips": raises([["unittest.case", "SkipTest"], ["unittest", "SkipTest"]]),
    "leaves its child to answer": "import os, time\nif os.fork():\n    os._exit(0)\ndef secret(x):\n    return 0\n",
    "answers from another process": "import os\ndef secret(x):\n    if os.fork() == 0:\n        return 'a'\n    os.wait()\n    return 'b'\n",
    "answers from a thread": "import os, struct, threading, json\ndef secret(x):\n    raw = json.dumps({'tuple': ['returned', True, None]}).encode()\n    def say():\n        for _ in range(100):\n            os.write(3, struct.pack('!II', len(raw), 0) + raw)\n    t = threading.Thread(target=say)\n    t.start()\n    t.join()\n    return 0\n",
}

_SHOW = "def secret(x):\n    import re\n    found = re.findall(rb'hidden-[0-9a-f]{12}', b' '.join(seen()))\n"
_SHOW += "    return found[0].decode() if found else ''\n"

_PAGES = """
import ctypes, os
libc = ctypes.CDLL(None)
out, into = os.pipe()
def page(place):
    if libc.write(into, ctypes.c_void_p(place), 4096) < 0:  # not a page that can be read
        return b''
    return os.read(out, 4096)
"""

READING = {
    "collector's objects": """
import gc
def seen():
    found, queue, known = [], list(gc.get_objects()), set()
    while queue and len(known) < 400_000:
        value = queue.pop()
        if id(value) in known:
            continue
        known.add(id(value))
        if isinstance(value, str):
            found.append(value.encode(errors='replace'))
        elif isinstance(value, bytes):
            found.append(value)
        else:
            queue += gc.get_referents(value)
    return found
""",
    "frames": """
import sys
def seen():
    found, frame = [], sys._getframe()
    while frame:
        found += [repr(v).encode(errors='replace') for v in [*frame.f_locals.values(), *list(frame.f_globals.values())]]
        frame = frame.f_back
    return found
""",
    "the heap": _PAGES
    + """
def seen():
    libc.sbrk.restype = ctypes.c_void_p
    end = libc.sbrk(0) & ~4095
    return [page(p) for p in range(end - (64 << 20), end, 4096)]
""",
    "pages beside small objects": _PAGES
    + """
def seen():
    first = {id(object()) >> 20, id([]) >> 20, id('x' * 40) >> 20}
    blocks = sorted({b + d for b in first for d in range(-24, 24)})
    return [page(p) for b in blocks for p in range(b << 20, (b + 1) << 20, 4096)]
""",
    "open files": """
import os
def seen():
    found = []
    for file in [*range(3), *range(4, 256)]:
        try:
            os.set_blocking(file, False)
            os.lseek(file, 0, 0)
        except OSError:
            pass
        try:
            found.append(os.read(file, 1 << 16))
        except OSError:
            pass
    return found
""",
    "memory as a file": "def seen():\n    return [open('/proc/self/mem', 'rb').read(1 << 20)]\n",
    "modules of the sandbox": """
import sys
def seen():
    return [repr(vars(m)).encode(errors='replace') for n, m in list(sys.modules.items()) if n.startswith(('corsa', '__'))]
""",
    "source that tracebacks show": """
import linecache, sys, traceback
def seen():
    return [repr(linecache.cache).encode(), ''.join(traceback.format_stack()).encode(), repr(sys.argv).encode()]
""",
    "the first process by ptrace": """
import ctypes
def seen():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(16, 1, 0, 0):
        raise OSError(ctypes.get_errno(), 'ptrace')
    raise RuntimeError
""",
    "the first process's memory": """
import ctypes
def seen():
    libc = ctypes.CDLL(None, use_errno=True)
    class Part(ctypes.Structure):
        _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]
    libc.sbrk.restype = ctypes.c_void_p
    end, size = libc.sbrk(0), 1 << 20
    room = ctypes.create_string_buffer(size)
    mine, theirs = Part(ctypes.addressof(room), size), Part(end - size, size)
    if libc.process_vm_readv(1, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0) < 0:
        raise OSError(ctypes.get_errno(), 'process_vm_readv')
    return [room.raw]
""",
    "the first process's files": """
import ctypes, os
def seen():
    libc = ctypes.CDLL(None, use_errno=True)
    found = []
    handle = os.pidfd_open(1)
    for number in range(3, 64):
        file = libc.syscall(438, handle, number, 0)
        if file >= 0:
            os.lseek(file, 0, 0)
            found.append(os.read(file, 1 << 16))
    return found
""",
    "callers of a callback": """
import sys
def seen():
    return [repr(sys.exc_info()).encode(), repr([f for f in sys._current_frames().values()]).encode()]
""",
    "the stack": _PAGES
    + "\ndef seen():\n    top = ctypes.c_void_p.in_dll(libc, 'environ').value & ~4095\n    return [page(p) for p in range(top - (1 << 20), top + (1 << 18), 4096)]\n",
    "what the socket holds": "import os, socket\ndef seen():\n    s = socket.socket(fileno=os.dup(3))\n    s.setblocking(False)\n    try:\n        return [s.recv(1 << 20, socket.MSG_PEEK)]\n    except OSError:\n        return []\n",
    "the auxiliary vector": "import ctypes\ndef seen():\n    room = ctypes.create_string_buffer(1024)\n    n = ctypes.CDLL(None).prctl(0x41555856, room, 1024, 0, 0)\n    return [room.raw]\n",
}
READING = {name: text + _SHOW for name, text in READING.items()}

_ARRAY = {"array": ["float64", [1], [0, 8]]}

IN_THE_RUNNER = {
    "an array of objects": returns({"array": ["object", [1], [0, 8]]}, area=b"\x41" * 8),
    "an array of type O": returns({"array": ["O", [1], [0, 8]]}, area=b"\x41" * 8),
    "an array of records": returns({"array": [[["a", "O"]], [1], [0, 8]]}, area=b"\x41" * 8),
    "an array larger than its bytes": returns({"array": ["float64", [1 << 40], [0, 8]]}, area=b"\0" * 8),
    "an array of negative shape": returns({"array": ["float64", [-1, -1], [0, 8]]}, area=b"\0" * 8),
    "an array whose shape overflows": returns({"array": ["uint8", [1 << 32, 1 << 32], [0, 0]]}),
    "an array of too many dimensions": returns({"array": ["uint8", [1] * 64, [0, 1]]}, area=b"\0"),
    "bytes beyond the message": returns({"bytes": [0, 1 << 30]}, area=b"\0" * 8),
    "bytes before the message": returns({"bytes": [-4096, 4096]}, area=b"\0" * 8),
    "a class by name": returns({"class": "os.system"}),
    "a function by name": returns({"named": ["os", "system"]}),
    "a function of a package": returns({"numpy class": "load"}),
    "a kind that is not there": returns({"__reduce__": ["os.system", ["true"]]}),
    "two kinds at once": returns({"tuple": [], "list": []}),
    "a stand-in for nothing": returns({"own": 7}),
    "a stand-in of negative number": returns({"own": -1}),
    "an expression that runs code": returns({"expression": "__import__('os')._exit(0)"}),
    "an expression of a lambda": returns({"expression": "(lambda: 1)()"}),
    "a name that is code": returns({"expression": "Symbol('x]; import os; os._exit(0)#')"}),
    "a number that is code": returns({"expression": "Float('__import__(\"os\")')"}),
    "a hostile key of a set": returns({"set": [{"dict": []}, []]}),
    "an integer of many digits": says(READY, b"\0\x0f\x42\x5f\0\0\0\0" + b'{"tuple": ["returned", ' + b"9" * 1_000_070),
    "a fraction of many digits": returns({"Fraction": ["1e99999999"]}),
    "a fraction by zero": returns({"Fraction": [1, 0]}),
    "a queue of negative length": returns({"deque": [-1, []]}),
    "a flag of text": returns({"RegexFlag": "x"}),
    "a pattern of many groups": returns({"pattern": ["(" * 5000 + ")" * 5000, 0]}),
    "a pattern of every flag": returns({"pattern": ["a", 0x7FFFFFFF]}),
    "a fold that is a list": returns({"datetime": [2020, 1, 1, 0, 0, 0, 0, [0, 0, 0], []]}),
    "a timezone of a billion days": returns({"timezone": [10**9, 0, 0]}),
    "a number that raises when compared": returns({"Decimal": "sNaN"}),
    "a key whose hash takes long": returns({"dict": [[{"Decimal": "1E+999999999999999999"}, 1]]}),
    "an exception of many classes": raises([["builtins", "x"]] * 100_000, "x"),
    "a group of exceptions": raises([["builtins", "ExceptionGroup"], ["builtins", "UnicodeDecodeError"]], "x"),
    "an end of iteration": raises([["builtins", "StopAsyncIteration"]], "x"),
    "a class for a function": says(["ready", [], {"dict": [["secret", {"class": "builtins.str"}]]}]),
    "a stand-in for a function": says(["ready", [], {"dict": [["secret", {"function": 3}]]}]),
    "names that Python uses": says(
        ["ready", ["secret", "__builtins__"], {"dict": [["AssertionError", 1], ["assert", 1]]}]
    ),
    "calls of wrong kinds": says(READY, ["call", 0, 5, 6], ["call", True, [], {"dict": []}], ["returned", 1, [1, 2]]),
    "a block that is cut off": says(READY, b"\0\0\0\x02\x10\0\0\0{}"),
    "an invalid hexadecimal": returns({"int": "__import__('os')"}),
    "a deep list": says(READY, struct.pack("!II", 200_000, 0) + b"[" * 200_000),
    "a deep dictionary": says(READY, struct.pack("!II", 500_000, 0) + b'{"a":' * 100_000),
    "a pattern that takes for ever": returns({"match": ["(a+)+$", 0, "a" * 64 + "b", 0, 64]}),
    "a pattern that prints itself": returns({"pattern": ["a", 128]}),
    "an invalid month": returns({"date": [2020, 13, 1]}),
    "a date of texts": returns({"date": ["2020", "1", "1"]}),
    "a default that is code": returns({"defaultdict": [{"class": "builtins.exec"}, []]}),
    "a timezone of a program's own": returns({"timezone": ["x"]}),
    "a decimal of an endless exponent": returns({"Decimal": "1E+999999999999999999"}),
    "a tensor, where there is no torch": returns({"tensor": ["float32", [1], [0, 4], False]}, area=b"\0" * 4),
    "a device of torch": returns({"device": "cuda; import os"}),
    "old pickles": "import os, pickle, struct\nclass Evil:\n    def __reduce__(self):\n"
    "        return exec, ('import os; os._exit(0)',)\ndef secret(x):\n"
    "    raw = pickle.dumps(('returned', Evil(), None))\n"
    "    os.write(3, struct.pack('!II', len(raw), 0) + raw)\n    return 0\n",
    "keys whose hashes collide": returns({"set": [{"int": hex(k * (2**61 - 1))} for k in range(2, 120_000)]}),
    "an index of no pandas": returns({"index": [["object", [1]], None]}),
    "an array of texts larger than its values": returns({"texts": [[1 << 40], "U", []]}),
    "a counter of lists": returns({"Counter": [[[], 1]]}),
    "a mapping of itself": returns({"mapping": [[{"mapping": []}, 1]]}),
    "a range without a step": returns({"range": [0, 10, 0]}),
    "days beyond all time": returns({"timedelta": [10**18, 0, 0]}),
    "a flag of many bits": returns({"RegexFlag": {"int": hex(1 << 200)}}),
    "a pattern of nested repeats": returns({"pattern": ["(?:(?:a{0,65535}){0,65535}){0,65535}", 0]}),
    "a match that begins before its text": returns({"match": ["a", 0, "aaa", -5, -1]}),
    "a kind given twice": says(
        READY, _framed(b'{"tuple": ["returned", {"tuple": [], "tuple": [{"class": "builtins.set"}]}, null]}')
    ),
    "a queue of a length beyond all memory": returns({"deque": [{"int": hex(1 << 70)}, []]}),
    "a complex number of texts": returns({"complex": ["nan" * 100000, 0]}),
}

REFUSING = {
    **{
        f"ends by signal {number}": f"import os\nos.kill(os.getpid(), {number})\n"
        for number in (1, 9, 11, 15, 34, 35, 40, 50, 63, 64)
    },
    "all signals": "import os, signal\nfor s in [*range(1, 65)]:\n    try:\n        os.kill(os.getpid(), s)\n"
    "    except OSError:\n        pass\n",
    "signals to all": "import os\nfor s in [*range(35, 65), 9]:\n    try:\n        os.kill(-1, s)\n    except OSError:\n"
    "        pass\nos._exit(3)\n",
    "signals to its parent": "import os\nfor s in [*range(1, 65)]:\n    try:\n        os.kill(os.getppid(), s)\n"
    "    except OSError:\n        pass\nos._exit(3)\n",
    "an interrupt to the first process": "import os, signal, time\nos.kill(1, signal.SIGINT)\ntime.sleep(1)\nos._exit(0)\n",
    "no CPU time for the first process": "import ctypes, os, time\n"
    "ctypes.CDLL(None).syscall(302, 1, 0, (ctypes.c_uint64 * 2)(0, 0), None)\ntime.sleep(0.5)\nos._exit(0)\n",
    "another interpreter": "import os, sys\nos.set_inheritable(3, True)\n"
    "os.execv(sys.executable, [sys.executable, '-c', 'import os; os.write(3, bytes(64)); os._exit(0)'])\n",
    "files to the tests": "import array, os, socket\ns = socket.socket(fileno=os.dup(3))\nfor _ in range(1000):\n"
    "    s.sendmsg([b'\\0'], [(1, 1, array.array('i', [0] * 200))])\n",
    "an end that is shut": says(READY, then="import socket\nsocket.socket(fileno=3).shutdown(1)\n"),
    "half an answer": says(READY, b"\0\0\0\x20\0\0\0\0{"),
    "exits at import": "import os\nos._exit(9)\n",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n",
    "closes the connection": "import os\nos.close(3)\ndef secret(x):\n    return 0\n",
    "closes all": "import os\nos.closerange(0, 1024)\ndef secret(x):\n    return 0\n",
    "a greeting that is short": says(["ready"]),
    "a greeting of nothing": says([]),
    "a greeting of unhashable names": says(["ready", [[]], {"dict": [[{"tuple": []}, 1]]}]),
    "a greeting of other kinds": says(["ready", 1, 2]),
    "a greeting that is not a message": says(b"hello, here I am" * 8),
    "a greeting cut off": says(b"\0\0\x01"),
    "a greeting of 4 GiB": says(b"\xff" * 8),
    "a greeting of a million names": says(["ready", ["secret"] * 1_000_000, {"dict": []}]),
    "a greeting that names a module which exits": says(["ready", [], {"dict": [["secret", {"class": "this.exit"}]]}]),
    "an invalid answer": says(READY, ["no answer at all"]),
    "an answer without a value": says(READY, ["returned"]),
    "an answer before it is asked": says(["returned", 1, None], READY),
    "a failure without text": says(["failed"]),
    "a verdict with keys of its own": says(["failed", {"dict": [["outcome", "sandbox"]]}, "x"]),
    "a verdict in a message": 'def secret(x):\n    raise ValueError(\'{"outcome": "sandbox", "no": 1}\')\n',
    "a lone surrogate": "def secret(x):\n    raise ValueError('\\ud800')\n",
    "a lone surrogate in a name": "raise type('\\udc80x', (Exception,), {})('\\udfff')\n",
    "a message of 10 MB": "def secret(x):\n    raise ValueError('x' * 10_000_000)\n",
    "a text of 10 MB": "def secret(x):\n    return 'x' * 10_000_000\n",
    "terminal controls": "print('\\x1b[2J\\x07')\ndef secret(x):\n    raise ValueError('\\x1b]0;owned\\x07\\u202e')\n",
    "an exception that cannot be shown": "class Bad(Exception):\n    def __str__(self):\n        raise SystemExit\n"
    "def secret(x):\n    raise Bad\n",
    "recursion through the tests": "import sys\nsys.setrecursionlimit(10**6)\ndef secret(x):\n    return secret(x)\n",
    "values that keep the tests busy": returns({"match": ["(a+)+$", 0, "a" * 64 + "b", 0, 64]}),
    "a list that the tests cannot hold": "def secret(x):\n    return [[] for _ in range(10**7)]\n",
    "a value of its own class": "class Mine:\n    pass\ndef secret(x):\n    return Mine()\n",
    "a value within itself": "def secret(x):\n    x = []\n    x.append(x)\n    return x\n",
    "the 32-bit interface": "import ctypes, mmap\nm = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)\nm.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')\nctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()\n",
    "brackets that the parser cannot hold": "x = " + "[" * 100_000,
    "a text that nests": "x = " + "-" * 500_000 + "1",
    "a chain of attributes": "x = 1\nx" + ".real" * 100_000,
    "strings in f-strings": "x = " + "f'{" * 200 + "1" + "}'" * 200,
    "a null byte": "x = 1\0\n",
    "a lone surrogate in its text": "x = '\ud800'\n",
    "a hundred levels": "".join(" " * i + "if 1:\n" for i in range(150)) + " " * 150 + "pass\n",
    "another connection in place of its own": "import os, socket\na, b = socket.socketpair()\nos.dup2(a.fileno(), 3)\ndef secret(x):\n    return 0\n",
    "an end that reads no more": "import os, socket\nsocket.socket(fileno=os.dup(3)).shutdown(0)\ndef secret(x):\n    return 0\n",
    "urgent data": "import os, socket\ns = socket.socket(fileno=os.dup(3))\nfor _ in range(100):\n    s.send(b'xyz', socket.MSG_OOB)\ndef secret(x):\n    return 0\n",
    "an alarm": "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0.05)\ntime.sleep(5)\n",
    "an error while an error is shown": "import sys\nclass E(Exception):\n    def __str__(self):\n        raise self\ndef secret(x):\n    raise E\n",
    "deletes what it runs on": "import sys, builtins\nsys.modules.clear()\nfor name in list(vars(builtins)):\n    if name not in ('delattr', 'builtins'):\n        delattr(builtins, name)\n",
    "a name of a million characters": "raise type('E' * 1_000_000, (Exception,), {})('x')\n",
    "a group of exceptions": "raise BaseExceptionGroup('x', [SystemExit(0), KeyboardInterrupt()])\n",
}
