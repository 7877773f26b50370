"""The prompt of the code domain, for a problem whose solution needs an API update.

The structure is that of the paper's Fig. 8 (a task, its unit tests, two rules); the wording is this project's. A user's
template file replaces it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from string import Formatter

from corsa.errors import CorsaError

PLACEHOLDERS = ("scenario", "problem", "solution_signature", "unit_tests")

_LIST = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
_BRACES = "a brace that is text is written twice, {{ or }}"

TEMPLATE = """\
[TASK]
Write a Python solution to a problem in a real-world scenario.
Scenario: {scenario}
Problem: {problem}
The solution has exactly this solution signature:
{solution_signature}

[TEST]
These unit tests check the solution:
```python
{unit_tests}
```

Rules:
- Reply with Python code only, without markdown.
- Use exactly the solution signature that is requested."""
"""The default template."""


def read_template(path: str | Path | None) -> str:
    """The checked text of a template file; `TEMPLATE` if `path` is None.

    Each of the four `PLACEHOLDERS` occurs in braces at least once. A literal brace is doubled: `{{`.

    Raises:
        CorsaError: the file cannot be read, or its placeholders are not these.
    """
    if path is None:
        return TEMPLATE
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorsaError(f"the prompt template {path} cannot be read: {error}; give a text file in UTF-8") from error
    try:
        parts = [(name, how, conversion) for _, name, how, conversion in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise CorsaError(f"the prompt template {path}: {error}; {_BRACES}") from error
    found = []
    for name, how, conversion in parts:
        if name not in PLACEHOLDERS or how or conversion:
            written = " ".join(f"{name}{'!' if conversion else ''}{conversion or ''}{':' if how else ''}{how}".split())
            raise CorsaError(
                f"the prompt template {path}: {{{written[:60]}}} is no placeholder; use {_LIST}; {_BRACES}"
            )
        found.append(name)
    if missing := [name for name in PLACEHOLDERS if name not in found]:
        raise CorsaError(
            f"the prompt template {path}: {{{missing[0]}}} is missing; a template holds {_LIST}, each at least once"
        )
    return text.rstrip("\n")


def digest_of(template: str) -> str:
    """Identifies a template by its text, independent of the file's path."""
    return hashlib.sha256(template.encode()).hexdigest()


def question(template: str, *, scenario: str, problem: str, solution_signature: str, unit_tests: str) -> str:
    """The question about a problem: the template with its placeholders filled."""
    return template.format(
        scenario=scenario, problem=problem, solution_signature=solution_signature, unit_tests=unit_tests.strip()
    )


def prompt_of(problem: Mapping[str, str], *, described: bool, implementation: bool) -> str:
    """The prompt for a program. `described` puts the update's description before the question. `implementation` puts
    the update's code after the description.
    """
    if not described:
        return problem["prompt"]
    code = f"\n```python\n{problem['implementation']}\n```" if implementation else ""
    return f"{problem['described']}{code}\n\n{problem['prompt']}"
