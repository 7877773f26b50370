"""Models of two layers, edits of a few tokens, and rounds made of them, for the tests of the method.

`python tiny.py RANK WORKERS FOLDER` is one worker of a gloo group that trains all of `ROUNDS`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from corsa.algorithm.logprobs import answer_logprobs
from corsa.algorithm.packing import Triplet, pack
from corsa.config import EvaluationConfig, LoraConfig, ModelConfig, Placement, StepConfig, TrainingConfig
from corsa.config.steps import PredictionConfig, RoundConfig
from corsa.flow import Store
from corsa.lora.attached import Change
from corsa.lora.flat import Lora
from corsa.methods.base import Round, Taught, Teach
from corsa.models.encoding import Encoder
from corsa.models.registry import ARCHITECTURES
from corsa.training.loop import RoundFailedError, train
from corsa.training.mixing import Material
from corsa.training.worker_context import Loaded, WorkerContext
from corsa.training.worker_group import WorkerGroup

FAMILIES = ("llama", "qwen3", "gemma")
CPU = torch.device("cpu")
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
"""A change to Gemma's shape: one layer sees no more than six tokens back."""
END = 2
"""The end-of-text token of the tests' edits."""
LORA = LoraConfig(rank=4, alpha=8.0)


def tiny_model(family: str = "llama", vocabulary: int = 1024, **change: Any) -> PreTrainedModel:
    """A frozen model with random weights, ten times larger than the default initial values, so that attention and
    positions matter. (Gemma's embeddings keep their size: Gemma multiplies them itself.) Its small vocabulary makes a
    step cheap. `change` overrides the shape.
    """
    shape = {**ARCHITECTURES[f"tiny-{family}"], "vocab_size": vocabulary, **change}
    architecture = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32, attn_implementation="sdpa")
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and not (family == "gemma" and "embed" in name):
                weight.mul_(10)
    return model.requires_grad_(False).eval()


def triplets(count: int, *, seed: int = 4, opposed: int = 1, long: Sequence[int] = ()) -> list[Triplet]:
    """Random edits without a reference. In one of every `opposed` edits the old answer is the new one with more end
    tokens: L_SFT raises the end token, L_DPO lowers it, so they conflict. Edits in `long` have answers too long to
    be packed.
    """
    random = np.random.default_rng(seed)

    def words(low: int, high: int) -> list[int]:
        return random.integers(10, 1000, random.integers(low, high)).tolist()

    made = []
    for i in range(count):
        prompt, new, old = words(5, 12), words(1, 4), words(1, 4)
        if i in long:
            new, old = words(20, 30), words(20, 30)
        elif i % opposed == 0:
            old = [*new, *[END] * 4]
        made.append(Triplet(prompt, [*new, END], [*old, END]))
    return made


def with_reference(model: Any, edits: Sequence[Triplet]) -> list[Triplet]:
    """The edits with their log-probabilities under `model` as it is."""
    with torch.no_grad():
        logp = answer_logprobs(model, pack(edits), len(edits)).tolist()
    return [replace(t, reference=(new, old)) for t, new, old in zip(edits, *logp, strict=True)]


def reference_of(edits: Sequence[Triplet]) -> Tensor:
    """The reference column (2, E)."""
    return torch.tensor([t.reference for t in edits]).T


