"""`corsa push`: an adapter with its model card to the Hugging Face hub."""

from __future__ import annotations

import json
from typing import Annotated

from tyro.conf import Positional, arg

from corsa.cli.commands import AsJson, app
from corsa.terminal import visible


@app.command(name="push")
def push(
    adapter: Annotated[Positional[str], arg(metavar="DIR", help="directory of the adapter, as corsa edit writes it")],
    repository: Annotated[Positional[str], arg(metavar="OWNER/NAME", help="repository; created if it does not exist")],
    public: Annotated[bool, arg(help="make a new repository public; it is private by default")] = False,
    facts: Annotated[bool, arg(help="also send the facts, all answers and the history")] = False,
    revision: Annotated[str | None, arg(help="branch; default: main")] = None,
    message: Annotated[str, arg(help="message of the commit")] = "",
    dry_run: Annotated[bool, arg(help="show the files that would be sent, send nothing")] = False,
    as_json: AsJson = False,
) -> int:
    """Send an adapter, its model card and its report to the Hugging Face hub.

    The card and the report quote facts: read README.md first. The token is HF_TOKEN, or that of `hf auth
    login`. HF_ENDPOINT names a hub other than huggingface.co.

    Example: corsa push adapters/january acme/facts-january
    """
    from corsa.editing.push import push as pushed
    from corsa.editing.push import to_send

    if dry_run:
        files = {file.name: file.stat().st_size for file in to_send(adapter, facts=facts)}
        if as_json:
            print(json.dumps({"repository": repository, "public": public, "files": files}))
            return 0
        print(visible(f"would send to {repository} ({'public' if public else 'private'} if it is new):"))
        for name, size in files.items():
            print(visible(f"  {name}  {size:,} bytes"))
        return 0
    how = {"private": not public, "facts": facts, "revision": revision, "message": message}
    address = pushed(adapter, repository, **how)  # type: ignore[arg-type]
    print(json.dumps({"commit": address}) if as_json else visible(address))
    return 0
