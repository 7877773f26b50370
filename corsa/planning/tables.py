"""A plan for people and for programs."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from corsa.planning.memory import COLUMNS, MIB
from corsa.planning.plan import Choice, Plan, gib


def tables(plan: Plan, method: str, counted: str) -> list[Table | str]:
    """What a plan says: what was planned, a row per setting, the recommendation, and the time with its rate."""
    job = plan.job
    device = "GPU" if job.gpu else "worker"
    lines: list[Table | str] = [
        f"[bold]{job.model.name}[/bold], {plan.parameters / 1e9:.3g}B parameters in {job.model.dtype}, and "
        f"{plan.trained / 1e6:.3g}M of LoRA (rank {job.lora.rank}) under {method}: {job.workers} {device}"
        f"{'s' * (job.workers > 1)}"
        + (f" of {gib(plan.memory)} GiB" if plan.memory else "")
        + f", batch {job.batch}, micro-batch {min(job.micro_batch, -(-job.batch // job.workers))}; {counted}",
        settings_table(plan),
        f"At their largest, before the way back: activations {gib(plan.activations)} GiB, logits {gib(plan.logits)} "
        "GiB; the peak may be later.",
        f"{'take' if plan.recommended else 'error'}: {plan.why}",
    ]
    if chosen := plan.recommended:
        lines += [f"options: {' '.join(options(plan, chosen))}", _time(plan, chosen)]
    return lines


def settings_table(plan: Plan) -> Table:
    """A row per stage and offload: what is held at the peak, and the total with activation checkpointing."""
    names = [
        n for n in COLUMNS if n in ("activations", "logits") or any(c.holding.items[n] >= MIB for c in plan.choices)
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("GiB at the peak", min_width=19)
    host = ["CPU"] if plan.job.gpu else []
    for name in [*(COLUMNS[n] for n in names), "total", *host, "fits", "s/step", "check-\npointed"]:
        table.add_column(name, justify="right")
    half = len(plan.choices) // 2  # the settings, and again with activation checkpointing
    for plain, checkpointed in zip(plan.choices[:half], plan.choices[half:], strict=True):
        holding = plain.holding
        cells = [gib(holding.items[name]) for name in names]
        cells += [gib(holding.total), *([gib(holding.host)] if host else []), *_verdict(plan, plain)]
        cells.append(f"{gib(checkpointed.holding.total)} {_verdict(plan, checkpointed)[0]}")
        table.add_row(holding.name, *cells)
    return table


def _verdict(plan: Plan, choice: Choice) -> list[str]:
    style = "bold green" if choice is plan.recommended else "red" if choice.fits is False else "default"
    word = "?" if choice.fits is None else "yes" if choice.fits else "no"
    return [f"[{style}]{word}[/]", f"{choice.step_s:.3g}"]


def options(plan: Plan, choice: Choice) -> list[str]:
    """The pipelines' options for a setting."""
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
        f"a worker ({plan.rate.source})" + (f" and {plan.rate.link:g} GB/s to gather" if choice.holding.gathers else "")
    )


def as_json(plan: Plan, method: str, counted: str) -> dict[str, Any]:
    """The same for a program: bytes and seconds."""
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
        "recommended": chosen and chosen.holding.sharding.canonical(),
        "why": plan.why,
        "options": options(plan, chosen) if chosen else None,
        "steps": plan.steps,
        "seconds": chosen and chosen.step_s * plan.steps,
        "rate": {"tflops": plan.rate.tflops, "link": plan.rate.link, "source": plan.rate.source},
    }
