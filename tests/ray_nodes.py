"""A cluster of several nodes on this machine, started by cluster/local.sh.

Nodes join and are lost, each with all of its processes.
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

from corsa.models.gguf_file import cache_directory


@dataclass(frozen=True)
class Nodes(Cluster):
    """The nodes `head` and `node` with one CPU each, and the nodes that joined later."""

    folder: Path
    shell: dict[str, str]  # the environment of cluster/local.sh

    def script(self, *words: str) -> str:
        """The output of `cluster/local.sh WORDS`, which must succeed."""
        done = subprocess.run(
            [ROOT / "cluster/local.sh", *words], env=self.shell, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def names(self) -> list[str]:
        """The running nodes."""
        return sorted(file.stem for file in self.folder.glob("*.pid"))

    def family(self, name: str) -> list[psutil.Process]:
        """All processes of a node: those in its session, and their descendants."""
        session = int((self.folder / f"{name}.pid").read_text())
        found = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == session:
                    found |= {p.pid: p for p in [process, *process.children(recursive=True)]}
        return list(found.values())

    def workers(self) -> list[int]:
        """The training processes on all nodes."""
        return [pid for name in self.names() for pid in training(self.family(name))]

    def at_work(self) -> dict[str, list[int]]:
        """The nodes that train, and their training processes."""
        found = {name: training(self.family(name)) for name in self.names()}
        return {name: pids for name, pids in found.items() if pids}

    def announce(self, name: str, seconds: int) -> None:
        """Announces the preemption of a node after the given seconds, as a cloud does for spot machines."""
        (raylet,) = [p for p in self.family(name) if p.name() == "raylet"]
        (node,) = [word.removeprefix("--node_id=") for word in raylet.cmdline() if word.startswith("--node_id=")]
        command = ["ray", "drain-node", "--address", self.address, "--node-id", node]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        command += ["--deadline-remaining-seconds", str(seconds)]
        # Without this Ray takes 127.0.0.1 for the machine's external address, where nothing listens.
        alone = self.shell | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def lose(self, name: str) -> None:
        """Kills a node and all of its processes, like a power failure."""
        family = self.family(name)
        (self.folder / f"{name}.pid").unlink()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)


@contextmanager
def running_nodes(more: Mapping[str, str]) -> Iterator[Nodes]:
    """Starts two nodes with `more` in the environment of all their processes, and stops them afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # its sockets need short paths
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
