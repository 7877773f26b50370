"""`corsa serve`: a base model and its adapters behind OpenAI's interface."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from corsa.cli.commands import app
from corsa.terminal import Console


@app.command(name="serve")
def serve(
    adapters: Annotated[
        Positional[tuple[str, ...]],
        arg(metavar="[ADAPTER ...]", help="PEFT directories of one base model; each is served under its name"),
    ] = (),
    model: Annotated[str | None, arg(help="base model; default: the first adapter's, else smollm2-135m")] = None,
    template: Annotated[Literal["qa", "chat"] | None, arg(help="default: the first adapter's, else qa")] = None,
    host: Annotated[str, arg(help="address to listen on; 0.0.0.0 lets other machines in, without a password")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, arg(help="port to listen on")] = 8000,
    gpu: Annotated[bool, arg(help="run on a GPU, in bfloat16 if the model supports it")] = False,
) -> int:
    """Serve a base model and its adapters behind OpenAI's interface, by Ray Serve (an extra: pip install
    'corsa[serve]').

    For trying out and for demos: one answer at a time. For production export the adapter and use vLLM.

    Each request names its model: base, or the name of an adapter's directory. /v1/models lists them. Facts that were
    taught in the default template are asked through /v1/completions as "Q: ...", a new line, "A:".

    Example: corsa serve adapters/january adapters/february --port 8000
    """
    from corsa.editing.history import open_line
    from corsa.editing.options import Options
    from corsa.editing.plan import base_model
    from corsa.editing.serve_application import ray_serve, run, stop
    from corsa.editing.serving import BASE, names_of
    from corsa.flow.cluster import connect, disconnect

    named = names_of(adapters)
    lines = [open_line(directory) for directory in adapters]
    config = base_model(Options(model=model, template=template), lines[0] if lines else None)
    console = Console()
    connect(console)
    try:
        ray_serve()  # if it is missing, this is known before a model is loaded
        with _loading(", ".join([config.name, *named]), console):
            run(config, named, host=host, port=port, gpu=gpu)
        for line in _ready(f"http://{host}:{port}/v1", [BASE, *named]):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        console.print("stopping")  # takes seconds
    finally:
        stop()
        disconnect()
    return 0


@contextmanager
def _loading(what: str, console: Console, every: float = 15.0) -> Iterator[None]:
    """Says what is being loaded, and every 15 seconds that it still is: on a busy machine this takes minutes."""
    began, done = time.monotonic(), threading.Event()

    def say() -> None:
        while not done.wait(every):
            console.print(f"still loading, {time.monotonic() - began:.0f} s", highlight=False)

    console.print(f"loading {what} ...", markup=False, highlight=False)
    threading.Thread(target=say, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _ready(address: str, names: list[str]) -> list[str]:
    body = f'{{"model": "{names[-1]}", "prompt": "Q: Who leads Acme?\\nA:", "max_tokens": 32, "temperature": 0}}'
    return [
        f"serving {', '.join(names)} at {address} (Ctrl-C ends it)",
        "for trying out and for demos; vLLM is for production",
        f"curl {address}/completions -H 'Content-Type: application/json' -d '{body}'",
    ]
