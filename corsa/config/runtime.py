"""How steps are run: workers, memory, sharding; and all settings of a run together.

`Placement` changes the time that a result takes, never the result. It enters no identity.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from tyro.conf import Suppress

from corsa.config.amounts import as_bytes
from corsa.config.base import Frozen, plain
from corsa.config.evaluation import EvaluationConfig
from corsa.config.method import MethodSettings
from corsa.config.model import ModelConfig
from corsa.errors import CorsaError


class ShardingConfig(Frozen):
    """What the workers of a group shard, instead of each holding all of it (DeepSpeed ZeRO).

    The base is frozen: stage 1 shards AdamW's state of phi, the LoRA parameters; 2 also its merged gradient; 3 also
    the base. The result is the same. docs/sharding.md has the table.
    """

    zero_stage: int = Field(
        default=0,
        ge=0,
        le=3,
        description="what is sharded; 0: nothing; 1: AdamW's state of phi; 2: also its gradient; 3: also the base",
    )
    offload_parameters: bool = Field(
        default=False, description="keep a worker's shard of the base in CPU memory (stage 3 only)"
    )
    offload_optimizer: bool = Field(
        default=False, description="keep a worker's shard of AdamW's state in CPU memory, and update there (stages 1-3)"
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="keep only the inputs of each layer, and compute the rest again in the backward pass (any stage)",
    )

    @model_validator(mode="after")
    def _meant(self) -> ShardingConfig:
        if self.offload_parameters and self.zero_stage < 3:
            raise ValueError(
                f"offload_parameters moves a worker's shard of the base, and stage {self.zero_stage} does not shard "
                "that: set zero_stage 3, or leave offload_parameters out"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "offload_optimizer moves a worker's shard of AdamW's state, and stage 0 does not shard it: "
                "set zero_stage 1, 2 or 3, or leave offload_optimizer out"
            )
        return self


class Placement(Frozen):
    """How steps are run. Never part of a step's identity: it changes the time a result takes, not the result."""

    workers: Annotated[int, plain()] = Field(default=1, ge=1, description="training workers of one group")
    max_workers: Annotated[int | None, plain()] = Field(
        default=None,
        ge=1,
        description="let the group grow to so many workers while the cluster has room, and shrink to --workers if "
        "nodes are lost; each change goes on from the last checkpoint; default: its size is fixed",
    )
    resize_interval: float = Field(
        default=60.0, gt=0, description="seconds between looks whether a group with --max-workers can grow"
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads per worker; default: the node's cores divided by its workers"
    )
    gpu: bool = Field(default=False, description="one GPU per worker")
    cpus: float | None = Field(
        default=None, gt=0, description="CPUs reserved per worker; default: all but what the data stream needs"
    )
    micro_batch: int = Field(
        default=16, ge=1, description="edits per forward pass on one worker, of each adapter trained together"
    )
    gpu_memory: str | None = Field(
        default=None, description="memory of each GPU, such as 48GiB; a larger run is refused; default: detected"
    )

    force: bool = Field(default=False, description="start a run even if the plan says that it does not fit into memory")
    branch: Annotated[str, Suppress] = Field(
        default="",
        description="steps of different branches share no worker group: a failure in one does not affect the others",
    )
    probe_batch: int = Field(default=128, ge=1, description="probes generated together on one worker")
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description="what generates the answers to the probes of facts; vllm: Ray Data's vLLM processor on the GPUs of "
        "the group, after its training, for large evaluations of adapters",
    )
    pack: Annotated[int, plain()] = Field(
        default=1,
        ge=1,
        description="rounds that differ only in lambda, beta, rho, learning rate and seed trained together by one "
        "worker group, this many at once (one at a time if the base or AdamW is sharded)",
    )
    checkpoint_every: int = Field(default=20, ge=1, description="steps between checkpoints inside a round")
    max_failures: int = Field(default=3, ge=0, description="worker-group restarts before a run gives up")
    autoscale: bool = Field(default=False, description="the cluster starts nodes on demand: wait for them")
    start_timeout: float = Field(
        default=1800.0,
        gt=0,
        description="total seconds to wait for resources for the workers, at the start and after losses",
    )
    heartbeat_timeout: float = Field(default=30.0, gt=0, description="seconds after which a silent worker is replaced")
    sharding: Annotated[ShardingConfig, plain("sharding")] = ShardingConfig()

    @property
    def most_workers(self) -> int:
        """The workers that a group can have at most."""
        return self.max_workers or self.workers

    @model_validator(mode="after")
    def _can_grow(self) -> Placement:
        if self.most_workers < self.workers:
            raise ValueError(f"max_workers {self.max_workers} is less than workers {self.workers}: give the larger one")
        return self

    @field_validator("gpu_memory")
    @classmethod
    def _an_amount(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                as_bytes(value, "")
            except CorsaError as error:
                raise ValueError(str(error).strip()) from error
        return value


class RunSettings(MethodSettings):
    """All that a round of any method can depend on, and how it is run."""

    model: ModelConfig = ModelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    placement: Placement = Placement()
