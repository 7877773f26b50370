"""The workers of one group: ranks, sums and broadcasts of tensors, and the placement of parameters.

Only this module and those it calls know how parameters are sharded. The step does not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from corsa.algorithm.batch import MicroBatch
from corsa.config import ModelConfig, Placement, ShardingConfig
from corsa.models.activation_checkpointing import recompute_activations
from corsa.models.loading import load_model
from corsa.training.adamw import AdamW, PlainAdamW
from corsa.training.zero3_lockstep import in_lockstep, pad_passes


@dataclass(frozen=True)
class WorkerGroup:
    """This worker, one of `size` in its group."""

    rank: int
    size: int
    device: torch.device
    sharding: ShardingConfig = field(default_factory=ShardingConfig)

    @classmethod
    def join(cls, placement: Placement) -> WorkerGroup:
        """Join the process group that Ray Train has set up; without one, a group of this process alone."""
        grouped = dist.is_available() and dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        if placement.gpu:
            from ray.train.torch import get_device

            device = get_device()
        else:
            device = torch.device("cpu")
            torch.set_num_threads(placement.threads or max(1, len(os.sched_getaffinity(0)) // _on_this_node(size)))
        return cls(rank, size, device, placement.sharding)  # type: ignore[arg-type]

    @property
    def leads(self) -> bool:
        """Whether this worker reads and writes the store for all."""
        return self.rank == 0

    def place(self, model: ModelConfig) -> PreTrainedModel:
        """The frozen base model, ready for forward passes: whole on this worker, or sharded among all (stage 3).

        Float32 products are float32 from now on, never TF32: its ten bits lose a part of SAM's perturbation.
        """
        torch.set_float32_matmul_precision("highest")
        if self.sharding.zero_stage == 3:
            from corsa.training.sharding import load_sharded

            placed = load_sharded(model, self.sharding, self.device)
        else:
            placed = load_model(model, self.device)
        if self.sharding.activation_checkpointing:
            recompute_activations(placed)
        return placed

    def let_go(self, model: PreTrainedModel) -> None:
        """Free the memory of a placed model."""
        if self.sharding.zero_stage == 3:
            from corsa.training.sharding import discard

            discard(model)

    def optimizer(self, phi: nn.Parameter) -> AdamW:
        """A new AdamW over phi. Its state is whole on this worker, or sharded among all (stages 1 to 3)."""
        if self.sharding.zero_stage == 0:
            return PlainAdamW(phi)
        from corsa.training.sharding import ShardedAdamW

        return ShardedAdamW(phi, self.sharding, self.device)

    def in_step(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """A block in which each worker runs any number of forward passes without gradients.

        With a sharded base, a worker that has finished runs empty passes until all workers have finished.
        """
        return in_lockstep(model, self.device) if self._gathers else nullcontext()

    def pad_passes(self, parts: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """A worker's micro-batches of a step. If the base is sharded, empty ones fill them up to the same number."""
        return pad_passes(parts, self.device) if self._gathers else parts

    @property
    def _gathers(self) -> bool:
        """Whether a pass of one worker needs the others."""
        return self.sharding.zero_stage == 3 and self.size > 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, value: Any) -> Any:
        """The leader's value, on every worker (small objects)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def share_tensor(self, tensor: Tensor) -> None:
        """Overwrite with the leader's values."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def collect(self, rows: list[Any]) -> list[Any]:
        """All workers' rows, on the leader; elsewhere an empty list."""
        if self.size == 1:
            return rows
        boxes: list[Any] = [None] * self.size
        dist.gather_object(rows, boxes if self.leads else None, dst=0)
        return [row for box in boxes for row in box] if self.leads else []


def _on_this_node(size: int) -> int:
    try:
        from ray.train import get_context

        return get_context().get_local_world_size()
    except (ImportError, RuntimeError):
        return size
