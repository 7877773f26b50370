"""What an untrusted program may use."""

from __future__ import annotations

from corsa.config.base import Frozen


class Limits(Frozen):
    """What one program may use. Bytes and seconds; memory and disk are bounds on all its processes together."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory: int = 2 << 30
    processes: int = 32
    disk: int = 64 << 20
    file: int = 32 << 20
    files: int = 64
    output: int = 1 << 20
