"""Step time and peak memory of LoRA and CoRSA on an accelerator, compared with the plan: at most eight minutes.

Each case runs in its own process, so an out-of-memory error affects no other case and peaks stay separate. Run as
`python -m corsa.perf.accelerator JSON`, this module measures one case and prints one line of JSON. A tiny model checks
each method and stage first: a fault of the machine shows in seconds, before 14 billion weights are drawn.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from corsa.errors import CorsaError

PROMPT, ANSWER = 12, 4
"""Tokens per edit: about 20 with both answers."""

CHECKED = "random:tiny-llama"
"""The model of the check."""

WITHIN = 1e-4
"""Largest difference allowed between the updates of the packed step and of the literal Algorithm 1, in the check,
relative to the update."""

MODELS = ("random:qwen3-4b", "random:qwen3-8b", "random:qwen3-14b")


@dataclass(frozen=True)
class Case:
    """One measurement: a model with a method and a ZeRO stage, on one worker."""

    model: str
    method: str
    stage: int
    dtype: str
    edits: int
    steps: int
    gpu: bool
    rank: int = 32
    check: bool = False


def cases(
    models: Sequence[str], methods: Sequence[str], stages: Sequence[int], *, edits: int, steps: int, gpu: bool
) -> Iterator[Case]:
    """Every combination, small models first, so that the models measured in time have all methods and stages."""
    dtype = "bfloat16" if gpu else "float32"
    for model in models:
        for stage in stages:
            for method in methods:
                yield Case(model, method, stage, dtype, edits, steps, gpu)


def measure_all(chosen: Sequence[Case], minutes: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure all cases within `minutes`. Cases without enough time are listed with the reason."""
    ends = time.monotonic() + 60 * minutes
    faults = {}
    for case in {
        (c.method, c.stage): replace(c, model=CHECKED, dtype="float32", steps=1, check=True) for c in chosen
    }.values():
        found = _in_a_process(case, ends - time.monotonic())
        say(f"check on {case.model}, {case.method}, stage {case.stage}: {found.get('error') or 'as it should be'}")
        faults |= {(case.method, case.stage): f"check failed: {found['error']}"} if "error" in found else {}
    rows = []
    for number, case in enumerate(chosen, start=1):
        left = ends - time.monotonic()
        name = f"{number}/{len(chosen)}  {case.model}, {case.method}, stage {case.stage}"
        if fault := faults.get((case.method, case.stage)):
            row = asdict(case) | {"error": fault}
        else:
            over = {"error": f"not within {minutes:g} minutes"}
            row = asdict(case) | (_in_a_process(case, left) if left > 0 else over)
        said = row.get("error") or f"{row['step_s']:.3g} s a step, {row['peak'] / 2**30:.2f} GiB"
        say(f"{name}: {said}")
        rows.append(row)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {"created": created, "device": _device(chosen), "rows": rows, "ratios": ratios(rows)}


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model and stage, every method's step time and peak relative to plain LoRA's."""
    measured = [row for row in rows if "error" not in row]
    found = []
    for lora in (row for row in measured if row["method"] == "lora"):
        for row in measured:
            if row is not lora and (row["model"], row["stage"]) == (lora["model"], lora["stage"]):
                times = {"step": row["step_s"] / lora["step_s"], "peak": row["peak"] / lora["peak"]}
                found.append({name: row[name] for name in ("model", "stage", "method")} | times)
    return found


def markdown(found: dict[str, Any]) -> str:
    """The rows as a table for docs/performance.md."""
    head = ["model", "method", "stage", "s/step", "TFLOP/s", "of a matrix product's", "peak, GiB", "planned, GiB"]
    head.append("planned / peak")
    lines = [head, ["---"] * len(head)]
    for row in found["rows"]:
        start = [row["model"], row["method"], str(row["stage"])]
        if "error" in row:
            lines.append([*start, row["error"], *[""] * 5])
            continue
        size = [f"{row[name] / 2**30:.2f}" for name in ("peak", "planned")]
        ratio = f"{row['planned'] / row['peak']:.2f}"
        share = f"{100 * row['tflops'] / row['matmul_tflops']:.0f} %"
        lines.append([*start, f"{row['step_s']:.3g}", f"{row['tflops']:.3g}", share, *size, ratio])
    told = [
        f"{r['model']}, stage {r['stage']}: {r['method']} / lora {r['step']:.2f} in time, {r['peak']:.2f} in memory"
        for r in found["ratios"]
    ]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"{found['device']}, {found['created']}", "", *table, *(["", *told] if told else [])])


def _in_a_process(case: Case, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "corsa.perf.accelerator", json.dumps(asdict(case))]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": "stopped: the time was over"}
    last = (ran.stdout.strip().splitlines() or [""])[-1]
    if ran.returncode == 0 and last.startswith("{"):
        return json.loads(last)
    return {"error": (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1][:200]}


def _device(chosen: Sequence[Case]) -> str:
    import torch

    if any(case.gpu for case in chosen):
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def measure(case: Case) -> dict[str, Any]:
    """One case, in this process: median seconds per step, its rate beside that of a matrix product, peak bytes of a
    step, and the planned bytes. A check also compares the update with the literal Algorithm 1.

    On a GPU, the peak is `torch.cuda.max_memory_allocated`; the plan then excludes CUDA's context and allocator
    overhead. On the CPU, it is the growth of resident memory since before loading; the plan is then complete.
    """
    import torch

    from corsa.algorithm.batch import Batch, MicroBatch, counts
    from corsa.algorithm.logprobs import answer_logprobs
    from corsa.algorithm.packing import Triplet, pack
    from corsa.algorithm.row_settings import RowSettings
    from corsa.algorithm.step import corsa_step
    from corsa.config import STEPS, LoraConfig, ModelConfig, ShardingConfig, StepConfig
    from corsa.lora.flat import Lora
    from corsa.models.shapes import architecture
    from corsa.perf.literal import literal_step
    from corsa.planning.memory import hold
    from corsa.planning.rates import matrix_product
    from corsa.planning.rehearsal import rehearse
    from corsa.training.memory_usage import peak_since, resident, start_peak
    from corsa.training.worker_group import WorkerGroup

    device = torch.device("cuda", 0) if case.gpu else torch.device("cpu")
    config, sharding = ModelConfig(name=case.model, dtype=case.dtype), ShardingConfig(zero_stage=case.stage)  # type: ignore[arg-type]
    step, lora_config = STEPS[case.method](StepConfig()), LoraConfig(rank=case.rank)
    edits = [Triplet(range(10, 10 + PROMPT), range(10, 10 + ANSWER), range(20, 20 + ANSWER))] * case.edits
    before = 0 if case.gpu else resident("VmRSS") or 0
    group = WorkerGroup(0, 1, device, sharding)
    with device:  # create random weights on the device: 14B on the CPU would take all the time
        model = group.place(config)
    lora = Lora(model, lora_config)
    optimizer: Any = group.optimizer(lora.phi)
    rows = [r.to(device) for r in pack(edits, dtype=model.dtype)]
    with torch.no_grad(), lora.off():
        reference = answer_logprobs(model, rows, case.edits)
    batch = Batch([MicroBatch(rows, reference)], case.edits, counts([edits], device))
    settings = RowSettings.of([step], device)

    def take() -> float:
        began = time.perf_counter()
        corsa_step(model, lora.phi, batch, settings, optimizer, 1.0, group.sum)
        if case.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    if case.check and case.stage == 0:
        _compare(
            lora.phi,
            lambda sgd: corsa_step(model, lora.phi, batch, settings, sgd, 1.0, group.sum),
            lambda sgd: literal_step(model, lora, edits, step, sgd, 1.0),
        )
    take()  # creates AdamW's state and selects kernels
    start_peak(device)
    seconds = statistics.median(take() for _ in range(case.steps))
    peak = peak_since(device) or 0
    footprint = rehearse(architecture(config), model.dtype, lora_config, step, edits)
    passes = 4 if step.rho > 0 else 2
    held = hold(footprint, sharding, workers=1, gpu=case.gpu, element=model.dtype.itemsize, passes=passes)
    return {
        "step_s": seconds,
        "tflops": footprint.flops / seconds / 1e12,
        "matmul_tflops": matrix_product(device),
        "peak": peak - before,
        "planned": held.total - (held.items["allocator"] if case.gpu else 0),
        "items": held.items,
        "parameters": footprint.parameters,
    }


def _compare(phi: Any, *takes: Callable[[Any], object]) -> None:
    """Raises `CorsaError` unless both steps move phi, from the same start and with plain SGD, by the same amount."""
    import torch

    start, moved = phi.detach().clone(), []
    for take in takes:
        take(torch.optim.SGD([phi], lr=1.0))
        with torch.no_grad():
            moved.append(phi - start)
            phi.copy_(start)
    apart = float((moved[0] - moved[1]).norm() / moved[1].norm())
    if not apart <= WITHIN:
        raise CorsaError(f"the packed step is {apart:.1e} away from the literal Algorithm 1, {WITHIN:g} is allowed")


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
