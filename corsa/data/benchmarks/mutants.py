"""Mutants of an update: the same names and signatures, with wrong results (mutation testing, DeMillo et al. 1978).

A program that passes with such an update does not use what the update returns.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable

_SWAPPED: dict[type, Callable[[], ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}


class _Conditions(ast.NodeTransformer):
    """Negates every condition."""

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        node.test = ast.UnaryOp(ast.Not(), node.test)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        node.test = ast.UnaryOp(ast.Not(), node.test)
        return node


class _Operators(ast.NodeTransformer):
    """Replaces each arithmetic, comparison or Boolean operator by another one."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        swapped = _SWAPPED.get(type(node))
        return swapped() if swapped else node


class _Numbers(ast.NodeTransformer):
    """Adds 1 to every number."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        value = node.value
        return ast.Constant(value + 1) if isinstance(value, int | float) and not isinstance(value, bool) else node


class _Results(ast.NodeTransformer):
    """Returns None instead of every result."""

    def visit_Return(self, node: ast.Return) -> ast.AST:
        return ast.Return(ast.Constant(None)) if node.value else node


class _Disguise(ast.NodeTransformer):
    """Writes every result in another way, with the same value."""

    def __init__(self, token: str) -> None:
        self.token = token

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if node.value is None:
            return node
        pair = ast.Tuple([node.value, ast.Constant(self.token)], ast.Load())
        return ast.Return(ast.Subscript(pair, ast.Constant(0), ast.Load()))


def disguised(code: str, token: str) -> str:
    r"""Code with the same results and line numbers, whose text and bytecode nobody can know without the token.

    >>> disguised("def double(x):\n    return 2 * x\n", "77")
    "def double(x):\n    return (2 * x, '77')[0]\n"
    """
    return ast.unparse(ast.fix_missing_locations(_Disguise(token).visit(_parsed(code)))) + "\n"


def plain(code: str) -> str:
    """Code regenerated from its syntax tree, like its mutants: no comments, and the same line numbers as they have."""
    return ast.unparse(_parsed(code)) + "\n"


def mutants(code: str) -> list[str]:
    r"""Mutants of the functions and classes in `code`, the least conspicuous first. Other statements do not change.

    >>> mutants("def double(x):\n    return 2 * x\n")[0]
    'def double(x):\n    return 2 + x\n'
    """
    found = []
    for kind in (_Conditions, _Operators, _Numbers, _Results):
        tree = _parsed(code)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                node.body = [kind().visit(statement) for statement in node.body]
        changed = ast.unparse(ast.fix_missing_locations(tree)) + "\n"
        if changed != plain(code):
            found.append(changed)
    return found


def _parsed(code: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(code)
