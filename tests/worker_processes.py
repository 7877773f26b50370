"""Two worker processes of a gloo group on this machine, for tests that compare them with one worker."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def two_workers(script: ModuleType, folder: Path, **environment: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Runs a module as a script in two processes with one thread each: RANK, 2 and the folder are its arguments.

    They start at once, so that other work can be done before they are needed, and end with the block.
    """
    workers = [
        subprocess.Popen(
            [sys.executable, str(script.__file__), str(rank), "2", str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
        )
        for rank in range(2)
    ]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()
