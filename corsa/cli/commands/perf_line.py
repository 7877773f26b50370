"""`corsa perf line`: what one update more costs on a long line."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from corsa.cli.commands.perf import perf
from corsa.terminal import Console, visible


@perf.command(name="line")
def measure(
    storage: Annotated[str, arg(metavar="FOLDER", help="an empty folder, which keeps the line and the update")],
    model: Annotated[str, arg(help="alias, or random:<architecture>")] = "random:tiny-llama",
    months: Annotated[int, arg(help="updates of the line")] = 36,
    facts: Annotated[int, arg(help="facts of each update, and of the measured one")] = 50,
    options: Annotated[str, arg(help="further options of `corsa edit`, in quotes")] = "",
    as_json: Annotated[bool, arg(name="json", help="print one JSON object")] = False,
) -> None:
    """Make a line of many updates without training, teach it one update more by `corsa edit`, and measure time, memory
    and disk of that. The answers of the earlier updates are made up.

    Example: corsa perf line --storage /tmp/line --options="--recheck 300"
    """
    from corsa.perf.line import measure_line

    console = Console(stderr=True)
    found = measure_line(
        model,
        Path(storage),
        months,
        facts,
        shlex.split(options),
        lambda line: console.print(line, style="dim", highlight=False),
    )
    if as_json:
        print(json.dumps(asdict(found), indent=1))
        return
    print(f"update {found.months + 1}: {found.facts} facts after {found.earlier:,}, {found.asked:,} answers")
    print(f"{found.wall_s:.1f} s; steps:")
    for name, seconds in sorted(found.steps_s.items(), key=lambda one: -one[1]):
        print(visible(f"  {seconds:7.1f} s  {name}"))
    print("peak resident memory:")
    for name, peak in {"the command": found.driver_peak, **found.workers_peak}.items():
        print(visible(f"  {peak / 2**20:7.0f} MiB  {name}"))
    print(
        f"disk: the line {found.before / 2**20:.1f} MiB before, {found.written / 2**20:.1f} after; "
        f"its steps in the store {found.stored / 2**20:.1f}"
    )
    print(visible(found.headline))
