"""A plan as terminal tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table

from corsa.planning.memory import COLUMNS, MIB
from corsa.planning.plan import Choice, Plan, gib


def tables(plan: Plan, method: str, counted: str) -> list[Table | str]:
    """The output of a plan: the job, one row per setting, memory by purpose, the recommendation, and the time with its
    rate.
    """
    job = plan.job
    device = "GPU" if job.gpu else "worker"
    lines: list[Table | str] = [
        f"[bold]{job.model.name}[/bold], {plan.parameters / 1e9:.3g}B parameters in {job.model.dtype}, and "
        f"{plan.trained / 1e6:.3g}M of LoRA (rank {job.lora.rank}) under {method}: {job.workers} {device}"
        f"{'s' * (job.workers > 1)}"
        + (f" of {gib(plan.memory)} GiB" if plan.memory else "")
        + f", batch {job.batch}, micro-batch {min(job.micro_batch, -(-job.batch // job.workers))}; {counted}",
        settings_table(plan),
        purposes_table(plan),
        "Columns: the stage; B: with the base offloaded to CPU memory, A: with AdamW's state.",
        kept_table(plan),
        f"At their largest, before the way back: activations {gib(plan.activations)} GiB, logits {gib(plan.logits)} "
        "GiB; the peak may be later.",
        f"{'take' if plan.recommended else 'error'}: {plan.why}",
    ]
    if chosen := plan.recommended:
        lines += [f"options: {' '.join(options(plan, chosen))}", _time(plan, chosen)]
    return lines


def settings_table(plan: Plan) -> Table:
    """One row per stage and offload: total memory, whether it fits, time per step, and the total with activation
    checkpointing. At most 80 columns wide.
    """
    table = _table("setting")
    host = ["CPU"] if plan.job.gpu else []
    for name in ["total GiB", *host, "fits", "s/step", "checkpointed"]:
        table.add_column(name, justify="right", no_wrap=True)
    for plain, checkpointed in _pairs(plan):
        cells = [gib(plain.holding.total), *([gib(plain.holding.host)] if host else []), *_verdict(plan, plain)]
        cells.append(f"{gib(checkpointed.holding.total)} {_verdict(plan, checkpointed)[0]}")
        table.add_row(plain.holding.name, *cells)
    return table


def purposes_table(plan: Plan) -> Table:
    """One row per purpose: peak memory in GiB for every setting without activation checkpointing. At most 80 columns
    wide: a setting is named by its stage, with B and A for what is offloaded.
    """
    holdings = [plain.holding for plain, _ in _pairs(plan)]
    table = _table("GiB at the peak")
    for holding in holdings:
        sharding = holding.sharding
        moved = "B" * sharding.offload_parameters + "A" * sharding.offload_optimizer
        table.add_column(f"{sharding.zero_stage}{moved}", justify="right", no_wrap=True)
    for name, shown in COLUMNS.items():
        if name in ("activations", "logits") or any(c.holding.items[name] >= MIB for c in plan.choices):
            table.add_row(shown, *(gib(holding.items[name]) for holding in holdings))
    return table


def kept_table(plan: Plan) -> Table:
    """One row per kind of layer: what autograd keeps of a forward pass without checkpointing, its share, and the least
    that these layers can keep: the same with every tensor in the base's data type.
    """
    table = _table("kept for the backward pass")
    for name in ("GiB", "share", f"all in {plan.job.model.element}, GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    whole = sum(bytes_ for bytes_, _ in plan.kept.values())
    for kind, (bytes_, least) in sorted(plan.kept.items(), key=lambda item: -item[1][0]):
        table.add_row(kind, gib(bytes_), f"{100 * bytes_ / whole:.0f} %", gib(least))
    table.add_row("together", gib(whole), "", gib(sum(least for _, least in plan.kept.values())))
    return table


def _table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    return table


def _pairs(plan: Plan) -> Iterator[tuple[Choice, Choice]]:
    """Every setting, without activation checkpointing and with it."""
    half = len(plan.choices) // 2
    return zip(plan.choices[:half], plan.choices[half:], strict=True)


def _verdict(plan: Plan, choice: Choice) -> list[str]:
    style = "bold green" if choice is plan.recommended else "red" if choice.fits is False else "default"
    word = "?" if choice.fits is None else "yes" if choice.fits else "no"
    return [f"[{style}]{word}[/]", f"{choice.step_s:.3g}"]


def options(plan: Plan, choice: Choice) -> list[str]:
    """The command-line options of a setting."""
    words = ["--placement.gpu"] if plan.job.gpu else []
    words += ["--workers", str(plan.job.workers), "--dtype", plan.job.model.dtype]
    sharding = choice.holding.sharding
    words += ["--sharding.zero-stage", str(sharding.zero_stage)] if sharding.zero_stage else []
    for name in ("offload_parameters", "offload_optimizer", "activation_checkpointing"):
        words += [f"--sharding.{name.replace('_', '-')}"] if getattr(sharding, name) else []
    return words


def _time(plan: Plan, choice: Choice) -> str:
    job, seconds = plan.job, choice.step_s * plan.steps
    minutes = f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    return (
        f"time: {plan.steps} steps ({job.edits} edits, {job.epochs} epochs) x {choice.step_s:.3g} s = "
        f"{f'{seconds:.0f} s' if seconds < 120 else minutes} of training a round, at {plan.rate.tflops:.3g} TFLOP/s "
        f"a worker ({plan.rate.source})"
        + (", without the time to unpack 4-bit weights, which was not measured" if job.model.dtype == "nf4" else "")
        + (f" and {plan.rate.link:g} GB/s to gather" if choice.holding.gathers else "")
    )


def as_json(plan: Plan, method: str, counted: str) -> dict[str, Any]:
    """The plan as JSON data, in bytes and seconds."""
    job, chosen = plan.job, plan.recommended
    return {
        "model": job.model.canonical(),
        "method": method,
        "parameters": plan.parameters,
        "trained": plan.trained,
        "workers": job.workers,
        "gpu": job.gpu,
        "memory": plan.memory,
        "batch": job.batch,
        "tokens": counted,
        "settings": [
            {
                "sharding": c.holding.sharding.canonical(),
                "name": c.holding.name,
                "bytes": c.holding.items,
                "total": c.holding.total,
                "host": c.holding.host,
                "fits": c.fits,
                "step_s": c.step_s,
            }
            for c in plan.choices
        ],
        "kept": {kind: {"bytes": bytes_, "least": least} for kind, (bytes_, least) in plan.kept.items()},
        "recommended": chosen and chosen.holding.sharding.canonical(),
        "why": plan.why,
        "options": options(plan, chosen) if chosen else None,
        "steps": plan.steps,
        "seconds": chosen and chosen.step_s * plan.steps,
        "rate": {"tflops": plan.rate.tflops, "link": plan.rate.link, "source": plan.rate.source},
    }
