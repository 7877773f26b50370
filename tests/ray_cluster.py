"""One small Ray cluster for all tests that need one. Pipelines run on it as processes, as a user runs them.

The cluster is `ray start --head` with separate ports, temporary directory and authentication token, so that it and
other clusters on the machine do not disturb each other. Processes find it through their environment.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from corsa.flow import Record, Store
from corsa.models.gguf_file import cache_directory

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).parents[1]
PIPELINE = "pipelines/continual.py"
LIMIT = 280  # seconds for one pipeline; a run takes some twenty on two idle cores


@dataclass(frozen=True)
class Cluster:
    """A running cluster. `environment`: the variables that a process needs to find it and to authenticate."""

    address: str
    dashboard: str
    home: Path  # home directory of submitted jobs
    environment: dict[str, str]
    head: int  # the parent of all its other processes

    def workers(self) -> list[int]:
        """The processes that are training."""
        return training(psutil.Process(self.head).children(recursive=True))


def corsa(folder: Path, cluster: Cluster, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the `corsa` command on a cluster, in a folder, and waits until it ends."""
    command = [sys.executable, "-m", "corsa.cli.main", *map(str, words)]
    return subprocess.run(command, cwd=folder, env=cluster.environment, capture_output=True, text=True, check=False)


def training(processes: Iterable[psutil.Process]) -> list[int]:
    """The processes that are workers of Ray Train."""
    found = []
    for process in processes:
        with suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::RayTrainWorker"):
                found.append(process.pid)
    return found


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Starts a cluster of two CPUs, whatever the machine has, and stops it afterwards."""
    temporary = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # its sockets need short paths
    home = temporary / "home"
    home.mkdir()
    port, dashboard = free_port(), free_port()
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    environment = plain_environment() | secret
    own = environment | {"HOME": str(home), "CORSA_CACHE": str(cache_directory())}
    own["PATH"] = f"{Path(sys.executable).parent}:{own['PATH']}"  # as in an activated environment
    own["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"  # or Ray's actors might find another one
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=2", f"--object-store-memory={256 << 20}", f"--temp-dir={temporary}"]
    command += ["--include-dashboard=true", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats"]
    log = temporary / "start.log"
    with log.open("w") as output:
        head = subprocess.Popen(command, env=own, stdout=output, stderr=output, cwd=temporary)
    try:
        wait_until(lambda: "Ray runtime started" in log.read_text() or head.poll() is not None, 120, "the cluster")
        assert head.poll() is None, log.read_text()
        address = f"127.0.0.1:{port}"
        yield Cluster(address, f"http://127.0.0.1:{dashboard}", home, environment | {"RAY_ADDRESS": address}, head.pid)
    finally:
        _end(head)
        shutil.rmtree(temporary, ignore_errors=True)


def _end(head: subprocess.Popen[bytes]) -> None:
    """Kills the cluster and all processes that it started, without waiting for them."""
    family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait()
    psutil.wait_procs(family, timeout=10)


def plain_environment() -> dict[str, str]:
    """This process's environment without the variables that locate or configure Ray."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return own | {"PYTHONUNBUFFERED": "1", "COLUMNS": "120"}


def free_port() -> int:
    """A free port of the loopback interface."""
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Returns when the condition holds; fails, naming `what`, if that takes longer than the given seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come about within {seconds:g} s"
        time.sleep(0.1)  # each scan of all processes takes CPU time from the process under test


# Pipelines as processes

TINY = [
    *("--model", "random:tiny-llama", "--placement.threads", "1", "--evaluation.new-tokens", "4"),
    *("--limit", "7", "--training.batch", "3", "--training.epochs", "40"),
]
"""Seven facts in batches of three, of which the last has one edit: no epoch divides evenly."""


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def paths(self) -> list[Path]:
        """The last three lines: the page, the metrics and the predictions."""
        return [Path(line) for line in self.out.splitlines()[-3:]]

    @property
    def page(self) -> Path:
        """The page of a run that may have written no predictions."""
        return next(Path(line) for line in self.out.splitlines() if line.endswith("/report.html"))


def start(
    arguments: Sequence[str | Path], environment: Mapping[str, str], pipeline: str = PIPELINE
) -> subprocess.Popen[str]:
    """`python PIPELINE ARGUMENTS` as a process, in the repository's root."""
    command = [sys.executable, pipeline, *map(str, arguments)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=dict(environment),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # not ignored, as under nohup
    )
    _STARTED.append(process)
    return process


_STARTED: list[subprocess.Popen[str]] = []


def end_what_is_left() -> None:
    """Kills the pipelines that a failed test left running: they would take CPU time from the next test."""
    for process in _STARTED:
        if process.poll() is None:
            process.kill()
            process.communicate()
    _STARTED.clear()


def run(
    arguments: Sequence[str | Path],
    environment: Mapping[str, str],
    status: int = 0,
    pipeline: str = PIPELINE,
    limit: float = LIMIT,
) -> Finished:
    """Runs the pipeline, which must end within `limit` seconds with exit status `status`."""
    began = time.monotonic()
    return end_of(start(arguments, environment, pipeline), began, status, limit)


def end_of(process: subprocess.Popen[str], began: float, status: int = 0, limit: float = LIMIT) -> Finished:
    """The output of a process that started at `began`; it must end with `status`."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {limit} s\n{out}\n{err}") from None
    assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err}"
    return Finished(process.returncode, out, err, time.monotonic() - began)


@dataclass(frozen=True)
class Run:
    """A storage, and the output of the run that filled it."""

    storage: Path
    finished: Finished

    @property
    def records(self) -> dict[str, Record]:
        """The finished steps by name."""
        return records(self.storage)


def store_of(storage: Path | Store) -> Store:
    """The store of a local storage; a `Store` is returned unchanged."""
    return Store(storage) if isinstance(storage, Path) else storage


def records(storage: Path | Store) -> dict[str, Record]:
    """The finished steps of a storage by name."""
    return {record.name: record for record in store_of(storage).records()}


def copy_without(run: Run, storage: Path, *left_out: str) -> Path:
    """A copy of a run's storage without the steps whose name begins with one of `left_out`, and without its report."""
    for name, record in run.records.items():
        if not name.startswith(("report", *left_out)):
            folder = f"steps/{record.fingerprint[:16]}"
            shutil.copytree(run.storage / folder, storage / folder)
    return storage


def adapter(storage: Path | Store, step: str) -> dict[str, Tensor]:
    """The factors of the adapter that a round produced."""
    from safetensors.torch import load

    artifact = store_of(storage).artifact(records(storage)[step].fingerprint)
    return load(artifact.read("adapter/adapter_model.safetensors"))


def assert_same_adapters(one: Path, other: Path | Store, steps: Iterable[str], tolerance: float = 0.0) -> None:
    """Asserts that the adapters of the steps are bit for bit equal, or differ by at most `tolerance` in any element."""
    for step in steps:
        mine, theirs = adapter(one, step), adapter(other, step)
        assert mine.keys() == theirs.keys()
        difference = max(float((mine[name] - theirs[name]).abs().max()) for name in mine)
        assert difference <= tolerance, f"{step}: the adapters differ by up to {difference:g}"
