"""Checkpoints inside a round: phi, the optimizer's moments, the step number and the curves so far, in one file.

The file holds the SHA-256 of its content, the tensors as safetensors, and the rest as JSON. Every `SEGMENT` rows of
the curves move to a file of their own, so that a checkpoint's size does not grow with the steps. No step draws a random
number (dropout is 0; batches follow from seed, round and epoch), so no random state is kept. On the same machine and
number of workers a resumed round ends bit for bit as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from corsa.algorithm.sam import LookSam
from corsa.flow.store import DamagedError, Store
from corsa.training.adamw import Moments
from corsa.training.worker_group import WorkerGroup

SEGMENT = 1000
"""Rows of the curves in a file of their own."""


@dataclass
class Position:
    """How far a round is: optimizer steps done, one row of the curves table per step, and notes on what happened.

    segments: the number of files that already hold the first rows, `SEGMENT` each. digest: of all of them, hex.
    """

    step: int = 0
    curves: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    segments: int = 0
    digest: str = ""

    def add(self, row: dict[str, Any]) -> None:
        """Record one more step."""
        self.step += 1
        self.curves.append(row)


def save_checkpoint(
    store: Store, path: str, phi: Tensor, optimizer: Moments, position: Position, group: WorkerGroup
) -> None:
    """Replace the round's checkpoint in one atomic write. `path` is relative to the store's root.

    All workers call it. A sharded optimizer state is gathered first, so the round can continue with another number of
    workers or another sharding. The leader writes. The base model is not part of a checkpoint.
    """
    moments = optimizer.moments()
    if not group.leads:
        return
    tensors = {"phi": phi.detach().cpu(), **{name: moment.detach().cpu() for name, moment in moments.items()}}
    for number in range(position.segments, len(position.curves) // SEGMENT):
        rows = json.dumps(position.curves[number * SEGMENT :][:SEGMENT]).encode()
        store.files.replace(_segment(path, number), rows)
        position.segments, position.digest = number + 1, _chained(position.digest, rows)
    rest = position.curves[position.segments * SEGMENT :]
    content = save(tensors) + _frame(json.dumps(vars(position) | {"curves": rest}))
    store.files.replace(path, hashlib.sha256(content).digest() + content)


def load_checkpoint(store: Store, path: str, phi: Tensor, optimizer: Moments, group: WorkerGroup) -> Position:
    """Restore phi and the optimizer from the round's last checkpoint, on every worker. Only the leader reads.

    Without a checkpoint, or with a damaged one, the round starts at step 0 with phi as it is. Damage is noted.
    """
    found, notes = None, []
    if group.leads:
        try:
            found = read_checkpoint(store, path)
        except DamagedError as damage:
            notes = [f"{damage}: the round was started again"]
    position, names = group.share((found[1], sorted(set(found[0]) - {"phi"})) if found else (None, []))
    if position is None:
        return Position(notes=notes)
    tensors = found[0] if found else {}
    moments: dict[str, Tensor] = {}
    for name in ["phi", *names]:
        target = phi.detach() if name == "phi" else moments.setdefault(name, _like(name, phi))
        if tensors:
            target.copy_(tensors[name])
        group.share_tensor(target)
    optimizer.restore(moments)
    return position


class WithLook:
    """The state of an optimizer and of LookSAM, in one checkpoint."""

    def __init__(self, optimizer: Moments, look: LookSam) -> None:
        self._optimizer, self._look = optimizer, look

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's moments, and LookSAM's part of the last perturbed step."""
        return self._optimizer.moments() | {"look": self._look.part}

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Continue from these moments."""
        self._look.part = moments["look"]
        self._optimizer.restore({name: moment for name, moment in moments.items() if name != "look"})


def _like(name: str, phi: Tensor) -> Tensor:
    """An empty tensor for a moment. All have phi's shape, except AdamW's step count."""
    return torch.zeros((), dtype=torch.float32, device=phi.device) if name == "step" else torch.zeros_like(phi)


def read_checkpoint(store: Store, path: str) -> tuple[dict[str, Tensor], Position] | None:
    """The tensors and the position of a checkpoint, None if there is none. Raises `DamagedError`."""
    content = store.files.read(path)
    if content is None:
        return None
    digest, content = content[:32], content[32:]
    if hashlib.sha256(content).digest() != digest:
        raise DamagedError(f"the checkpoint {store.url}/{path} is not what was written (SHA-256)")
    length = int.from_bytes(content[-8:], "big")
    position = Position(**json.loads(content[-8 - length : -8]))
    digest, segments = "", []
    for number in range(position.segments):
        segments.append(store.files.read(_segment(path, number)) or b"")
        digest = _chained(digest, segments[-1])
    if digest != position.digest:
        raise DamagedError(f"the curves of the checkpoint {store.url}/{path} are not what was written (SHA-256)")
    position.curves = [row for rows in segments for row in json.loads(rows)] + position.curves
    return load(content[: -8 - length]), position


def _chained(digest: str, rows: bytes) -> str:
    """The digest of some segments and one more."""
    return hashlib.sha256(digest.encode() + rows).hexdigest()


def _segment(path: str, number: int) -> str:
    return f"{path}.curves{number}"


def _frame(text: str) -> bytes:
    """The text followed by its length, so that a reader finds it from the end of the file."""
    raw = text.encode()
    return raw + len(raw).to_bytes(8, "big")
