"""Reads untrusted YAML, with bounds on its size, its depth and the expansion of its aliases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from corsa.errors import CorsaError

LARGEST = 1 << 20  # bytes
NODES = 50_000  # scalars, lists and mappings, counted again for each alias of them
DEPTH = 40

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where PyYAML was built with libyaml


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain values, lists and mappings.

    Raises:
        CorsaError: it is larger, deeper or has more nodes than any file of this project, an alias refers to a
            node that contains it (all found before anything is built), or a value is invalid.
        OSError, UnicodeDecodeError, yaml.YAMLError: it cannot be read, or is not YAML.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise CorsaError(f"{path} has more than {LARGEST >> 20} MiB: too large for a YAML file of this project")
    text = content.decode()
    _check(text, path)
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, OverflowError, RecursionError) as error:  # a date that does not exist, a number without end
        raise CorsaError(f"{path}: a value makes no sense: {str(error).splitlines()[0]}") from error


def _check(text: str, path: Path) -> None:
    """Go through the events of the parser, which builds nothing, and count."""
    open_: list[tuple[str | None, int]] = []  # anchor of each list and mapping that is not yet closed, nodes before it
    sizes: dict[str, int | None] = {}  # anchor -> its nodes; None while it is open
    nodes = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            name = str(event.anchor)
            size = sizes.get(name, 1)
            if size is None:
                raise CorsaError(f"{path}, line {line}: *{name[:40]} stands for what it is part of")
            nodes += size
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, nodes))
            nodes += 1
            if event.anchor:
                sizes[event.anchor] = None
            if len(open_) > DEPTH:
                raise CorsaError(f"{path}, line {line}: nested more than {DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor:
                sizes[anchor] = nodes - before
        if nodes > NODES:
            raise CorsaError(f"{path}, line {line}: more than {NODES} values, those that aliases stand for included")
