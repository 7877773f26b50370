"""Programs that exhaust resources, try to escape, or leave something behind.

`ESCAPES` and the second half of `LEFTOVERS` report whether their attempt was refused.
"""
# ruff: noqa: E501

from __future__ import annotations

from hostile_programs import READY, says

_LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\ndef call(*a):\n    found = libc.syscall(*a)\n"
_LIBC += "    if found < 0:\n        raise OSError(ctypes.get_errno(), 'refused')\n    return found\n"
_LOCKS = (
    "import fcntl, os, struct\nf = os.open('/tmp/x', os.O_RDWR | os.O_CREAT)\nn = 1 << 40\nwhile True:\n    n -= 2\n"
)
_LOCKS += "    fcntl.fcntl(f, COMMAND, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, n, 1, 0))\n"

DENYING = {
    "endless loop": "while True:\n    pass\n",
    "endless loop in C": "sum(iter(int, 1))\n",
    "sleep": "import time\ntime.sleep(60)\n",
    "sleep that ignores signals": "import signal, time\nfor s in signal.valid_signals():\n    try:\n"
    "        signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError):\n        pass\ntime.sleep(60)\n",
    "fork bomb": "import os\nwhile True:\n    os.fork()\n",
    "quiet fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n",
    "threads": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,)).start()\n",
    "memory": "x = []\nwhile True:\n    x.append(bytearray(1 << 24))\n",
    "memory of many processes": "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        break\n"
    "x = b'x' * (100 << 20)\ntime.sleep(99)\n",
    "memory of many small processes": "import os, time\nfor _ in range(16):\n    if os.fork() == 0:\n        break\n"
    "x = b'x' * (30 << 20)\ntime.sleep(99)\n",
    "memory of processes that execute": "import os, sys, time\nfor _ in range(12):\n    if os.fork() == 0:\n"
    "        os.execv(sys.executable, [sys.executable, '-c', 'x = b\"x\" * (60 << 20); import time; time.sleep(99)'])\n"
    "time.sleep(99)\n",
    "memory of processes whose first thread has ended": "import ctypes, os, threading, time\nfor _ in range(10):\n"
    "    if os.fork() == 0:\n        break\ndef use():\n    global x\n    time.sleep(0.3)\n    x = b'x' * (60 << 20)\n    time.sleep(99)\n"
    "threading.Thread(target=use).start()\nctypes.CDLL(None).pthread_exit(None)\n",
    "memory of processes that cannot be inspected": "import ctypes, os, time\nctypes.CDLL(None).prctl(4, 0, 0, 0, 0)\n"
    "for _ in range(10):\n    if os.fork() == 0:\n        break\nx = b'x' * (60 << 20)\ntime.sleep(99)\n",
    "locks on a file": _LOCKS.replace("COMMAND", "fcntl.F_SETLK"),
    "locks of an open file": _LOCKS.replace("COMMAND", "37"),
    "events that nobody reads": _LIBC
    + "file = call(294, 0)\ncall(254, file, b'/tmp', 0xfff)\nn = 0\nwhile True:\n    n += 1\n"
    "    open(f'/tmp/{n}' + 'x' * 200, 'w').close()\n    os.unlink(f'/tmp/{n}' + 'x' * 200)\n",
    "asynchronous requests": _LIBC
    + "while True:\n    place = ctypes.c_ulong(0)\n    call(206, 128, ctypes.byref(place))\n",
    "many mappings": "import ctypes, os, time\nfor _ in range(20):\n    if os.fork() == 0:\n        break\n"
    "libc = ctypes.CDLL(None)\nlibc.mmap.restype = ctypes.c_void_p\n"
    "libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]\nn = 0\nwhile True:\n"
    "    n += 1\n    if libc.mmap(None, 4096, 1 + n % 2 * 2, 0x22, -1, 0) == 2**64 - 1:\n        time.sleep(99)\n",
    "files in flight": "import array, socket\nkept = []\nwhile True:\n    kept.append(socket.socketpair())\n"
    "    own = array.array('i', [s.fileno() for s in kept[-1]] * 20)\n    kept[-1][0].sendmsg([b'x'], [(1, 1, own)])\n",
    "extended attributes": "import os\nopen('/tmp/x', 'w').close()\nn = 0\nwhile True:\n    n += 1\n"
    "    os.setxattr('/tmp/x', f'user.{n}', bytes(60_000))\n",
    "directories in one another": "import os\nos.chdir('/tmp')\nwhile True:\n    os.mkdir('d')\n    os.chdir('d')\n",
    "segments of System V": "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.shmat.restype = ctypes.c_void_p\n"
    "while True:\n    n = libc.shmget(0, 64 << 20, 0o1600)\n    if n < 0:\n        raise OSError(ctypes.get_errno(), 'shmget')\n"
    "    ctypes.memset(libc.shmat(n, 0, 0), 1, 64 << 20)\n    libc.shmdt(0)\n",
    "files in memory": "import os\nkept = []\nwhile True:\n    kept.append(os.memfd_create('x'))\n"
    "    os.write(kept[-1], bytes(32 << 20))\n",
    "shared pages of nobody": "import mmap, os\nwhile True:\n    m = mmap.mmap(-1, 64 << 20)\n    m[:] = bytes(64 << 20)\n"
    "    if os.fork() == 0:\n        os.pause() if hasattr(os, 'pause') else __import__('time').sleep(99)\n    m.close()\n",
    "shared pages of zero": "import mmap, os\nf = os.open('/dev/zero', os.O_RDWR)\nwhile True:\n"
    "    m = mmap.mmap(f, 64 << 20)\n    m[:] = b'x' * (64 << 20)\n    if os.fork() == 0:\n"
    "        __import__('time').sleep(99)\n    m.close()\n",
    "disk": "n = 0\nwhile True:\n    n += 1\n    with open(f'/tmp/{n}', 'wb') as f:\n        f.write(bytes(8 << 20))\n",
    "disk of shared memory": "n = 0\nwhile True:\n    n += 1\n    with open(f'/dev/shm/{n}', 'wb') as f:\n"
    "        f.write(bytes(8 << 20))\n",
    "one large file": "with open('/tmp/x', 'wb') as f:\n    f.write(bytes(48 << 20))\n",
    "many small files": "n = 0\nwhile True:\n    n += 1\n    open(f'/tmp/{n}', 'w').close()\n",
    "open files": "kept = [open('/dev/null') for _ in range(1000)]\n",
    "full pipes": "import fcntl, os\nkept = []\nwhile True:\n    kept.append(os.pipe())\n"
    "    fcntl.fcntl(kept[-1][1], 1031, 1 << 20)\n    os.set_blocking(kept[-1][1], False)\n"
    "    os.write(kept[-1][1], bytes(1 << 20))\n",
    "output": "while True:\n    print('x' * 1000)\n",
    "output of one line": "import os\nwhile True:\n    os.write(2, b'x' * 65536)\n",
    "a full connection": "import os\nwhile True:\n    os.write(3, b'\\0\\0\\0\\0\\0\\0\\0\\0')\n",
    "calls without end": says(
        READY, then='while True:\n    os.write(3, b\'\\0\\0\\0\\x20\\0\\0\\0\\0{"tuple": ["next", 0, [], null]}\')\n'
    ),
    "crash": "import ctypes\nctypes.string_at(0)\n",
    "deep recursion": "def f(n):\n    return f(n + 1)\nf(0)\n",
    "deeper recursion": "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self):\n"
    "        return repr(self)\nrepr(A())\n",
    "a slow pattern": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')\n",
    "a large power": "x = 9 ** 9 ** 9\n",
    "a chain of processes": "import os, time\nif os.fork() == 0:\n    while True:\n        if os.fork():\n            os._exit(0)\ntime.sleep(99)\n",
    "timers": _LIBC + "while True:\n    call(222, 0, None, ctypes.byref(ctypes.c_int(0)))\n",
    "rules of landlock": _LIBC
    + "rules = call(444, (ctypes.c_uint64 * 3)(0, 3, 0), 16, 0)\nfor port in range(65536):\n    call(445, rules, 2, (ctypes.c_uint64 * 2)(1, port), 0)\nraise SystemExit('made')\n",
    "output of many processes": "import os\nfor _ in range(16):\n    if os.fork() == 0:\n        break\nwhile True:\n    os.write(1, b'x' * 65536)\n",
}