def shaken(lora: Lora, size: float = 0.1, seed: int = 1) -> Lora:
    """LoRA with all of phi moved away from its initial values, so that no factor is zero."""
    noise = torch.randn(lora.phi.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        lora.phi.add_(size * noise)
    return lora


def round_config(*, step: dict[str, Any] | None = None, **training: Any) -> RoundConfig:
    """A round of the tiny model: three epochs in batches of four at the default rate, unless told otherwise."""
    return RoundConfig(
        model=ModelConfig(name="random:tiny-llama"),
        evaluation=EvaluationConfig(),
        seed=3,
        round=1,
        lora=LORA,
        step=StepConfig.model_validate(step or {}),
        training=TrainingConfig(**{"epochs": 3, "batch": 4, "warmup": 2, **training}),
    )


@dataclass
class Trained:
    """The result of a round."""

    phi: Tensor
    curves: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


class Bench:
    """A base model and edits, on which one worker trains rounds, each from the same initial phi."""

    def __init__(self, edits: Sequence[Triplet], group: WorkerGroup | None = None, family: str = "llama") -> None:
        self.group = group or WorkerGroup(0, 1, CPU)
        model = tiny_model(family)
        self.edits = with_reference(model, edits)
        self.loaded = Loaded(model, Lora(model, LORA), cast(Encoder, None), packed=True)
        self.start = shaken(self.loaded.lora, 0.05).phi.detach().clone()

    def context(self, placement: Placement | None = None) -> WorkerContext:
        """A worker's tools."""
        return WorkerContext(self.group, placement or Placement(), {})

    def train(
        self,
        config: RoundConfig,
        folder: Path,
        *,
        edits: Sequence[Triplet] | None = None,
        earlier: Sequence[Triplet] = (),
        anchors: Sequence[Triplet] = (),
        post: Any = lambda line: None,
        group: WorkerGroup | None = None,
        **placement: Any,
    ) -> Trained:
        """The round, from the checkpoint in `folder` if one is there."""
        edits = self.edits if edits is None else edits
        with torch.no_grad():
            self.loaded.lora.phi.copy_(self.start)
        context = WorkerContext(group or self.group, Placement(**placement), {})
        curves = train(
            config, Material(edits, earlier, anchors), self.loaded, context, (Store(folder), "partial/x"), post
        )
        return Trained(self.loaded.lora.phi.detach().clone(), curves, context.notes)

    def teach(self, teach: Teach, config: PredictionConfig, folder: Path, before: Change | None = None) -> Taught:
        """A round of a method with its own teach function. Its checkpoints are in `folder`."""
        context, store = self.context(), Store(folder)

        def learn(
            examples: Sequence[Triplet], name: str, phi: torch.nn.Parameter | None = None, /
        ) -> list[dict[str, Any]]:
            assert isinstance(config, RoundConfig)
            loaded, checkpoint = replace(self.loaded, other=phi), (store, f"partial/x/{name}")
            return train(config, Material(examples), loaded, context, checkpoint, lambda line: None)

        return teach(
            Round(
                config=config,
                edits=(),
                triplets=self.edits,
                earlier=(),
                model=self.loaded.model,
                encoder=self.loaded.encoder,
                lora=self.loaded.lora,
                before=before,
                leads=True,
                share=lambda value: value,
                train=learn,
                input_file=lambda name, file: folder,
                post=lambda line: None,
            )
        )


# Rounds that are trained by one process and by a group of two

EDITS = 7

ROUNDS = {
    "corsa": round_config(),  # 7 edits in batches of 4 and 3
    "fewer edits than workers": round_config(batch=3),  # the last batch of an epoch has one edit
    "one perturbation per two edits": round_config(step={"scope": "microbatch", "microbatch": 2}),
    "authors, summed over tokens": round_config(step={"pcgrad": "authors", "reduction": "sequence"}),
    "lora": round_config(step={"lambda": 0.0, "rho": 0.0, "pcgrad": "off"}),
    "perturbed in every third step": round_config(batch=3, step={"perturb_every": 3}),
    "perturbed at random": round_config(step={"perturbation": "random", "radius": "adaptive", "rho": 1.0}),
}


@dataclass(frozen=True)
class Mortal(WorkerGroup):
    """Workers that all fail at the same all-reduce. Gradients and losses each have one, twice a step."""

    sums: int = 10**9

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum; fails after `sums` of them."""
        if self.sums <= 0:
            raise ConnectionError("a worker was lost")
        object.__setattr__(self, "sums", self.sums - 1)
        return super().sum(tensor)


def with_one_bad_reference(edits: Sequence[Triplet]) -> list[Triplet]:
    """The first edit's loss is NaN: one step in every epoch must be skipped."""
    return [replace(edits[0], reference=(math.nan, 0.0)), *edits[1:]]


def work(rank: int, workers: int, folder: Path) -> None:
    """The work of one worker of the group. Each worker writes its results to a separate file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
    group = WorkerGroup.join(Placement(threads=1))
    bench = Bench(triplets(EDITS), group)
    found: dict[str, Any] = {}
    for name, config in ROUNDS.items():
        trained = bench.train(config, folder / name)
        found[name] = (trained.phi, trained.curves)
    broken = Mortal(group.rank, group.size, group.device, sums=4 * 4 + 1)  # in the fifth step
    try:
        bench.train(ROUNDS["corsa"], folder / "resumed", group=broken, checkpoint_every=2)
    except ConnectionError:
        trained = bench.train(ROUNDS["corsa"], folder / "resumed")
        found["resumed"] = (trained.phi, trained.curves)
    trained = bench.train(ROUNDS["corsa"], folder / "nan", edits=with_one_bad_reference(bench.edits))
    found["nan"] = (trained.phi, trained.curves)
    try:
        config = round_config(max_skipped=1)
        bench.train(config, folder / "failed", edits=with_one_bad_reference(bench.edits))
    except RoundFailedError as error:
        found["failed"] = str(error)
    found["collected"] = group.collect([f"row of {rank}"])
    found["shared"] = group.share(f"text of {rank}")
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
