"""The processes of a sandbox, as the machine sees them."""

from __future__ import annotations

import psutil

from corsa.sandbox.worker import Sandbox


def below(sandbox: Sandbox) -> set[int]:
    """All processes of the sandbox."""
    assert sandbox._process is not None
    top = psutil.Process(sandbox._process.pid)
    return {top.pid, *(process.pid for process in top.children(recursive=True))}
