"""Reads untrusted YAML, with bounds on its size, its depth and the expansion of its aliases. No key may occur twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from corsa.errors import CorsaError

LARGEST = 1 << 20  # bytes
NODES = 50_000  # scalars, lists and mappings, counted again for each alias of them
DEPTH = 40

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where PyYAML was built with libyaml


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain values, lists and mappings.

    Raises:
        CorsaError: it is larger, deeper or has more nodes than any file of this project, an alias refers to a
            node that contains it, a mapping has a key twice (all found before anything is built), or a value is
            invalid.
        OSError, UnicodeDecodeError, yaml.YAMLError: it cannot be read, or is not YAML.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise CorsaError(f"{path} has more than {LARGEST >> 20} MiB: too large for a YAML file of this project")
    text = content.decode()
    _check(text, path)
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _refuse_repeated_keys(loader, root, path)
        return loader.construct_document(root)
    except (ValueError, OverflowError, RecursionError) as error:  # a date that does not exist, a number without end
        raise CorsaError(f"{path}: a value makes no sense: {str(error).splitlines()[0]}") from error
    finally:
        loader.dispose()


def _refuse_repeated_keys(loader: Any, root: yaml.Node, path: Path) -> None:
    """YAML forbids a key that occurs twice (YAML 1.2.2, 3.2.1.1). PyYAML would keep the last of its values."""
    left, seen = [root], {id(root)}
    while left:
        node = left.pop()
        inner = list(node.value) if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            keys: dict[Any, yaml.Node] = {}
            for key, value in node.value:
                inner += (key, value)
                if not isinstance(key, yaml.ScalarNode):
                    continue
                # `<<` takes in other mappings; PyYAML has no value for it.
                name = key.value if key.tag == "tag:yaml.org,2002:merge" else loader.construct_object(key)
                first = keys.setdefault(name, key)
                if first is not key:
                    raise CorsaError(
                        f"{path}, line {key.start_mark.line + 1}: the key {key.value[:40]!r} occurs twice, first in "
                        f"line {first.start_mark.line + 1}: keep one of them"
                    )
        for one in inner:
            if isinstance(one, yaml.CollectionNode) and id(one) not in seen:
                seen.add(id(one))
                left.append(one)


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
