"""What every setting of sharding and offloading holds on each worker, from what one worker alone would hold.

The table of docs/sharding.md as arithmetic: N workers share out the frozen base at stage 3, and AdamW's state of phi
from stage 1 on. phi, its copy for SAM, its gradients and the activations are whole on every worker at every stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from corsa.config import ShardingConfig
from corsa.planning.rehearsal import Footprint

GATHERED_PARAMETERS = 1_000_000_000
"""Parameters of the base that stage 3 keeps whole at once, at most: DeepSpeed's defaults for
`stage3_max_live_parameters` and `stage3_max_reuse_distance` (https://www.deepspeed.ai/docs/config-json)."""

MIB = 1 << 20

CUDA_CONTEXT = 600 * MIB
"""Bytes that CUDA, its libraries and NCCL take before the first tensor: an allowance, it varies with the driver."""

LOST = {True: 0.10, False: 0.35}
"""Share of what comes and goes (gradients, activations, logits) that the allocator holds on top of it, on a GPU and on
a CPU. glibc's reuse of freed blocks, measured on the embedded model with batches of 8 and 16: 0.39 and 0.46, and nearly
nothing with MALLOC_MMAP_THRESHOLD_=65536. torch's CUDA allocator rounds and splits blocks: an allowance."""

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
"""Items of a setting and their names for people."""


@dataclass(frozen=True)
class Holding:
    """One worker under one setting. items: bytes on its GPU (or, without one, in memory) by purpose, `COLUMNS`. host:
    bytes in CPU memory beside a GPU. gathers: bytes of the base that come over the links in a step.
    """

    sharding: ShardingConfig
    items: dict[str, int]
    host: int
    gathers: int
    flops: int

    @property
    def total(self) -> int:
        """Bytes on the GPU, or in memory."""
        return sum(self.items.values())

    @property
    def name(self) -> str:
        """The setting in words."""
        s = self.sharding
        offloaded = [word for word, on in (("base", s.offload_parameters), ("AdamW", s.offload_optimizer)) if on]
        parts = [f"stage {s.zero_stage}"]
        parts += [f"offload {' + '.join(offloaded)}"] if offloaded else []
        parts += ["checkpointing"] if s.activation_checkpointing else []
        return ", ".join(parts)


def settings(workers: int, gpu: bool) -> Iterator[ShardingConfig]:
    """Every setting worth a look, without activation checkpointing. Alone, or without a GPU, little can be moved."""
    yield ShardingConfig()
    for stage in (1, 2, 3):
        for optimizer, parameters in ((False, False), (True, False), (False, True), (True, True)):
            allowed = (not parameters or stage == 3) and (gpu or not (optimizer or parameters))
            if allowed and (workers > 1 or optimizer or parameters):
                yield ShardingConfig(zero_stage=stage, offload_optimizer=optimizer, offload_parameters=parameters)


def hold(
    footprint: Footprint, sharding: ShardingConfig, *, workers: int, gpu: bool, element: int, passes: int
) -> Holding:
    """What one of `workers` holds under `sharding`.

    Args:
        footprint: of one worker with the whole base and AdamW's whole state, with or without activation checkpointing
            as `sharding` says.
        sharding: the setting.
        workers: of the group.
        gpu: whether each has a GPU.
        element: bytes of a parameter of the base.
        passes: walks through the base in a step (forward, backward, and forward again with checkpointing).
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
    if not gpu:  # one memory for all
        host = 0
    return Holding(sharding, items, host, gathers, footprint.flops)
