"""`corsa perf gpu`: the step on an accelerator, compared with its plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from corsa.cli.commands.perf import perf
from corsa.config import STEPS
from corsa.errors import CorsaError, unknown_name
from corsa.perf.accelerator import MODELS
from corsa.terminal import Console, visible


@perf.command(name="gpu")
def measure_accelerator(
    models: Annotated[str, arg(metavar="A,B", help="measured models")] = ",".join(MODELS),
    methods: Annotated[str, arg(metavar="A,B", help=f"of {', '.join(STEPS)}")] = "lora,corsa",
    stages: Annotated[str, arg(metavar="N,N", help="ZeRO stages, measured with one worker")] = "0,3",
    edits: Annotated[int, arg(help="edits of a step, of 20 tokens each")] = 16,
    steps: Annotated[int, arg(help="measured steps of each case, after one to warm up")] = 5,
    minutes: Annotated[float, arg(help="time limit; cases not measured by then are listed")] = 8.0,
    cpu: Annotated[bool, arg(help="measure on the CPU, in float32")] = False,
    output: Annotated[Path | None, arg(metavar="FILE", help="write the result here as JSON, for `corsa plan`")] = None,
    as_json: Annotated[bool, arg(name="json", help="print JSON instead of the table")] = False,
) -> None:
    """Measure step time and peak memory of LoRA and CoRSA on a GPU, and compare with the plan. Checks each method on a
    tiny model first.

    Example: corsa perf gpu --output gpu.json
    """
    for method in methods.split(","):
        if method not in STEPS:
            raise unknown_name("method", method, STEPS)
    if not set(stages.split(",")) <= {"0", "1", "2", "3"}:
        raise CorsaError(f"--stages {stages}: name ZeRO stages, of 0,1,2,3")
    import torch

    from corsa.perf.accelerator import cases, markdown, measure_all

    if not cpu and not torch.cuda.is_available():
        raise CorsaError("there is no GPU here: run this on a machine with one, or with --cpu and a smaller --models")
    chosen = list(
        cases(
            models.split(","),
            methods.split(","),
            [int(stage) for stage in stages.split(",")],
            edits=edits,
            steps=steps,
            gpu=not cpu,
        )
    )
    console = Console(stderr=True)
    found = measure_all(chosen, minutes, lambda line: console.print(line, style="dim", highlight=False))
    if output is not None:
        output.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1) if as_json else visible(markdown(found)))
