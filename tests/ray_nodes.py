"""A cluster of several nodes on this machine, brought up by cluster/local.sh: nodes join it and are lost, each with all
of its processes.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from ray_cluster import ROOT, Cluster, free_port, plain_environment, training, wait_until

from corsa.models.embedded import cache_directory


@dataclass(frozen=True)
class Nodes(Cluster):
    """The nodes `head` and `node`, of one CPU each, and those that have joined since."""

    folder: Path
    shell: dict[str, str]  # the environment of cluster/local.sh

    def script(self, *words: str) -> str:
        """What `cluster/local.sh WORDS` says; it must succeed."""
        done = subprocess.run(
            [ROOT / "cluster/local.sh", *words], env=self.shell, capture_output=True, text=True, timeout=150
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def names(self) -> list[str]:
        """The nodes that are there."""
        return sorted(file.stem for file in self.folder.glob("*.pid"))

    def family(self, name: str) -> list[psutil.Process]:
        """All processes of a node: those of its session, and those that they have started."""
        session = int((self.folder / f"{name}.pid").read_text())
        found = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == session:
                    found |= {p.pid: p for p in [process, *process.children(recursive=True)]}
        return list(found.values())

    def workers(self) -> list[int]:
        """The processes that are training, on any node."""
        return [pid for name in self.names() for pid in training(self.family(name))]

    def at_work(self) -> dict[str, list[int]]:
        """The nodes on which something is trained, and the processes that do it there."""
        found = {name: training(self.family(name)) for name in self.names()}
        return {name: pids for name, pids in found.items() if pids}

    def announce(self, name: str, seconds: int) -> None:
        """Tell the cluster that a node will be taken away after so many seconds, as a cloud does of spot machines."""
        (raylet,) = [p for p in self.family(name) if p.name() == "raylet"]
        (node,) = [word.removeprefix("--node_id=") for word in raylet.cmdline() if word.startswith("--node_id=")]
        command = ["ray", "drain-node", "--address", self.address, "--node-id", node]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        command += ["--deadline-remaining-seconds", str(seconds)]
        # Without this Ray takes 127.0.0.1 for the machine's outer address, at which nothing listens.
        alone = self.shell | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def lose(self, name: str) -> None:
        """Kill a node with its whole family, as a machine ends whose power is cut."""
        family = self.family(name)
        (self.folder / f"{name}.pid").unlink()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)


@contextmanager
def running_nodes(more: Mapping[str, str]) -> Iterator[Nodes]:
    """Two nodes, and their end, with `more` in the environment of all that they run."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets lie below it: their paths must be short
    home = folder / "home"
    home.mkdir()
    port, dashboard = free_port(), free_port()
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    joined = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    own = {"HOME": str(home), "CORSA_CACHE": str(cache_directory()), "CPUS": "1", "DIRECTORY": str(folder)}
    own |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # as in an activated environment
    own |= {"PORT": str(port), "DASHBOARD": str(dashboard)}
    common = plain_environment() | dict(more) | secret
    nodes = Nodes(
        joined["RAY_ADDRESS"], f"http://127.0.0.1:{dashboard}", home, common | joined, 0, folder, common | own
    )
    try:
        nodes.script("up")
        yield nodes
        families = [process for name in nodes.names() for process in nodes.family(name)]
        nodes.script("down")
        wait_until(lambda: not any(p.is_running() for p in families), 10, "the end of all that the cluster had started")
    finally:
        for name in nodes.names():
            nodes.lose(name)
        shutil.rmtree(folder, ignore_errors=True)
