"""One worker of a gloo group that shards the base model: `python sharded.py RANK WORKERS FOLDER`.

It writes its results to FOLDER/RANK.pt; tests/test_sharding.py compares them with one process without DeepSpeed.
"""

from __future__ import annotations

import gc
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from tiny import EDITS, LORA, ROUNDS, Bench, Mortal, shaken, tiny_model, triplets, with_reference

from corsa.algorithm import step as steps
from corsa.algorithm.logprobs import answer_logprobs
from corsa.algorithm.packing import pack
from corsa.algorithm.sam import perturbed
from corsa.config import ModelConfig, Placement, ShardingConfig
from corsa.evaluation.generation import generate
from corsa.lora.attached import attached
from corsa.lora.flat import Lora
from corsa.lora.peft_format import save_adapter
from corsa.models.encoding import Encoder
from corsa.training.worker_context import Loaded
from corsa.training.worker_group import WorkerGroup

CASES = list(product((0, 1, 2, 3), (False, True), (1, 16)))
"""Stage, activation checkpointing, edits of a micro-batch."""

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15], [16, 17, 18]]
STOPS = torch.zeros(1024, dtype=torch.bool)


def bench(folder: Path, group: WorkerGroup, dtype: str = "float32") -> Bench:
    """The tests' base model, placed on the group, and seven edits, one of which is too long to be packed."""
    made = Bench.__new__(Bench)
    model = group.place(ModelConfig.model_validate({"name": str(folder / "base"), "dtype": dtype}))
    made.group, made.edits = group, with_reference(tiny_model(), triplets(EDITS, long=(3,)))
    made.loaded = Loaded(model, Lora(model, LORA), cast(Encoder, None), packed=True)
    made.start = shaken(made.loaded.lora, 0.05).phi.detach().clone()
    return made


def asked(made: Bench, share: slice) -> dict[str, Any]:
    """Answers and log-probabilities of one worker's share, plain and with an adapter attached by hooks."""
    model, group = made.loaded.model, made.group
    other = Lora(tiny_model(), LORA)
    change = shaken(other, 0.2, seed=8).adapter()
    found: dict[str, Any] = {}
    with made.loaded.lora.off(), torch.no_grad():
        for name, changes in (("plain", []), ("attached", [change])):
            with attached(model, *changes), group.in_step(model):
                mine = PROMPTS[share]
                found[name] = generate(model, mine, stops=STOPS, new_tokens=4, batch=2, device="cpu") if mine else []
                edits = made.edits[share]
                found[f"{name} logp"] = answer_logprobs(model, pack(edits), len(edits)) if edits else torch.zeros(2, 0)
    return found


# Measurements of a sharded base


