"""Values of packages as plain data, and made from it again: tensors, data frames, symbolic expressions, matches.

Their own pickles can name functions to be called and attributes to be set, so whoever writes the bytes by hand decides
what the reader runs. These forms cannot.
"""

from __future__ import annotations

import ast
import re
import sys
import types
from typing import Any


class CannotCrossError(Exception):
    """A value that is not data: a program's own class, or one that the examiner does not read."""


def reduced(obj: Any) -> Any:
    """How `pickle` is to write a value of a package, or NotImplemented where it knows itself."""
    if isinstance(obj, re.Match):
        return match, (obj.re.pattern, obj.re.flags, obj.string, *obj.span())
    if isinstance(obj, re.Pattern):
        return pattern, (obj.pattern, obj.flags)
    if isinstance(obj, types.MappingProxyType):
        return mapping, (dict(obj),)
    package = type(obj).__module__.partition(".")[0]
    if package == "torch" and isinstance(obj, sys.modules["torch"].Tensor):
        torch: Any = sys.modules["torch"]
        flat = obj.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return tensor, (flat.view(torch.uint8).numpy().tobytes(), obj.dtype, tuple(obj.shape), obj.requires_grad)
    if package == "sympy" and isinstance(obj, sys.modules["sympy"].Basic | sys.modules["sympy"].MatrixBase):
        return expression, (sys.modules["sympy"].srepr(obj),)
    if package == "pandas":
        return _written_frame(obj)
    return NotImplemented


def tensor(raw: bytes, dtype: Any, shape: tuple[int, ...], requires_grad: bool) -> Any:
    """A tensor from its bytes."""
    import torch

    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    flat = flat.clone()  # of a storage that can be resized, as a tensor's own is
    return flat.reshape(shape).requires_grad_(bool(requires_grad))


def _written_frame(obj: Any) -> Any:
    import pandas as pd
    import pyarrow as pa

    if not isinstance(obj, pd.DataFrame | pd.Series | pd.Index):
        return NotImplemented
    name = getattr(obj, "name", None)
    data = obj if isinstance(obj, pd.DataFrame) else obj.to_frame(name="value")
    if isinstance(obj, pd.Index):
        data = data.reset_index(drop=True)
    kind = next(k.__name__ for k in (pd.DataFrame, pd.Series, pd.Index) if isinstance(obj, k))
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pandas(data)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return frame, (kind, name, sink.getvalue().to_pybytes())


def frame(kind: str, name: Any, raw: bytes) -> Any:
    """A data frame, series or index from an Arrow stream."""
    import pandas as pd
    import pyarrow as pa

    data = pa.ipc.open_stream(raw).read_all().to_pandas()
    if kind == "DataFrame":
        return data
    return data["value"].rename(name) if kind == "Series" else pd.Index(data["value"], name=name)


def expression(text: str) -> Any:
    """A symbolic expression from what `sympy.srepr` writes of it; nothing is evaluated but constructors of sympy.

    Raises:
        CannotCrossError: the text is anything else.
    """
    import sympy

    try:
        return _made(ast.parse(text, mode="eval").body, sympy)
    except CannotCrossError:
        raise
    except Exception as error:
        raise CannotCrossError(f"an expression that cannot be made again: {error}") from error


_TAKE_TEXT = ("Symbol", "Dummy", "Wild", "Float", "Function", "Str", "Integer")
"""Constructors that take text as it is; others would evaluate it."""


def _made(node: ast.expr, sympy: Any) -> Any:
    match node:
        case ast.Constant(value=int() | float() | bool() | None):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            made = [_made(part, sympy) for part in parts]
            return made if isinstance(node, ast.List) else tuple(made)
        case ast.Name(id=name):
            found = getattr(sympy, name, None)
            sorts = sympy.Basic | sympy.MatrixBase
            if isinstance(found, sorts) or (isinstance(found, type) and issubclass(found, sorts)):
                return found
        case ast.Call(func=function, args=args, keywords=keywords):
            plain = isinstance(function, ast.Name) and function.id in _TAKE_TEXT
            given = [a.value if plain and _is_text(a) else _made(a, sympy) for a in args]  # type: ignore[attr-defined]
            return _made(function, sympy)(*given, **{str(k.arg): _made(k.value, sympy) for k in keywords})
    raise CannotCrossError(f"{ast.unparse(node)[:80]} in an expression")


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def pattern(text: Any, flags: int) -> Any:
    """A regular expression."""
    return re.compile(text, flags)


def match(text: Any, flags: int, string: Any, start: int, end: int) -> Any:
    """The match of a regular expression that covers string[start:end].

    Raises:
        CannotCrossError: there is none.
    """
    regex = re.compile(text, flags)
    for found in (regex.match(string, start), regex.fullmatch(string, start, end)):
        if found and found.span() == (start, end):
            return found
    raise CannotCrossError("a match that the examiner does not find")


def mapping(values: dict[Any, Any]) -> Any:
    """A mapping that cannot be changed."""
    return types.MappingProxyType(values)


MAKERS = (tensor, frame, expression, mapping, match, pattern)
