"""Merges adapter directories into one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corsa.editing.history import Line, open_line
from corsa.errors import CorsaError
from corsa.lora.arithmetic import check_same_base
from corsa.lora.arithmetic import merge as merge_factors
from corsa.lora.peft_format import read_factors, write_factors
from corsa.models.registry import hub_name


def merge(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    method: str = "sum",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> dict[str, Any]:
    """Merges PEFT directories of one base model into a new directory.

    Args:
        adapters: two or more directories.
        out: the new directory.
        method: one of `corsa.lora.arithmetic.MERGES`: sum (exact), average, svd (cut to `rank`), linear, ties,
            dare_linear, dare_ties (PEFT's).
        weights: one for each adapter; 1 each if not given.
        rank: of the result; svd only.
        density: share of the values that ties and dare keep.
        seed: of the random choice of the values that dare drops.

    Returns:
        {out: path, rank: of the merged adapter, error: |merged - sum| / |sum|, remarks: what a person should know}.

    Raises:
        CorsaError: fewer than two adapters, adapters of different base models or layers, an argument out of bounds, or
            `out` is not free.

    >>> import tempfile; folder = tempfile.mkdtemp()
    >>> for name in ("people", "places"):
    ...     _tiny_adapter(f"{folder}/{name}")
    >>> found = merge([f"{folder}/people", f"{folder}/places"], f"{folder}/both")
    >>> found["rank"], found["error"]
    (4, 0.0)
    """
    out = Path(out).expanduser().absolute()
    if len(adapters) < 2:
        raise CorsaError("a merge takes two adapters or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CorsaError(f"{out} is not empty: name a new directory")
    lines = [open_line(path) for path in adapters]
    parts, bases = zip(*(read_factors(path) for path in adapters), strict=True)
    base = check_same_base([hub_name(name) for name in bases])
    merged, found = merge_factors(parts, method, weights=weights, rank=rank, density=density, seed=seed)
    try:
        write_factors(merged, out, base)
    except OSError as error:
        raise CorsaError(f"cannot write to {out}: {error.strerror}. Name another directory") from error
    return {"out": str(out), **found, "remarks": _successors(lines)}


def _successors(lines: Sequence[Line]) -> list[str]:
    """A sentence for each line that another one continues: the merged adapter has its change twice."""
    last = [line.updates[-1].fingerprint if line.updates else None for line in lines]
    return [
        f"{later.directory} continues {line.directory} and holds its change already: the merged adapter has it twice"
        for line, mine in zip(lines, last, strict=True)
        for later in lines
        if later is not line and mine in [update.fingerprint for update in later.updates]
    ]
