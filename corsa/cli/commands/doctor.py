"""`corsa doctor`: whether this machine is ready, and what to do if it is not."""

from __future__ import annotations

import json
from typing import Annotated

from tyro.conf import arg

from corsa.cli.commands import AsJson, Storage, app


@app.command(name="doctor")
def doctor(
    storage: Storage = "runs",
    model: Annotated[str, arg(help="base model whose weights are checked")] = "smollm2-135m",
    as_json: AsJson = False,
) -> int:
    """Check Python, versions, devices, Ray, DeepSpeed, storage, token and disk, and print a remedy for each problem.

    The exit status is 1 if something does not work.

    Example: corsa doctor --storage s3://bucket/runs --model qwen3-8b
    """
    from corsa.cli.doctor import examine

    findings = examine(storage, model)
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        from rich.text import Text

        from corsa.terminal import Console

        console = Console()
        styles = {"ok": "green", "note": "yellow", "fault": "bold red"}
        for finding in findings:
            line = Text(f"{finding.state:<6}", style=styles[finding.state])
            console.print(
                line.append(f"{finding.what:<16}", style="not bold default").append(
                    finding.found, style="not bold default"
                ),
                soft_wrap=True,
            )
            if finding.remedy:
                console.print(Text(f"{'':<22}{finding.remedy}"), soft_wrap=True)
    return int(any(finding.state == "fault" for finding in findings))
