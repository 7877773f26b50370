"""Memory per worker for every sharding and offloading setting, computed from the memory of a single worker.

Implements the table of docs/sharding.md: N workers shard the frozen base at stage 3, and AdamW's state of phi from
stage 1 on. phi, its copy for SAM, its gradients and the activations are whole on every worker at every stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from corsa.config import ShardingConfig
from corsa.models.four_bit import bytes_in_4_bits
from corsa.planning.rehearsal import Footprint

GATHERED_PARAMETERS = 1_000_000_000
"""Maximum number of base parameters that stage 3 gathers at once: DeepSpeed's defaults for
`stage3_max_live_parameters` and `stage3_max_reuse_distance` (https://www.deepspeed.ai/docs/config-json)."""

MIB = 1 << 20

CUDA_CONTEXT = 600 * MIB
"""Bytes that CUDA, its libraries and NCCL use before the first tensor. An estimate: it varies with the driver."""

LOST = {True: 0.10, False: 0.35}
"""Allocator overhead as a share of temporary memory (gradients, activations, logits), on a GPU and on a CPU.
CPU: glibc's reuse of freed blocks, measured on the embedded model with batches of 8 and 16: 0.39 and 0.46, and nearly
nothing with MALLOC_MMAP_THRESHOLD_=65536. GPU: torch's CUDA allocator rounds and splits blocks; an estimate."""

COLUMNS = {
    "base": "base",
    "gathered": "gathered",
    "lora": "LoRA",
    "sam": "SAM copy",
    "gradients": "gradients",
    "optimizer": "AdamW",
    "activations": "activations",
    "logits": "logits",
    "working": "other",
    "allocator": "allocator",
}
"""Items of a setting and their display names."""


@dataclass(frozen=True)
class Holding:
    """Memory of one worker under one setting. items: bytes on its GPU (without one: in memory) by purpose, `COLUMNS`.
    host: bytes in CPU memory in addition to the GPU. gathers: bytes of the base transferred over the links per step.
    """

    sharding: ShardingConfig
    items: dict[str, int]
    host: int
    gathers: int
    flops: int

    @property
    def total(self) -> int:
        """Total bytes on the GPU, or in memory."""
        return sum(self.items.values())

    @property
    def name(self) -> str:
        """The setting as text."""
        s = self.sharding
        offloaded = [word for word, on in (("base", s.offload_parameters), ("AdamW", s.offload_optimizer)) if on]
        parts = [f"stage {s.zero_stage}"]
        parts += [f"offload {' + '.join(offloaded)}"] if offloaded else []
        parts += ["checkpointing"] if s.activation_checkpointing else []
        return ", ".join(parts)


def settings(workers: int, gpu: bool) -> Iterator[ShardingConfig]:
    """Every useful setting, without activation checkpointing. One worker, or no GPU, leaves few choices."""
    yield ShardingConfig()
    for stage in (1, 2, 3):
        for optimizer, parameters in ((False, False), (True, False), (False, True), (True, True)):
            allowed = (not parameters or stage == 3) and (gpu or not (optimizer or parameters))
            if allowed and (workers > 1 or optimizer or parameters):
                yield ShardingConfig(zero_stage=stage, offload_optimizer=optimizer, offload_parameters=parameters)


def hold(
    footprint: Footprint, sharding: ShardingConfig, *, workers: int, gpu: bool, element: int, passes: int
) -> Holding:
    """The memory of one of `workers` under `sharding`.

    Args:
        footprint: of one worker with the whole base and AdamW's whole state. Its activation checkpointing must match
            `sharding`.
        sharding: the setting.
        workers: number of workers in the group.
        gpu: whether each has a GPU.
        element: bytes per parameter of the base.
        passes: passes through the base per step (forward, backward, and forward again with checkpointing).
    """
    items = {name: footprint.items.get(name, 0) for name in COLUMNS}
    host, gathers, base = 0, 0, footprint.items["base"]
    if sharding.zero_stage == 3:
        share = -(-base // workers)
        items["gathered"] = min(base, GATHERED_PARAMETERS * element)
        items["base"], host = (0, share) if sharding.offload_parameters else (share, 0)
        gathers = passes * (base if sharding.offload_parameters else base - share)
    if sharding.zero_stage > 0:  # two moments and a master copy of phi
        state = -(-3 * footprint.items["lora"] // workers)
        items["optimizer"] = 0 if sharding.offload_optimizer else state
        host += state if sharding.offload_optimizer else 0
    transient = sum(items[name] for name in ("gradients", "activations", "logits", "working"))
    items["allocator"] = int(LOST[gpu] * transient) + CUDA_CONTEXT * gpu
    if not gpu:  # all items share one memory
        host = 0
    return Holding(sharding, items, host, gathers, footprint.flops)


def in_4_bits(footprint: Footprint, weights: Sequence[int]) -> Footprint:
    """The footprint with the base's linear layers in 4 bits (`corsa.models.four_bit`), from that in bfloat16.

    While a layer is used, its weights are there in bfloat16 as well: the largest layer counts as working memory.

    Args:
        footprint: of a step on a base in bfloat16.
        weights: the number of weights of each linear layer, without the output head.
    """
    saved = sum(2 * count - bytes_in_4_bits(count) for count in weights)
    items = {**footprint.items, "base": footprint.items["base"] - saved}
    items["working"] += 2 * max(weights)
    return replace(footprint, items=items)
