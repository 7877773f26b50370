"""Values of packages as data: arrays, tensors, data frames, symbolic expressions.

A process reads only kinds of packages that it has already loaded for its tests. A program cannot make it load one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

from corsa.sandbox.expressions import read_expression, write_expression
from corsa.sandbox.values import CannotCrossError

if TYPE_CHECKING:
    from corsa.sandbox.values import Reader, Writer


def _words(text: str) -> list[str]:
    return text.split()


_NUMBERS = _words("bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128")
"""Allowed element types of arrays. Objects, records and fixed-width texts are excluded."""
_TIMES = [f"{kind}[{unit}]" for kind in ("datetime64", "timedelta64") for unit in _words("Y M W D h m s ms us ns")]
_TENSORS = _words("bool int8 int16 int32 int64 uint8 float16 float32 float64 bfloat16 complex64 complex128")
_DIMENSIONS = 32


def written(writer: Writer, value: Any) -> dict[str, Any] | None:
    """The tree of a value of a package; None if it belongs to no known package, or its kind is not data."""
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, type):
        package = value.__module__.partition(".")[0]
    write = _WRITERS.get(package)
    return write(writer, value) if write and package in sys.modules else None


def _loaded(name: str) -> Any:
    found = sys.modules.get(name)
    if found is None:
        raise CannotCrossError(f"a value of {name}, which the tests do not load")
    return found


def _shape(reader: Reader, tree: Any, item: int, length: int) -> list[int]:
    shape = reader.integers(tree)
    if len(shape) > _DIMENSIONS or any(n < 0 for n in shape) or prod(shape) * item != length:
        raise CannotCrossError("an array whose shape does not fit its bytes")
    return shape


# NumPy


def _write_numpy(writer: Writer, value: Any) -> dict[str, Any] | None:
    np: Any = sys.modules["numpy"]
    if isinstance(value, type):
        return {"numpy class": value.__name__} if getattr(np, value.__name__, None) is value else None
    if isinstance(value, np.dtype):
        return {"dtype": _dtype_name(value)}
    if type(value) is np.ndarray and value.dtype.kind in "US":
        return {"texts": [list(value.shape), value.dtype.kind, [writer.write(item) for item in value.ravel().tolist()]]}
    if isinstance(value, np.str_ | np.bytes_):
        return {"text": [writer.write(value.item())]}
    if type(value) is np.ndarray or isinstance(value, np.generic):
        array = np.ascontiguousarray(value, value.dtype.newbyteorder("="))
        kind = "array" if type(value) is np.ndarray else "number"
        return {kind: [_dtype_name(array.dtype), list(value.shape), writer.blob(array.tobytes())]}
    return None


def _dtype_name(dtype: Any) -> str:
    if dtype.name not in _NUMBERS and dtype.name not in _TIMES:
        raise CannotCrossError(f"an array of {dtype.name}, which is not plain data")
    return dtype.name


def _dtype(name: Any) -> Any:
    if name not in _NUMBERS and name not in _TIMES:
        raise CannotCrossError("an array of a kind that is not on the list")
    return _loaded("numpy").dtype(name)


def _read_array(reader: Reader, tree: Any) -> Any:
    np, (name, shape, place) = _loaded("numpy"), tree
    dtype, raw = _dtype(name), reader.blob(place)
    shape = _shape(reader, shape, dtype.itemsize, len(raw))
    if name == "bool":  # as a bool, a byte other than 0 and 1 may compare equal to both
        return (np.frombuffer(raw or b"", np.uint8) != 0).reshape(shape)
    return (np.frombuffer(raw, dtype) if raw else np.empty(0, dtype)).reshape(shape).copy()


def _read_number(reader: Reader, tree: Any) -> Any:
    if tree[1] != []:
        raise CannotCrossError("not a number")
    return _read_array(reader, tree)[()]


def _read_texts(reader: Reader, tree: Any) -> Any:
    np, (shape, kind, values) = _loaded("numpy"), tree
    items = reader.items(values)
    if kind not in ("U", "S") or any(type(item) is not (str if kind == "U" else bytes) for item in items):
        raise CannotCrossError("not an array of texts")
    return np.array(items, dtype=kind).reshape(_shape(reader, shape, 1, len(items)))


def _read_text(reader: Reader, tree: Any) -> Any:
    np, (value,) = _loaded("numpy"), reader.items(tree)
    return np.str_(value) if type(value) is str else np.bytes_(value)


def _read_numpy_class(reader: Reader, tree: Any) -> Any:
    np = _loaded("numpy")
    return {"ndarray": np.ndarray, "dtype": np.dtype}.get(reader.text(tree)) or _dtype(tree.rstrip("_")).type


# PyTorch


def _write_torch(writer: Writer, value: Any) -> dict[str, Any] | None:
    torch: Any = sys.modules["torch"]
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        if name not in _TENSORS or value.layout is not torch.strided:
            raise CannotCrossError(f"a tensor of {name}, which is not plain data")
        flat = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().tobytes()
        return {"tensor": [name, list(value.shape), writer.blob(raw), value.requires_grad]}
    if isinstance(value, torch.Size):
        return {"Size": list(value)}
    if isinstance(value, torch.dtype):
        return {"torch dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is torch.Tensor:
        return {"torch class": "Tensor"}
    return None


def _torch_dtype(name: Any) -> Any:
    if name not in _TENSORS:
        raise CannotCrossError("a tensor of a kind that is not on the list")
    return getattr(_loaded("torch"), name)


def _read_tensor(reader: Reader, tree: Any) -> Any:
    torch, (name, shape, place, grad) = _loaded("torch"), tree
    dtype, raw = _torch_dtype(name), reader.blob(place)
    shape = _shape(reader, shape, dtype.itemsize, len(raw))
    if name == "bool":
        flat = (torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0)) != 0
    else:
        flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    # Clone, because a storage over Python's bytes cannot be resized.
    return flat.clone().reshape(shape).requires_grad_(grad is True)


# pandas


def _write_pandas(writer: Writer, value: Any) -> dict[str, Any] | None:
    pd: Any = sys.modules["pandas"]
    if isinstance(value, pd.Index) and not isinstance(value, pd.MultiIndex):
        return {"index": [_column(writer, value), writer.write(value.name)]}
    if isinstance(value, pd.Series):
        return {"series": [_column(writer, value), writer.write(value.index), writer.write(value.name)]}
    if isinstance(value, pd.DataFrame):
        columns = [_column(writer, value.iloc[:, i]) for i in range(value.shape[1])]
        return {"frame": [columns, writer.write(value.columns), writer.write(value.index)]}
    if isinstance(value, pd.Timestamp | pd.Timedelta):
        return {type(value).__name__: writer.write(value.to_numpy())}
    if value is pd.NaT or value is pd.NA:
        return {"missing": "NaT" if value is pd.NaT else "NA"}
    return None


_COLUMNS = frozenset([*_NUMBERS, *_TIMES, "object", "string", "str", "boolean"] + [n.title() for n in _NUMBERS[1:]])


def _column(writer: Writer, value: Any) -> list[Any]:
    name = str(value.dtype)
    name = "object" if name == "object" else name
    if name not in _COLUMNS:
        raise CannotCrossError(f"a column of {name}, which is not plain data")
    if name in _NUMBERS or name in _TIMES:
        return [name, writer.write(value.to_numpy())]
    return [name, writer.write(value.tolist())]


def _read_column(reader: Reader, tree: Any, make: Callable[..., Any], **given: Any) -> Any:
    name, values = tree
    if name not in _COLUMNS:
        raise CannotCrossError("a column of a kind that is not on the list")
    return make(reader.read(values), dtype=name, **given)


def _read_index(reader: Reader, tree: Any) -> Any:
    column, name = tree
    return _read_column(reader, column, _loaded("pandas").Index, name=reader.read(name))


def _read_series(reader: Reader, tree: Any) -> Any:
    column, index, name = tree
    make = _loaded("pandas").Series
    return _read_column(reader, column, make, index=_as_index(reader, index), name=reader.read(name))


def _as_index(reader: Reader, tree: Any) -> Any:
    found = reader.read(tree)
    if not isinstance(found, _loaded("pandas").Index):
        raise CannotCrossError("not an index")
    return found


def _read_frame(reader: Reader, tree: Any) -> Any:
    pd, (columns, names, index) = _loaded("pandas"), tree
    names, index = _as_index(reader, names), _as_index(reader, index)
    if len(names) != len(columns):
        raise CannotCrossError("a frame whose names do not match its columns")
    series = {i: _read_column(reader, column, pd.Series, index=index) for i, column in enumerate(columns)}
    found = pd.DataFrame(series, index=index)
    found.columns = names
    return found


def _read_moment(kind: str) -> Callable[[Reader, Any], Any]:
    return lambda reader, tree: getattr(_loaded("pandas"), kind)(reader.read(tree))


def _chosen(package: str, *names: str) -> Callable[[Reader, Any], Any]:
    """A reader that returns one of the named objects of a package."""

    def read(reader: Reader, tree: Any) -> Any:
        if tree not in names:
            raise CannotCrossError("a name that is not on the list")
        return getattr(_loaded(package), tree)

    return read


_WRITERS = {"numpy": _write_numpy, "torch": _write_torch, "pandas": _write_pandas, "sympy": write_expression}

READERS: dict[str, Callable[[Reader, Any], Any]] = {
    "array": _read_array,
    "number": _read_number,
    "texts": _read_texts,
    "text": _read_text,
    "dtype": lambda reader, tree: _dtype(tree),
    "numpy class": _read_numpy_class,
    "tensor": _read_tensor,
    "Size": lambda reader, tree: _loaded("torch").Size(reader.integers(tree)),
    "torch dtype": lambda reader, tree: _torch_dtype(tree),
    "torch class": _chosen("torch", "Tensor"),
    "device": lambda reader, tree: _loaded("torch").device(reader.text(tree)),
    "index": _read_index,
    "series": _read_series,
    "frame": _read_frame,
    "Timestamp": _read_moment("Timestamp"),
    "Timedelta": _read_moment("Timedelta"),
    "missing": _chosen("pandas", "NaT", "NA"),
    "expression": lambda reader, tree: read_expression(reader.text(tree)),
    "sympy class": _chosen("sympy", "Symbol", "Function"),
}
"""Reader of each kind of a package."""