NAMED = {
    "memory": {"memory"},
    "memory of many processes": {"memory"},
    "memory of many small processes": {"memory"},
    "memory of processes that execute": {"memory"},
    "memory of processes whose first thread has ended": {"memory"},
    "memory of processes that cannot be inspected": {"memory"},
    "locks on a file": {"error"},
    "locks of an open file": {"error"},
    "events that nobody reads": {"error"},
    "asynchronous requests": {"error"},
    "files in flight": {"error"},
    "extended attributes": {"disk", "error"},
    "directories in one another": {"disk"},
    "segments of System V": {"error"},
    "files in memory": {"error"},
    "shared pages of nobody": {"error"},
    "shared pages of zero": {"error"},
    "disk": {"disk"},
    "disk of shared memory": {"disk"},
    "many small files": {"disk"},
    "open files": {"files"},
    "output": {"output"},
    "output of one line": {"output"},
    "fork bomb": {"processes"},
    "timers": {"processes"},
    "rules of landlock": {"error"},
    "output of many processes": {"output"},
}
"""What some of these are stopped by: memory that is counted, or a call that is refused."""

_PEER = "import socket, struct\npeer, = struct.unpack('i', socket.socket(fileno=os.dup(3)).getsockopt(1, 77, 4))\n"

ESCAPES = {
    "reads a file of the host": "open('/etc/passwd').read()",
    "reads a home": "import os\nos.listdir('/root')\nos.listdir('/home')",
    "reads the tests' file": f"open({__file__!r}).read()",
    "reads the kernel's log": _LIBC + "call(103, 3, ctypes.create_string_buffer(100), 100)",
    "writes beside Python": "import sys\nopen(sys.prefix + '/lib/x', 'w')",
    "writes to the root": "open('/x', 'w')",
    "writes to the sandbox's code": "open('/sandbox/corsa/x.py', 'w')",
    "reads another process": "open('/proc/1/environ').read()",
    "reads its own process": "open('/proc/self/maps').read()",
    "reads the mounts": "open('/proc/mounts').read()",
    "makes a device": "import os, stat\nos.mknod('/tmp/sda', 0o600 | stat.S_IFBLK, os.makedev(8, 0))",
    "kills the first process": "import os, time\nos.kill(1, 9)\ntime.sleep(0.2)\nos.kill(1, 0)\nraise OSError('it lives')",
    "connects to this machine": "import socket\nsocket.create_connection(('127.0.0.1', LISTENING_PORT), 1)",
    "connects by IPv6": "import socket\nsocket.create_connection(('::1', LISTENING_PORT), 1)",
    "listens on the loopback": "import socket\ns = socket.create_server(('127.0.0.1', 0))\n"
    "socket.create_connection(s.getsockname(), 1)",
    "looks up a name": "import socket\nsocket.getaddrinfo('pypi.org', 443)",
    "asks the kernel for its interfaces": "import socket\nsocket.socket(16, 3, 0)",
    "a pair of sockets of the network": "import errno, socket\ntry:\n    socket.socketpair(socket.AF_INET)\nexcept OSError as error:\n"
    "    if error.errno == errno.EAFNOSUPPORT:  # any other answer comes from the sockets, which the kernel has made\n        raise",
    "a raw socket": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "a socket to the host's machine": "import socket\nsocket.socket(40, 1)",
    "a socket of the kernel's ciphers": "import socket\nsocket.socket(38, 5)",
    "becomes root": "import os\nos.setuid(0)",
    "gets a capability back": _LIBC
    + "head = (ctypes.c_uint32 * 2)(0x20080522, 0)\nsets = (ctypes.c_uint32 * 6)(*[2**21] * 6)\n"
    "call(126, head, sets)",
    "mounts": _LIBC + "call(165, b'none', b'/tmp', b'tmpfs', 0, b'')",
    "takes a mount off": _LIBC + "call(166, b'/proc', 2)",
    "opens a file system": _LIBC + "call(430, b'tmpfs', 0)",
    "makes a user namespace": _LIBC + "call(272, 0x10000000)",
    "makes a namespace with a process": _LIBC + "call(56, 0x10000000 | 17, 0, 0, 0, 0)",
    "makes a namespace with clone3": _LIBC
    + "args = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)\ncall(435, args, 88)",
    "enters a namespace": _LIBC + "call(308, os.pidfd_open(os.getpid()), 0x20000000)",
    "changes its root": "import os\nos.chroot('/tmp')",
    "reads the session's keys": _LIBC + "room = ctypes.create_string_buffer(64)\n"
    "key = call(249, b'user', b'corsa-test', None, 0)\ncall(250, 11, key, room, 64)",
    "writes a key": _LIBC + "call(248, b'user', b'corsa-left', b'x', 1, -3)",
    "asks for its keyring": _LIBC + "call(250, 0, -3, 1)",
    "loads a program into the kernel": _LIBC + "call(321, 5, ctypes.create_string_buffer(128), 128)",
    "counts events": _LIBC + "call(298, ctypes.create_string_buffer(128), 0, -1, -1, 0)",
    "handles page faults": _LIBC + "call(323, 1)",
    "a ring of requests": _LIBC + "call(425, 4, ctypes.create_string_buffer(256))",
    "secret memory": _LIBC + "call(447, 0)",
    "a table of segments": _LIBC + "call(154, 0, ctypes.create_string_buffer(64), 64)",
    "traces": _LIBC + "call(101, 0, 0, 0, 0)",
    "another interface of the kernel": _LIBC + "call(0x40000000 + 39)",
    "a filter of its own": _LIBC + "call(317, 1, 8, 0)",
    "a file handle": _LIBC + "call(304, -100, ctypes.create_string_buffer(64), 0)",
    "loads a module": _LIBC + "call(175, b'x', 1, b'')",
    "sets the clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)",
    "names the machine": "import socket\nsocket.sethostname('owned')",
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (10**6, 10**6))",
    "signals the supervisor through its socket": _LIBC + _PEER + "call(424, peer, 9, None, 0)",
    "signals the supervisor's group through its socket": _LIBC + _PEER + "call(424, peer, 9, None, 4)",
    "takes the supervisor's files through its socket": _LIBC + _PEER + "call(438, peer, 3, 0)",
    "opens the supervisor's namespace through its socket": _LIBC + _PEER + "import fcntl\nfcntl.ioctl(peer, 0xff04)",
    "learns the supervisor's number": "import os, socket, struct\n"
    "pid, *_ = struct.unpack('3i', socket.socket(fileno=os.dup(3)).getsockopt(1, 17, 12))\n"
    "if pid == 0:\n    raise OSError('none')",
    "lists the mounts": _LIBC + "call(458, (ctypes.c_uint64 * 4)(24, 2**64 - 1), (ctypes.c_uint64 * 64)(), 64, 0)",
    "opens a tree": _LIBC + "call(467, -100, b'/', 0, None, 0)",
    "a call of a later kernel": _LIBC
    + "call(461, ctypes.create_string_buffer(4096), ctypes.byref(ctypes.c_uint32(4096)), 0)",
    "a context for asynchronous requests": _LIBC + "call(206, 128, ctypes.byref(ctypes.c_ulong(0)))",
    "watches the machine's files": _LIBC + "call(254, call(294, 0), b'/usr/lib', 0xfff)",
    "is told of changes in a directory": "import fcntl, os\nfcntl.fcntl(os.open('/usr/lib', os.O_RDONLY), 1026, 2)",
    "flushes the machine's disks": _LIBC + "call(162)",
    "flushes one disk": _LIBC + "call(306, os.open('/usr/lib', os.O_RDONLY))",
    "locks a file of the machine": "import fcntl\nfcntl.flock(open('/etc/ld.so.cache'), fcntl.LOCK_EX)",
    "locks a part of a file of the machine": "import fcntl\nfcntl.lockf(open('/etc/ld.so.cache'), fcntl.LOCK_SH)",
    "takes a lease on a file of the machine": "import fcntl\nfcntl.fcntl(open('/etc/ld.so.cache'), 1024, 0)",
    "asks for real time": "import os\nos.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "asks for priority over its user": "import os\nos.setpriority(os.PRIO_USER, 0, -1)",
    "adds to the machine's randomness": "import fcntl, os\nfcntl.ioctl(os.open('/dev/random', os.O_RDWR), 0x40085203, bytes(16))",
    "follows a link out": "import os\nos.symlink('/../../../../etc/passwd', '/tmp/link')\nopen('/tmp/link').read()",
    "asks for priority": "import os\nos.setpriority(os.PRIO_PROCESS, 0, -5)",
    "brings up its loopback": "import fcntl, socket, struct\nfcntl.ioctl(socket.socket(socket.AF_UNIX), 0x8914, struct.pack('16sH14x', b'lo', 1))",
    "an address for its loopback": "import fcntl, socket, struct\nfcntl.ioctl(socket.socket(socket.AF_UNIX), 0x8916, struct.pack('16sHH4s8x', b'lo', 2, 0, bytes([127, 0, 0, 1])))",
    "rules of its own": _LIBC + "call(444, None, 0, 1)",
    "a filter of its own by another call": _LIBC
    + "class P(ctypes.Structure):\n    _fields_ = [('n', ctypes.c_ushort), ('f', ctypes.c_char_p)]\nimport struct\nif libc.prctl(22, 2, ctypes.byref(P(1, struct.pack('HBBI', 6, 0, 0, 0x7fff0000))), 0, 0):\n    raise OSError('refused')",
    "urgent data": "import socket\na, b = socket.socketpair()\na.send(b'x', socket.MSG_OOB)",
    "urgent data in a message": "import socket\na, b = socket.socketpair()\na.sendmsg([b'x'], [], socket.MSG_OOB)",
    "waits for urgent data": "import socket\na, b = socket.socketpair()\nb.setblocking(False)\na.send(b'x', socket.MSG_OOB)\nb.recv(1, socket.MSG_OOB)",
    "links a file of the machine into its directory": "import os\nos.link('/etc/ld.so.cache', '/tmp/x')",
    "changes the mode of a file": "import os, sys\nos.chmod(sys.executable, 0o777)",
    "changes the time of a file": "import os, sys\nos.utime(sys.executable)",
    "a capability for a file": "import os\nopen('/tmp/x', 'w').close()\nos.setxattr('/tmp/x', 'security.capability', bytes.fromhex('0100000200200000000000000000000000000000'))",
    "real time for its disk": _LIBC + "call(251, 1, 0, 1 << 13)",
    "a deadline": _LIBC + "call(314, 0, (ctypes.c_uint64 * 6)(48 | 6 << 32, 0, 0, 10**7, 10**7, 10**7), 0)",
    "another place for its memory": "import ctypes\nif ctypes.CDLL(None).prctl(35, 13, 3, 0, 0):\n    raise OSError('refused')",
    "another user of files": "import ctypes, os\nctypes.CDLL(None).setfsuid(0)\nif ctypes.CDLL(None).setfsuid(-1) != 0:\n    raise OSError('refused')",
    "the machine's domain": _LIBC + "call(171, b'x', 1)",
    "a socket of packets in memory": "import socket\nsocket.socket(44, 3)",
    "the root by an open directory": "import os\nf = os.open('/', os.O_RDONLY)\nos.stat('../etc/shadow', dir_fd=f)",
    "input of a terminal": "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')",
    "a file without a name beside Python": "import os, sys\nos.open(sys.prefix + '/lib', os.O_TMPFILE | os.O_RDWR)",
    "writes through a mapping": "import mmap\nf = open('/etc/ld.so.cache', 'rb')\nm = mmap.mmap(f.fileno(), 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)\nm[0] = 0",
    "frees the machine's cache": "import os\nf = os.open('/etc/ld.so.cache', os.O_RDONLY)\nos.posix_fadvise(f, 0, 0, os.POSIX_FADV_DONTNEED)",
    "opens itself for writing": "import sys\nopen(sys.executable, 'r+b')",
}

