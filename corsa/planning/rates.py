"""The compute rate of a worker, measured or stated. Every time estimate names its source."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from corsa.errors import CorsaError

STATED = 100.0
"""Default TFLOP/s of a GPU: about a third of an A100's bfloat16 peak (312, NVIDIA's data
sheet)."""

LINK = 25.0
"""Default GB/s at which a worker receives shards of the base: the usable rate of a PCIe 4.0 x16 slot."""


@dataclass(frozen=True)
class Rate:
    """tflops: sustained, per worker. link: GB/s. source: a text on the source of tflops."""

    tflops: float
    link: float
    source: str


def rate(gpu: bool, tflops: float | None, link: float | None, measured: Path | None) -> Rate:
    """The rate for estimates: from a file of `corsa perf gpu` or a number if given. Otherwise a matrix product measured
    on this machine, or `STATED` for GPUs that this machine does not have.

    Raises:
        CorsaError: the file holds no measurement.
    """
    link = link or LINK
    if measured is not None:
        return Rate(_from_file(measured), link, f"measured: {measured}")
    if tflops is not None:
        return Rate(tflops, link, "stated: --tflops")
    if gpu and not torch.cuda.is_available():
        return Rate(STATED, link, "stated: a third of an A100's peak; better --tflops or --measured")
    device = torch.device("cuda" if gpu else "cpu")
    what = torch.cuda.get_device_name() if gpu else f"this CPU, {torch.get_num_threads()} threads"
    return Rate(matrix_product(device), link, f"measured: a matrix product on {what}, an upper bound")


def _from_file(path: Path) -> float:
    try:
        rows = json.loads(path.read_text())["rows"]
        found = [float(row["tflops"]) for row in rows if row.get("tflops")]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CorsaError(f"{path} holds no measurement of `corsa perf gpu`: {e}") from e
    if not found:
        raise CorsaError(f"{path} holds no row with a measured rate: run `corsa perf gpu` again")
    return sorted(found)[len(found) // 2]


def matrix_product(device: torch.device, seconds: float = 0.3) -> float:
    """TFLOP/s of matrix products with shapes typical for a step: a few hundred tokens times a weight."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.ones(n, size, dtype=dtype, device=device) for n in (320, size))
    _ = a @ b
    _wait(device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            _ = a @ b
        _wait(device)
        count += 10
    return count * 2 * 320 * size * size / (time.perf_counter() - began) / 1e12


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
