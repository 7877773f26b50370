"""Checks whether a machine can run this project, and names a remedy for each problem."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

from corsa.errors import CorsaError

TESTED = {"torch": "2.13", "ray": "2.60", "transformers": "5.23", "peft": "0.21", "deepspeed": "0.19", "datasets": "5"}
"""Versions that the tests run with, as prefixes."""

_ROOM = 10 * 2**30  # bytes: a small model, its adapters and checkpoints


class Finding(NamedTuple):
    """The result of one check. `remedy` is empty if there is nothing to do."""

    what: str
    state: Literal["ok", "note", "fault"]
    found: str
    remedy: str = ""


def examine(storage: str, model: str) -> list[Finding]:
    """Runs all checks. A check that raises an exception becomes a fault with its cause."""
    looks: dict[str, Callable[[], Iterator[Finding]]] = {
        "Python": _python,
        "versions": _versions,
        "devices": _devices,
        "Ray": _ray,
        "DeepSpeed": _deepspeed,
        "storage": lambda: _storage(storage),
        "model": lambda: _model(model),
        "hub token": _token,
        "disk": lambda: _disk(storage),
    }
    found: list[Finding] = []
    for name, look in looks.items():
        try:
            found += look()
        except Exception as error:  # a broken installation can raise anything
            remedy = "install the project again: pip install -c constraints.txt -e ."
            found.append(Finding(name, "fault", f"{type(error).__name__}: {error}", remedy))
    return found


def _python() -> Iterator[Finding]:
    known = sys.version_info >= (3, 11)
    remedy = "" if known else "install Python 3.11 or newer"
    yield Finding("Python", "ok" if known else "fault", f"{platform.python_version()}, {sys.executable}", remedy)


def _versions() -> Iterator[Finding]:
    for name, tested in TESTED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(name, "fault", "not installed", f"pip install -c constraints.txt {name}")
            continue
        wanted = next((r for r in map(Requirement, requires("corsa") or []) if r.name == name), None)
        if wanted and not wanted.specifier.contains(found.partition("+")[0], prereleases=True):
            yield Finding(
                name, "fault", f"{found}, needed {wanted.specifier}", f"pip install -c constraints.txt '{wanted}'"
            )
        elif not found.startswith(tested):
            remedy = "where something behaves oddly, install the tested set: pip install -c constraints.txt -e ."
            yield Finding(name, "note", f"{found}, tested with {tested}", remedy)
        else:
            yield Finding(name, "ok", found)


def _devices() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("CPU", "ok", f"{cores} cores, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding(
                "GPU", "ok", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB: use --placement.gpu"
            )
    elif list(Path("/dev").glob("nvidia[0-9]*")):
        remedy = "install a torch with CUDA and a driver that fits it, see https://pytorch.org/get-started"
        yield Finding("GPU", "fault", f"there is one, but torch {torch.__version__} does not see it", remedy)
    else:
        yield Finding("GPU", "note", "none", "fine for models below a billion parameters; larger ones want a GPU")


def _ray() -> Iterator[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        yield Finding("Ray", "ok", "a cluster is started on this machine when one is needed (RAY_ADDRESS is not set)")
    else:
        import socket

        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host or "127.0.0.1", int(port)), timeout=5).close()
        except (OSError, ValueError) as error:
            yield Finding(
                "Ray",
                "fault",
                f"no answer from RAY_ADDRESS={address}: {error}",
                "start the cluster, or unset RAY_ADDRESS",
            )
        else:
            yield Finding("Ray", "ok", f"cluster at {address} answers")
    shared = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    if shared and shared.total < 2 * 2**30:
        remedy = "give the container more, such as docker run --shm-size 4g"
        yield Finding(
            "shared memory", "note", f"{shared.total / 2**30:.1f} GiB at /dev/shm: Ray falls back to the disk", remedy
        )


def _deepspeed() -> Iterator[Finding]:
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        return  # `_versions` reports it
    compiler = shutil.which("nvcc") or shutil.which("c++") or shutil.which("g++")
    if compiler:
        yield Finding("DeepSpeed", "ok", f"compiler for its operators: {compiler}")
    else:
        yield Finding(
            "DeepSpeed",
            "note",
            "no compiler found",
            "sharding (ZeRO) may want one: install g++, with a GPU the CUDA toolkit",
        )


def _storage(storage: str) -> Iterator[Finding]:
    from corsa.flow import Store

    if "://" not in storage and not (place := Path(storage).expanduser().absolute()).exists():
        parent = next(p for p in place.parents if p.exists())
        if os.access(parent, os.W_OK):
            yield Finding("storage", "ok", f"{place} will be made")
        else:
            yield Finding(
                "storage", "fault", f"{place} cannot be made: {parent} is not writable", "choose another --storage"
            )
        return
    try:
        store = Store(storage)
        store.prepare()
    except CorsaError as error:
        yield Finding("storage", "fault", str(error), "choose a --storage that can be written to")
    else:
        yield Finding("storage", "ok", f"{store.url} can be written to")


def _model(name: str) -> Iterator[Finding]:
    from corsa.models.registry import locate

    try:
        source = locate(name)
    except CorsaError as error:
        yield Finding("model", "fault", str(error), "choose another --model")
        return
    if source.kind != "hub":
        yield Finding("model", "ok", f"{name}: {source.kind}")
        return
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(source.place, "config.json"), str):
        yield Finding("model", "ok", f"{name}: {source.place}, in the hub's cache")
    else:
        remedy = "it is downloaded at the first use; without a network, give a directory written by save_pretrained"
        yield Finding("model", "note", f"{name}: {source.place}, not in the hub's cache", remedy)


def _token() -> Iterator[Finding]:
    from huggingface_hub import get_token

    if get_token():
        yield Finding("hub token", "ok", "there is one")
    else:
        remedy = "only gated models and `corsa push` need one: hf auth login, or set HF_TOKEN"
        yield Finding("hub token", "note", "none", remedy)


def _disk(storage: str) -> Iterator[Finding]:
    from corsa.models.gguf_file import cache_directory

    places = {"cache": cache_directory(), "temporary": Path(os.environ.get("TMPDIR", "/tmp"))}
    if "://" not in storage:
        places["storage"] = Path(storage).expanduser().absolute()
    for name, place in places.items():
        exists = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(exists).free
        state = "ok" if free >= _ROOM else "note"
        remedy = "" if state == "ok" else "make room, or point --storage, CORSA_CACHE or TMPDIR elsewhere"
        yield Finding(f"disk, {name}", state, f"{free / 2**30:.0f} GiB free at {exists}", remedy)