LEFTOVERS = {
    "a file": ("open('/tmp/left', 'w').write('x')", "open('/tmp/left').read()"),
    "a file of shared memory": ("open('/dev/shm/left', 'w').write('x')", "open('/dev/shm/left').read()"),
    "an abstract socket of a daemon": (
        "import os, socket, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        s = socket.socket(socket.AF_UNIX)\n        s.bind('\\0left')\n        s.listen()\n        time.sleep(60)\n"
        "    os._exit(0)\ntime.sleep(0.2)",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0left')",
    ),
    "a segment of System V": (
        "import ctypes\nctypes.CDLL(None).shmget(4711, 4096, 0o1666)",
        "import ctypes\nif ctypes.CDLL(None).shmget(4711, 4096, 0o666) < 0:\n    raise OSError('none')",
    ),
    "a module that is patched": (
        "import sys, json\njson.dumps = json.loads = lambda *a: 'left'\nsys.left = 1",
        "import json\nif json.dumps(1) != 'left':\n    raise OSError('as new')",
    ),
    "code beside the package": (
        "import sys\nopen(sys.path[-1] + '/left.py', 'w').write('x = 1')",
        "try:\n    import left\nexcept ImportError:\n    raise OSError('none')",
    ),
    "a file in /proc": (
        "import os\nos.chmod('/proc', 0o755)\nopen('/proc/left', 'w').write('x')",
        "open('/proc/left').read()",
    ),
    "another mode of its directory": (
        "import os\nos.chmod('/tmp', 0)",
        "import os\nif os.stat('/tmp').st_mode & 0o777 == 0o700:\n    raise OSError('as new')",
    ),
    "an abstract socket": (
        "import socket, array, os\ns = socket.socket(socket.AF_UNIX)\ns.bind('\\0left2')\ns.listen()\na = socket.socket(fileno=os.dup(3))\nsocket.send_fds(a, [b'\\0' * 8], [s.fileno()])",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0left2')",
    ),
    "a stopped process": (
        "import os, signal, time\nif os.fork() == 0:\n    os.setsid()\n    os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(0.1)",
        "import os\nfor n in range(2, 64):\n    try:\n        os.kill(n, 0)\n    except OSError:\n        continue\n    if n not in (os.getpid(), os.getppid()):\n        break\nelse:\n    raise OSError('none')",
    ),
}
"""What a program leaves, and how a later one looks for it."""