@contextmanager
def gathers(total: int) -> Iterator[list[float]]:
    """Counts how often the base is gathered inside the context, in units of the whole base."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    name = "_PartitionedParameterCoordinator__all_gather_params_"
    original, count = getattr(Coordinator, name), [0.0]

    def counted(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += sum(p.ds_numel for p in params if p.ds_status.name == "NOT_AVAILABLE") / total
        return original(self, params, *args, **kwargs)

    setattr(Coordinator, name, counted)
    try:
        yield count
    finally:
        setattr(Coordinator, name, original)


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Measures the largest growth of this process's private memory inside the context, MiB (without mapped files)."""

    def own() -> float:
        return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024

    before, peak, over = own(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            peak[0] = max(peak[0], own() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def resident(model: Any) -> dict[str, int]:
    """Elements of the base: total, in vectors, in this worker's shards, and currently gathered."""
    parameters = list(model.parameters())
    return {
        "all": sum(p.ds_numel for p in parameters),
        "vectors": sum(p.ds_numel for p in parameters if len(p.ds_shape) < 2),
        "shards": sum(p.ds_tensor.ds_numel for p in parameters),
        "whole": sum(p.numel() for p in parameters),
    }


def work(rank: int, workers: int, folder: Path) -> None:
    """The work of one worker of the group."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
    torch.set_num_threads(1)

    def group(stage: int, **sharding: Any) -> WorkerGroup:
        settings = ShardingConfig(zero_stage=stage, **sharding)
        return WorkerGroup.join(Placement(threads=1, workers=workers, sharding=settings))

    found: dict[str, Any] = {}
    for stage, again in sorted({case[:2] for case in CASES}):
        made = bench(folder, group(stage, activation_checkpointing=again))
        for size in sorted({case[2] for case in CASES}):
            trained = made.train(ROUNDS["corsa"], folder / f"{stage}{again}{size}", micro_batch=size)
            found[f"{stage} {again} {size}"] = trained.phi
        if stage == 3:
            found[f"counts {again}"] = counts(made, folder / f"counts{again}")
            found[f"resident {again}"] = resident(made.loaded.model)
            if not again:
                for name in ("fewer edits than workers", "one perturbation per two edits"):
                    found[name] = made.train(ROUNDS[name], folder / name).phi
                found["asked"] = asked(made, slice(0, 4) if rank == 0 else slice(4, 4))
                with gathers(1) as count:
                    save_adapter(made.loaded.lora, folder / f"adapter{rank}", "base")
                found["gathers of saving"] = count[0]
                interrupted(made, folder, found)
            made.group.let_go(made.loaded.model)
    offloaded = bench(folder, group(3, offload_parameters=True, offload_optimizer=True))
    found["offloaded"] = offloaded.train(ROUNDS["corsa"], folder / "offloaded").phi
    for stage in (0, 1, 2, 3):
        made = bench(folder, group(stage), "bfloat16")
        with cosines() as seen:
            for size in (1, 16):
                trained = made.train(ROUNDS["corsa"], folder / f"bfloat16{stage}{size}", micro_batch=size)
                found[f"bfloat16 {stage} {size}"] = trained.phi
        found[f"cosines {stage}"] = seen
        found[f"dtypes {stage}"] = (made.loaded.model.dtype, made.loaded.lora.phi.dtype)
    for name in (f"random:{folder / 'large'}", str(folder / "large")):
        gc.collect()  # free earlier objects first, or their release would be counted
        loader = group(3)
        with peak_memory() as peak:
            model: Any = loader.place(ModelConfig(name=name))
        parts = [p.ds_tensor.double().sum() for p in model.parameters()]
        found["random" if name.startswith("random:") else "saved"] = (peak[0], resident(model), float(sum(parts)))
        loader.let_go(model)
        del model
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def counts(made: Bench, folder: Path) -> list[float]:
    """How often the base was gathered in each step, per micro-batch."""
    total = resident(made.loaded.model)["all"]
    seen: list[float] = []
    with gathers(total) as count:

        def post(line: dict[str, Any]) -> None:
            seen.append(count[0])

        made.train(ROUNDS["corsa"], folder, post=post, edits=[t for t in made.edits if t.packs])
    return [after - before for before, after in zip([0.0, *seen], seen, strict=False)]


def interrupted(made: Bench, folder: Path, found: dict[str, Any]) -> None:
    """Interrupts a round in its fifth step and resumes it at the same stage. Other tests use the checkpoint."""
    group = made.group
    broken = Mortal(group.rank, group.size, group.device, group.sharding, sums=4 * 4 + 1)
    for name in ("resumed", "left"):
        try:
            made.train(ROUNDS["corsa"], folder / name, group=broken, checkpoint_every=2)
        except ConnectionError:
            broken = Mortal(group.rank, group.size, group.device, group.sharding, sums=4 * 4 + 1)
    dist.barrier()
    found["resumed"] = made.train(ROUNDS["corsa"], folder / "resumed").phi


@contextmanager
def cosines() -> Iterator[list[float]]:
    """The cosine between each perturbation applied to phi inside the context and the intended one."""
    seen: list[float] = []

    @contextmanager
    def watched(phi: torch.Tensor, e: torch.Tensor) -> Iterator[None]:
        before = phi.detach().double()
        with perturbed(phi, e):
            applied = phi.detach().double() - before
            seen.append(float(torch.cosine_similarity(applied.flatten(), e.double().flatten(), dim=0)))
            yield

    original, steps.perturbed = steps.perturbed, watched
    try:
        yield seen
    finally:
        steps.perturbed = original


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
