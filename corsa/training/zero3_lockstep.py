"""Keeping pace: where the base is sharded, every forward and backward pass gathers it from all workers.

So all must run the same passes in the same order, also a worker that has nothing to do. This is the one place that sees
to it: a worker without work runs passes over a row that holds nothing, which count for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from corsa.algorithm.packing import blank
from corsa.algorithm.step import MicroBatch


@contextmanager
def keeping_pace(model: Any, device: torch.device) -> Iterator[None]:
    """Inside, each worker runs as many forward passes of `model` as it likes; it leaves when all are through.

    For passes without gradients: evaluation, generation, scoring. A worker announces every pass before it runs it. One
    that is through announces none, and runs an empty pass for each that another has announced.
    """

    def announce(count: int) -> torch.Tensor:
        coming = torch.tensor(count, device=device)
        dist.all_reduce(coming)
        return coming

    handle = model.register_forward_pre_hook(lambda *_: announce(1) and None, prepend=True)
    try:
        yield
    finally:
        handle.remove()
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    while announce(0):
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)


def level(parts: Sequence[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """A worker's micro-batches, filled up to the passes of the worker that has most: as many, each of as many rows."""
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, [len(part.rows) for part in parts])
    wanted = [max(own[i] for own in counts if i < len(own)) for i in range(max(map(len, counts)))]
    nothing = MicroBatch((), torch.zeros(2, 0, device=device), 0)
    filled = [*parts, *[nothing] * (len(wanted) - len(parts))]
    return [
        MicroBatch([*part.rows, *[blank(device)] * (rows - len(part.rows))], part.reference, part.tokens)
        for part, rows in zip(filled, wanted, strict=True)
    ]
