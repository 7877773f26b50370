"""Benchmarks of programs: CodeUpdateArena (Liu et al. 2024), HumanEval (Chen et al. 2021), and a user's own file.

Each record becomes `Problem`s: a prompt, and the tests that decide whether the model's program is correct. A user's
file is JSONL with records of CodeUpdateArena: an update and its program-synthesis problems.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from corsa.config import Frozen
from corsa.data.benchmarks import BadRecord
from corsa.data.benchmarks.code_prompt import TEMPLATE, question
from corsa.data.benchmarks.files import name_of, records, regular
from corsa.data.benchmarks.mutants import plain
from corsa.data.benchmarks.rows import Row
from corsa.data.edit import FieldError
from corsa.data.text import shown
from corsa.errors import CorsaError
from corsa.sandbox.worker import Program

Kind = Literal["updates", "humaneval"]


class Problem(Frozen):
    """A program to write. `tests` and `before` come from the benchmark and are trusted; a model's program is not."""

    id: str
    update: str = Field(default="", description="id of the API update that it needs; blank: HumanEval")
    package: str = ""
    prompt: str = Field(description="the question to the model, without any template")
    described: str = Field(default="", description="description of the update: its documentation")
    implementation: str = Field(default="", description="the code of the update")
    entry: str = Field(description="name of the requested function")
    lead: str = Field(default="", description="program text that the answer completes (HumanEval)")
    solution: str = Field(description="the reference solution, or the text that completes `lead`")
    tests: str = Field(description="imports and functions test_*, which call `entry`")
    imports: str = Field(default="", description="code that runs before program and tests without the update")
    before: str = Field(default="", description="the same code, with the update installed")

    def program(self, answer: str, *, updated: bool, before: str | None = None) -> Program:
        """The program of an answer, with its tests.

        updated: install the update for program and tests. before: code that installs a mutant of the update for the
        program only.
        """
        own = self.before if updated else self.imports
        tests = f"{own}\n{self.tests}"
        return Program(self.lead + answer, tests, before or plain(own), self.entry, self.lead + self.solution)

    @property
    def blanked(self) -> str:
        """The solution with `pass` as the body of the requested function. It must fail the tests."""
        if self.lead:
            return "    pass\n"
        tree = _python(self.solution, "")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == self.entry:
                node.body = [ast.Pass()]
        return ast.unparse(tree) + "\n"

    @property
    def modules(self) -> tuple[str, ...]:
        """The packages that its trusted parts import."""
        found = [node for part in (self.before, self.tests) for node in ast.walk(_python(part, ""))]
        names = [a.name for node in found if isinstance(node, ast.Import) for a in node.names]
        names += [node.module for node in found if isinstance(node, ast.ImportFrom) and node.module]
        return tuple(sorted({name.partition(".")[0] for name in names}))


def kind_of(path: str) -> Kind:
    """The benchmark of a file, by its first record. Raises CorsaError if it is neither."""
    row = next(_rows(path), None)
    if row is None:
        raise CorsaError(f"{path} is empty: it holds no record")
    if {"task_id", "prompt", "entry_point", "canonical_solution", "test"} <= row.values.keys():
        return "humaneval"
    if {"update", "prog_syn_examples"} <= row.values.keys():
        return "updates"
    raise CorsaError(
        f"{path} is neither HumanEval (task_id, prompt, entry_point, canonical_solution, test) nor of "
        f"CodeUpdateArena's record (update, prog_syn_examples); its first record has {', '.join(sorted(row.values))}"
    )


def digest(path: str) -> str:
    """The SHA-256 of a file's content. Raises CorsaError if it cannot be read."""
    try:
        return hashlib.sha256(regular(path).read_bytes()).hexdigest()
    except OSError as error:
        raise CorsaError(f"{path} cannot be read: {error.strerror} (seen from {Path.cwd()})") from error


def read_problems(path: str, *, limit: int | None = None, offset: int = 0, template: str = TEMPLATE) -> list[Problem]:
    """The problems of a file, in its order. `limit` and `offset` count its records: updates, or HumanEval's tasks.

    `template` is the prompt of questions about updates; HumanEval has its own prompts.

    Raises:
        CorsaError: the file cannot be read, or a record is invalid (with its line, field and reason).
    """
    updates = kind_of(path) == "updates"
    problems: list[Problem] = []
    seen: set[str] = set()
    for number, row in enumerate(_rows(path)):
        if number < offset or (limit is not None and number >= offset + limit):
            continue
        try:
            found = _of_update(row, template) if updates else _of_humaneval(row)
        except FieldError as error:
            raise CorsaError(f"{path}, {row.where}: {error}") from error
        for problem in found:
            if problem.id in seen:
                raise CorsaError(f"{path}, {row.where}: the id {problem.id!r} was used before")
            seen.add(problem.id)
        problems += found
    if not problems:
        raise CorsaError(f"{path}: no record is left from number {offset} on")
    return problems


def _rows(path: str) -> Iterator[Row]:
    file = regular(path)
    if not file.is_file():
        kind = "is a directory" if file.is_dir() else "does not exist"
        raise CorsaError(f"{name_of(file)} cannot be read: it {kind} (seen from {Path.cwd()})")
    for index, item in enumerate(records(file, ())):
        if isinstance(item, BadRecord):
            raise CorsaError(f"{name_of(file)}, {item}")
        values, where = item
        yield Row(values, index, where)


