"""Keeps workers in lockstep under ZeRO stage 3: each forward and backward pass gathers the base from all workers.

All workers therefore run the same passes in the same order. A worker without work runs empty passes, which do not
change the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from corsa.algorithm.batch import MicroBatch
from corsa.algorithm.packing import blank


@contextmanager
def in_lockstep(model: Any, device: torch.device) -> Iterator[None]:
    """A block in which each worker runs any number of forward passes without gradients. It ends when all have finished.

    A worker announces every pass before it runs it. A worker that has finished runs an empty pass for each pass that
    another worker announces.
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


def pad_passes(parts: Sequence[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """This worker's micro-batches, padded with empty ones to the largest number of passes of any worker."""
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, [len(part.rows) for part in parts])
    wanted = [max(own[i] for own in counts if i < len(own)) for i in range(max(map(len, counts)))]
    nothing = MicroBatch((), torch.zeros(2, 0, device=device))
    filled = [*parts, *[nothing] * (len(wanted) - len(parts))]
    return [
        replace(part, rows=[*part.rows, *[blank(device)] * (rows - len(part.rows))])
        for part, rows in zip(filled, wanted, strict=True)
    ]
