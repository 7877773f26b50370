"""DeepSpeed ZeRO. No other module uses DeepSpeed (docs/sharding.md).

The base is frozen and phi is not part of it, so two engines share no tensors. One has no optimizer and holds the base
in shards (stage 3). The other holds only phi and shards AdamW's state.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from transformers import PreTrainedModel

from corsa.config import ModelConfig, ShardingConfig
from corsa.models.loading import load_model
from corsa.training.adamw import SETTINGS


def _deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed (it takes seconds, so only when needed) and set it up for this worker's device."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed reads the device number from it
    if not dist.is_initialized():  # a single worker shards nothing, but may offload its base to CPU memory
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=HashStore(), rank=0, world_size=1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo is enough: compile nothing on a CPU worker
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # DeepSpeed uses old names
    deepspeed.init_distributed(verbose=False)
    return deepspeed


# The base


def load_sharded(config: ModelConfig, sharding: ShardingConfig, device: torch.device) -> PreTrainedModel:
    """Load the frozen base in shards: each worker holds a part of every matrix. Layers are gathered one at a time.

    Each parameter is sharded when it is created and filled from the leader's file, so no worker ever holds the whole
    base. Vectors (norms, biases) stay whole on every worker: they are too small to be worth gathering.

    Raises:
        CorsaError: the model cannot be loaded, with the cause.
    """
    deepspeed = _deepspeed(device)
    settings = _base_settings(config, sharding)
    with _sharded_as_made(settings):
        model = load_model(config, device, whole=lambda p: deepspeed.zero.GatheredParameters(p, modifier_rank=0))
    vectors = [p.ds_numel for p in model.parameters() if len(p.ds_shape) < 2]  # type: ignore[attr-defined]
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = max(vectors, default=0)
    engine = deepspeed.initialize(model=model, config=settings)[0]
    model.__dict__["engine"] = engine  # keeps its hooks alive; as a submodule it would be a reference cycle
    model.register_forward_pre_hook(lambda *_: engine.optimizer.release_backward_leftovers(), prepend=True)
    return model


def discard(model: PreTrainedModel) -> None:
    """Free a sharded base. DeepSpeed keeps references to it, which would hold its memory."""
    from deepspeed.runtime.zero import parameter_offload

    model.__dict__.pop("engine").destroy()
    parameter_offload.FWD_MODULE_STACK[:] = [m for m in parameter_offload.FWD_MODULE_STACK if m is not model]
    gc.collect()


def _base_settings(config: ModelConfig, sharding: ShardingConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3}
    if sharding.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    # Without bf16 a bfloat16 model would be sharded as float32. phi is no part of this engine, so it stays float32.
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_optimization": zero,
    }


@contextmanager
def _sharded_as_made(settings: dict[str, Any]) -> Iterator[None]:
    """Inside the block, transformers shards a model parameter by parameter while it creates it."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(settings)  # transformers keeps a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


# AdamW of phi


class ShardedAdamW:
    """`PlainAdamW` with a sharded state: each worker updates its part of phi, then all workers receive all of phi.

    Every worker steps with the same merged gradient g at phi + e. DeepSpeed takes gradients only from a backward pass,
    so it gets the backward pass of sum(phi * g), whose gradient is g.
    """

    def __init__(self, phi: nn.Parameter, sharding: ShardingConfig, device: torch.device) -> None:
        deepspeed = _deepspeed(device)
        self._phi = phi
        zero: dict[str, Any] = {"stage": min(sharding.zero_stage, 2)}
        zero["reduce_bucket_size"] = 2  # phi is one tensor: reduced as it is, without a buffer to copy it to
        if sharding.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0,  # the default is 1.0; the step has clipped already
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        module = nn.Module()
        module.register_parameter("phi", phi)
        adamw = torch.optim.AdamW([phi], **SETTINGS)
        self._engine = deepspeed.initialize(model=module, model_parameters=[phi], optimizer=adamw, config=settings)[0]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One group with its learning rate, as in torch optimizers."""
        return self._engine.optimizer.param_groups

    def step(self) -> None:
        """Update phi by `phi.grad`, the same on every worker."""
        g, self._phi.grad = self._phi.grad, None
        assert g is not None, "no gradient"
        self._engine.backward((self._phi * g).sum())
        self._engine.step()

    def moments(self) -> dict[str, Tensor]:
        """The whole state in phi's shape, on every worker. Empty before the first step. All workers call it."""
        return {name: self._whole(part) if part.dim() else part for name, part in self._state.items()}

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Continue from whole moments and the current phi."""
        self._engine.optimizer.refresh_fp32_params()
        self._state.clear()
        self._state.update(
            {name: self._own(whole) if whole.dim() else whole.clone() for name, whole in moments.items()}
        )

    def close(self) -> None:
        """Release phi for another optimizer."""
        self._engine.destroy()

    @property
    def _part(self) -> Tensor:
        """This worker's part of phi, padded so that all parts have the same size."""
        return self._engine.optimizer.single_partition_of_fp32_groups[0]

    @property
    def _state(self) -> dict[str, Tensor]:
        return self._engine.optimizer.optimizer.state[self._part]

    def _whole(self, part: Tensor) -> Tensor:
        part = part.to(self._phi.device)
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part)
        return torch.cat(parts)[: self._phi.numel()].view_as(self._phi)

    def _own(self, whole: Tensor) -> Tensor:
        size = self._part.numel()
        own = whole.reshape(-1)[dist.get_rank() * size :][:size].to(self._part.device)
        return nn.functional.pad(own, (0, size - own.numel()))
