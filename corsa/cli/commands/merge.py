"""`corsa merge`: several adapters of one base model as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from corsa.cli.commands import AsJson, app
from corsa.config.command_line import listed
from corsa.config.steps import MergeMethod
from corsa.terminal import visible


@app.command(name="merge")
def merge(
    adapters: Annotated[Positional[tuple[str, ...]], arg(metavar="DIR DIR", help="PEFT directories of one base model")],
    out: Annotated[Path, arg(metavar="DIR", help="directory of the merged adapter; must be new")],
    method: Annotated[
        MergeMethod, arg(help="sum, average: exact; svd: the sum cut to --rank; linear, ties, dare: as in PEFT")
    ] = "sum",
    weights: Annotated[
        tuple[float, ...], listed(float, "W,W"), arg(help="weights of the adapters; default: 1 for each")
    ] = (),
    rank: Annotated[int | None, arg(help="rank of the merged adapter, for svd")] = None,
    density: Annotated[float, arg(help="share of the values that ties and dare keep")] = 0.5,
    seed: Annotated[int, arg(help="seed of the values that dare drops")] = 0,
    as_json: AsJson = False,
) -> int:
    """Merge separately trained adapters into one plain PEFT adapter, and print its distance from their sum.

    Example: corsa merge adapters/people adapters/places --out adapters/both

    Example: corsa merge A B --method svd --rank 32 --weights 1,0.5 --out adapters/both
    """
    from corsa.editing.merging import merge as merged

    found = merged(adapters, out, method=method, weights=weights or None, rank=rank, density=density, seed=seed)
    if as_json:
        print(json.dumps(found))
    else:
        print(f"rank {found['rank']:d}, relative error {found['error']:.2g} against the adapters' weighted sum")
        for remark in found["remarks"]:
            print(visible(f"note: {remark}"))
        print(visible(found["out"]))
    return 0
