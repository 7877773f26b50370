"""Refuses a run that does not fit into memory, before it starts. Imports heavy packages only if a plan is needed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from corsa.config import ModelConfig, Placement
from corsa.config.amounts import as_bytes
from corsa.config.code_steps import ProblemsConfig, ProblemsPlace, ProgramEditsConfig
from corsa.config.steps import EditsConfig, EditsPlace, RoundConfig
from corsa.data.benchmarks.code_prompt import read_template
from corsa.errors import CorsaError
from corsa.models.registry import ARCHITECTURES
from corsa.planning.machine import memory_here

if TYPE_CHECKING:
    from rich.console import Console

    from corsa.flow import Step

EASY = 8
"""A base that takes less than 1/EASY of the memory needs no plan: rounds of facts fit with usual batch sizes."""


def refuse_what_memory_cannot_hold(pending: Iterable[Step], console: Console) -> None:
    """Plan the pending rounds if their memory is known and the model is not small compared with it.

    Raises:
        CorsaError: a round does not fit; the plan's table is printed first. Never raised with `--placement.force`.
    """
    rounds: dict[Any, Step] = {}
    for step in pending:
        if isinstance(step.config, RoundConfig) and isinstance(step.placement, Placement):
            config = step.config
            rounds.setdefault((config.model, config.step, config.lora, step.placement), step)
    for step in rounds.values():
        config, placement = step.config, step.placement
        assert isinstance(config, RoundConfig)
        assert isinstance(placement, Placement)
        long = isinstance(step.inputs["edits"].config, ProgramEditsConfig)
        memory = in_question(config.model, placement, long=long)
        if memory is not None:
            _refuse(step, config, placement, memory, console)


def in_question(model: ModelConfig, placement: Placement, *, long: bool = False) -> int | None:
    """The memory to plan a model's rounds for, as in `available`. None if no plan is needed: the memory is unknown, the
    run is forced, or the model is small compared with the memory and its edits are not `long`.
    """
    memory = available(placement)
    if placement.force or memory is None or (not long and _easy(model, memory // placement.pack)):
        return None
    return memory


def available(placement: Placement) -> int | None:
    """Bytes of each GPU (given or detected), or of a worker's share of this machine; None if unknown."""
    if placement.gpu:
        return as_bytes(placement.gpu_memory, "--placement.gpu-memory") if placement.gpu_memory else memory_here(True)
    memory = memory_here(False)
    return None if memory is None else memory // placement.most_workers


def _easy(model: ModelConfig, memory: int) -> bool:
    """Whether the model is so small that a round of facts fits with usual batch sizes."""
    shape = ARCHITECTURES.get(model.name.removeprefix("random:"))
    if shape is None:
        return False
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"] + 2 * shape["num_key_value_heads"]
    layer = hidden * (3 * shape["intermediate_size"] + (heads + shape["num_attention_heads"]) * shape["head_dim"])
    tables = shape["vocab_size"] * hidden * (1 if shape["tie_word_embeddings"] else 2)
    size = (layer * shape["num_hidden_layers"] + tables) * (2 if model.element == "bfloat16" else 4)
    return size * EASY < memory


def _refuse(step: Step, config: RoundConfig, placement: Placement, memory: int, console: Console) -> None:
    from corsa.planning.lengths import ASSUMED, lengths, program_lengths
    from corsa.planning.plan import Job, gib, plan
    from corsa.planning.rates import rate
    from corsa.planning.tables import tables

    tokens, counted = ASSUMED, "20 tokens an edit (assumed)"
    edits = step.inputs["edits"]
    if isinstance(edits.config, EditsConfig) and isinstance(edits.placement, EditsPlace):
        with suppress(CorsaError):  # errors in the data are reported when it is read
            tokens, counted = lengths(config.model, edits.config.benchmark, edits.placement.data, edits.config.limit)
    problems = edits.inputs.get("problems")
    if problems and isinstance(problems.config, ProblemsConfig) and isinstance(problems.placement, ProblemsPlace):
        read, place = problems.config, problems.placement
        template = read_template(place.template)
        tokens, counted = program_lengths(config.model, place.data, read.limit, read.offset, template)
    training = config.training
    job = Job(
        model=config.model,
        step=config.step,
        lora=config.lora,
        tokens=tokens,
        edits=len(tokens),
        epochs=training.epochs,
        batch=training.batch if tokens is ASSUMED else min(training.batch, len(tokens)),
        micro_batch=placement.micro_batch,
        workers=placement.workers,
        gpu=placement.gpu,
        pack=placement.pack,
    )
    found = plan(job, rate(placement.gpu, 1.0, None, None), memory, None)
    holding = found.choice(placement.sharding).holding
    if holding.total <= memory:
        return
    for part in tables(found, "this run's step", counted)[:-1]:
        console.print(part)
    where = "a GPU" if placement.gpu else "a worker"
    raise CorsaError(
        f"{config.model.name} under {holding.name} needs {gib(holding.total)} GiB on {where} that has "
        f"{gib(memory)} GiB: {found.why}. The table above has every setting; --placement.force starts it all the same"
    )
