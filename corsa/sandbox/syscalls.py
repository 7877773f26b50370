"""A filter that denies system calls which programs and tests do not need.

Each denied call gives access to memory that no limit counts, to another process, to keys or namespaces, or to a part of
the kernel with a history of vulnerabilities. The filter is classic BPF (seccomp(2)). It is written here because the
standard library has none and libseccomp's Python binding is not on the package index.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from functools import lru_cache

_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_DENIED = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # keys
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # memory that belongs to no process, or is counted for no process
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "io_setup": (206, 0),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # parts of the kernel
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "seccomp": (317, 277),
    "vmsplice": (278, 75),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "uselib": (134, None),
    # the machine
    "sync": (162, 81),
    "syncfs": (306, 267),
    "fadvise64": (221, 223),
    "syslog": (103, 116),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
}
"""Calls that fail with EPERM, with their numbers on x86_64 and aarch64."""
_NEWEST = 449
"""The last call considered here (futex_waitv, Linux 5.16). Later ones fail with ENOSYS, as on an older kernel."""
_CLONE, _CLONE3, _MMAP, _FCNTL, _FLOCK, _PRCTL = (56, 220), (435, 435), (9, 222), (72, 25), (73, 32), (157, 167)
_SOCKETS = (
    (41, 198),
    (53, 199),
)  # socket, and socketpair, which makes two before it finds that their family has no pairs
_FLAGS = {
    "sendto": (44, 206, 3),
    "recvfrom": (45, 207, 3),
    "sendmsg": (46, 211, 2),
    "recvmsg": (47, 212, 2),
    "sendmmsg": (307, 269, 3),
    "recvmmsg": (299, 243, 3),
}
"""Calls with flags of a message: their numbers, and which argument has the flags."""
_LOCKS = {"F_SETLK": 6, "F_SETLKW": 7, "F_OFD_SETLK": 37, "F_OFD_SETLKW": 38, "F_SETLEASE": 1024, "F_NOTIFY": 1026}
"""Commands of fcntl that take memory which no limit counts, and affect files that other processes use."""
_NAMESPACES = 0x7E020000
_AF_UNIX, _MSG_OOB = 1, 1
_MAP_SHARED, _MAP_ANONYMOUS, _MAP_HUGETLB = 0x01, 0x20, 0x40000

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _MACHINE, _ARGUMENTS = 0, 4, 16
_SET_SECCOMP, _MODE_FILTER = 22, 2


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _instructions(machine: str) -> list[tuple[int, int, int, int]]:
    """Classic BPF: (code, jump if true, jump if false, operand). A jump is the number of instructions to skip."""
    column = list(_MACHINES).index(machine)

    def denied(condition: tuple[int, int], error: int) -> list[tuple[int, int, int, int]]:
        """Fail with `error` if the loaded word meets the condition."""
        return [(condition[0], 0, 1, condition[1]), (_RETURN, 0, 0, _ERROR | error)]

    def of_call(number: int, body: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
        """Apply `body` to one call only, and allow the call if `body` does not deny it."""
        return [(_EQUAL, 0, len(body) + 1, number), *body, (_RETURN, 0, 0, _ALLOW)]

    found = [(_LOAD, 0, 0, _MACHINE), (_EQUAL, 1, 0, _MACHINES[machine]), (_RETURN, 0, 0, _KILL)]
    found += [(_LOAD, 0, 0, _NUMBER)]
    found += denied((_AT_LEAST, _NEWEST + 1), errno.ENOSYS)  # also x32, whose numbers begin at 0x40000000
    for numbers in _DENIED.values():
        if numbers[column] is not None:
            found += denied((_EQUAL, int(numbers[column] or 0)), errno.EPERM)
    # The flags of clone3 are in memory, where a filter cannot read them. The C library falls back to clone.
    found += denied((_EQUAL, _CLONE3[column]), errno.ENOSYS)
    found += of_call(_CLONE[column], [(_LOAD, 0, 0, _ARGUMENTS), *denied((_ANY_BIT, _NAMESPACES), errno.EPERM)])
    # seccomp is denied above; prctl sets a filter too.
    found += of_call(_PRCTL[column], [(_LOAD, 0, 0, _ARGUMENTS), *denied((_EQUAL, _SET_SECCOMP), errno.EPERM)])
    for *numbers, place in _FLAGS.values():
        # Nothing needs urgent data of Unix sockets, and the kernel's code for it is young.
        urgent = denied((_ANY_BIT, _MSG_OOB), errno.EOPNOTSUPP)
        found += of_call(numbers[column], [(_LOAD, 0, 0, _ARGUMENTS + 8 * place), *urgent])
    is_unix = [(_LOAD, 0, 0, _ARGUMENTS), (_EQUAL, 1, 0, _AF_UNIX), (_RETURN, 0, 0, _ERROR | errno.EAFNOSUPPORT)]
    for call in _SOCKETS:
        found += of_call(call[column], is_unix)
    found += denied((_EQUAL, _FLOCK[column]), errno.ENOLCK)
    locks = [(_LOAD, 0, 0, _ARGUMENTS + 8)]
    for command in _LOCKS.values():
        locks += denied((_EQUAL, command), errno.ENOLCK)
    found += of_call(_FCNTL[column], locks)
    flags = (_LOAD, 0, 0, _ARGUMENTS + 8 * 3)
    # Shared anonymous pages can stay when no process maps them.
    shared = [(_AND, 0, 0, _MAP_SHARED | _MAP_ANONYMOUS), *denied((_EQUAL, 0x21), errno.EPERM)]
    found += of_call(_MMAP[column], [flags, *denied((_ANY_BIT, _MAP_HUGETLB), errno.EPERM), *shared])
    return [*found, (_RETURN, 0, 0, _ALLOW)]


def supported() -> bool:
    """Whether the system call numbers of this machine are known."""
    return platform.machine() in _MACHINES


@lru_cache(maxsize=1)
def _packed() -> bytes:
    return b"".join(struct.pack("HBBI", *one) for one in _instructions(platform.machine()))


def prepare() -> None:
    """Build the filter once, for the forks of this process."""
    if supported():
        _packed()


def restrict() -> None:
    """Apply the filter to this process and all processes that it starts. It cannot be removed. `no_new_privs` must be
    set.

    Raises:
        OSError: the kernel does not support filters, or the numbers of this machine are not known.
    """
    if not supported():
        raise OSError(errno.ENOSYS, f"there is no system call filter for {platform.machine()}")
    program = _Program(len(_packed()) // 8, _packed())
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")
