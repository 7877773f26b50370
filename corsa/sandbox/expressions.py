"""SymPy expressions as text, and back without evaluating text."""

from __future__ import annotations

import ast
import re
import sys
import unicodedata
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from corsa.sandbox.values import CannotCrossError

if TYPE_CHECKING:
    from corsa.sandbox.values import Writer


_NAMES = """
    Symbol Dummy Integer Rational Float Add Mul Pow Tuple Function Derivative Integral Sum Product Limit Subs Order
    Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan And Or Not Xor Piecewise ExprCondPair
    sin cos tan cot sec csc asin acos atan acot atan2 sinh cosh tanh coth asinh acosh atanh exp log sqrt Abs sign
    floor ceiling Min Max factorial binomial gamma erf re im arg conjugate Heaviside DiracDelta
    FiniteSet Interval Union Intersection Matrix ImmutableMatrix MutableDenseMatrix ImmutableDenseMatrix"""
_EXPRESSIONS = frozenset(_NAMES.split())
"""Allowed constructors of expressions."""
_CONSTANTS = "pi E I oo zoo nan Integers Reals Naturals Complexes EmptySet true false"
_NAME, _NUMBER = r"[^()\[\]{}.,:;=\\'\"`\s]+", r"-?[0-9.]+(e[+-]?[0-9]+)?"
_TAKE_TEXT = {"Symbol": _NAME, "Dummy": _NAME, "Function": r"\w+", "Float": _NUMBER, "Integer": _NUMBER}
"""Constructors that take text, with its allowed form. Other text could be evaluated, now or when it is compiled."""
_TEXT = 1 << 16


def write_expression(writer: Writer, value: Any) -> dict[str, Any] | None:
    """The tree of an expression or a matrix; None for anything else."""
    sympy: Any = sys.modules["sympy"]
    if isinstance(value, type):
        return {"sympy class": value.__name__} if value in (sympy.Symbol, sympy.Function) else None
    if not isinstance(value, sympy.Basic | sympy.MatrixBase):
        return None
    return {"expression": sympy.srepr(value)}


def read_expression(text: str) -> Any:
    """The expression in a text of `sympy.srepr`. Only the constructors above are called.

    Raises:
        CannotCrossError: the text has another form, or SymPy is not loaded.
    """
    if len(text) > _TEXT or "sympy" not in sys.modules:
        raise CannotCrossError(f"an expression of more than {_TEXT} characters, or SymPy is not loaded by the tests")
    return _made(ast.parse(text, mode="eval").body)


@lru_cache(maxsize=1)
def _constructors() -> dict[str, Any]:
    sympy: Any = sys.modules["sympy"]
    found = {name: getattr(sympy, name) for name in _EXPRESSIONS if hasattr(sympy, name)}
    constants = {name: getattr(sympy, name) for name in _CONSTANTS.split()}
    special = {type(c).__name__: c for c in [*constants.values(), sympy.S.Half, sympy.S.One, sympy.S.Zero]}
    return constants | special | found


def _made(node: ast.expr) -> Any:
    sympy: Any = sys.modules["sympy"]
    match node:
        case ast.Constant(value=int() | float() | bool() | None):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=parts):
            return [_made(part) for part in parts]
        case ast.Tuple(elts=parts):
            return tuple(_made(part) for part in parts)
        case ast.Name(id=name) if name in _constructors():
            return _constructors()[name]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in _EXPRESSIONS:
            given = [_named(a, name) if name in _TAKE_TEXT and _is_text(a) else _made(a) for a in args]
            named = {str(k.arg): _made(k.value) for k in keywords}
            return _constructors()[name](*given, **named)
        case ast.Call(func=ast.Call(func=ast.Name(id="Function"), args=[name]), args=args) if _is_text(name):
            return sympy.Function(_named(name, "Function"))(*[_made(a) for a in args])
    raise CannotCrossError(f"{ast.unparse(node)[:80]} in an expression")


def _named(node: Any, constructor: str) -> str:
    text = node.value
    if not re.fullmatch(_TAKE_TEXT[constructor], text, re.IGNORECASE):
        raise CannotCrossError("an invalid name or number in an expression")
    if constructor == "Function" and _is_callable(text):
        raise CannotCrossError(f"the function {text}, which a compiled expression would call")
    return text


_COMPILED = ("builtins", "numpy", "sympy", "torch", "tensorflow", "jax", "cupy")
"""Modules whose functions `sympy.lambdify` calls by name, such as `eval` and `bytes`."""


def _is_callable(name: str) -> bool:
    with suppress(ImportError):
        import_module("numpy")  # lambdify loads it
    name = unicodedata.normalize("NFKC", name)  # as Python reads names
    return not name.isidentifier() or any(hasattr(sys.modules.get(module), name) for module in _COMPILED)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def read_no_expressions_of_others(tests: str) -> None:
    """Let SymPy evaluate only text that is part of the tests. It reads text with `eval`, also a program's result."""
    parser = sys.modules.get("sympy.parsing.sympy_parser")
    if parser is None:
        return
    own: Any = parser.parse_expr

    def parse_expr(text: str, *args: Any, **kwargs: Any) -> Any:
        if str(text) not in tests and not re.fullmatch(r"\w+", str(text)):  # a single word calls nothing
            raise CannotCrossError(f"text that would be evaluated: {str(text)[:80]!r}")
        return own(text, *args, **kwargs)

    parser.parse_expr = parse_expr  # type: ignore[attr-defined]