def _raw(row: Row, path: str) -> str:
    """The unchanged string at a path: indentation at the start of a program matters."""
    value = row.get(path)
    if value is None:
        raise FieldError(path, "is missing")
    if not isinstance(value, str) or not value.strip():
        raise FieldError(path, "is blank" if isinstance(value, str) else f"is not a string but {shown(repr(value))}")
    return value


# HumanEval


def _of_humaneval(row: Row) -> list[Problem]:
    entry, lead = row.text("entry_point"), _raw(row, "prompt")
    # The tests have their own copy of the prompt's helpers, so a program that redefines them does not affect the tests.
    tests = f"{lead}    pass\n\n{_raw(row, 'test')}\n\ndef test_check():\n    check({entry})\n"
    _python(tests, "test")
    return [
        Problem(
            id=row.text("task_id"),
            prompt=f"Complete this Python function.\n```python\n{lead.strip()}\n```",
            entry=entry,
            lead=lead,
            solution=_raw(row, "canonical_solution"),
            tests=tests,
        )
    ]


# CodeUpdateArena


def _of_update(row: Row, template: str) -> list[Problem]:
    update = {key: row.get(f"update.{key}") or "" for key in ("description", "docstring", "signature", "imports")}
    id_ = row.text("update.update_id")
    path, code = row.text("update.function_path"), _raw(row, "update.implementation")
    install = f"{code}\n{_installing(code, path)}"
    described = f"{update['description']}\n{update['docstring']}\nThe new signature: {update['signature']}"
    common = {"update": id_, "package": path.partition(".")[0], "described": described, "implementation": code.strip()}
    examples = row.get("prog_syn_examples")
    if not isinstance(examples, Sequence) or not examples:
        raise FieldError("prog_syn_examples", "is not a list with at least one problem")
    return [_problem(row, i, template, update["imports"], install, common) for i in range(len(examples))]


def _problem(row: Row, index: int, template: str, imports: str, install: str, common: Mapping[str, str]) -> Problem:
    """One problem of an update; `common` has the fields that all its problems share."""
    values = row.get("prog_syn_examples")[index]
    if not isinstance(values, Mapping):
        raise FieldError(f"prog_syn_examples[{index}]", f"is not a record but {type(values).__name__}")
    example = Row(values, index, row.where)
    try:
        solution, tests = _raw(example, "ref_solution"), _raw(example, "unit_tests")
        signature = example.text("solution_signature")
        # Tests use the names that the solution imports: the published tests ran in its namespace.
        tests = f"{_imports(solution)}\n{tests}"
        _python(tests, "unit_tests")
        own = str(example.get("prog_syn_imports") or "")
        if own != imports:  # before the update: they keep the old functions under other names
            imports = f"{imports}\n{own}"
        entry = re.search(r"(\w+)\s*\(", signature)
        if entry is None:
            raise FieldError("solution_signature", f"names no function: {signature!r}")
        return Problem(
            id=example.text("prog_syn_id"),
            **common,
            prompt=question(
                template,
                scenario=example.optional("scenario"),
                problem=example.text("problem"),
                solution_signature=signature,
                unit_tests=values["unit_tests"],
            ),
            entry=entry[1],
            solution=solution,
            tests=tests,
            imports=imports,
            before=f"{imports}\n{install}",
        )
    except FieldError as error:
        raise FieldError(f"prog_syn_examples[{index}].{error.field}", error.reason, error.remedy) from error


def _installing(code: str, path: str) -> str:
    """Code that installs the functions of an update in the module of its API: replaces `numpy.sum`, adds new names."""
    parent, _, _ = path.rpartition(".")
    root = parent.partition(".")[0]
    names = [
        n.name for n in _python(code, "update.implementation").body if isinstance(n, ast.FunctionDef | ast.ClassDef)
    ]
    if not parent or not names:
        raise FieldError("update.implementation", f"defines no function that could stand for {path}")
    lines = [f"import {root}", *(f"setattr({parent}, {name!r}, {name})" for name in names)]
    return "\n".join(lines) + "\n"


def _imports(program: str) -> str:
    """The import statements of a program's top level."""
    try:
        body = _python(program, "ref_solution").body
    except FieldError:
        return ""
    return "\n".join(ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom))


def _python(code: str, field: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from published code, such as a backslash in a plain string
            return ast.parse(code)
    except SyntaxError as error:
        raise FieldError(field, f"is not Python: {error.msg} (line {error.lineno})") from error


_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def program_in(output: str, lead: str = "") -> str:
    """The program in a model's output: its first fenced block, or the whole output. For HumanEval, `lead` is the text
    that the answer completes. The answer may repeat the function or only continue it; the result always follows `lead`.
    """
    fenced = _FENCE.search(output)
    text = fenced[1] if fenced else output
    if not lead or re.search(r"^(def|from|import|class) ", text, re.MULTILINE):
        return ("\n    pass\n\n" if lead else "") + text.strip("\n") + "\n"
    lines = text.strip("\n").splitlines()
    indented = bool(lines) and lines[0].startswith((" ", "\t"))
    return "\n".join(line if indented else f"    {line}" for line in lines) + "\n"
