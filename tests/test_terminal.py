"""Text of models and files reaches a terminal as plain text, without control sequences."""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path

import pytest
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from corsa.config.command_line import answered
from corsa.errors import CorsaError
from corsa.terminal import Console, visible

ROOT = Path(__file__).parents[1]
HOSTILE = {
    "clear the screen": "\x1b[2J",
    "set the title": "\x1b]0;title\x07",
    "a link": "\x1b]8;;http://x\x1b\\click\x1b]8;;\x1b\\",
    "eight-bit control": "\x9b31m",
    "carriage return": "ok\rno",
    "backspace": "no\x08\x08ok",
    "delete": "a\x7fb",
    "null": "a\x00b",
    "bidi override": "abc\u202edef\u202c",
    "bidi isolate": "\u2066x\u2069",
    "tags": "a\U000e0041b",
    "line separator": "a\u2028b",
    "surrogate": "a\ud800b",
}
RAW = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\ud800-\udfff\U000e0000-\U000e007f]"
)


def drawn(*things: object) -> str:
    """The output to a colour terminal, without Rich's own colours."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, width=200, legacy_windows=False)
    for thing in things:
        console.print(thing)
    return out.getvalue()


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_nothing_of_a_text_is_obeyed_whatever_it_is_printed_as(text: str) -> None:
    table = Table("head " + escape(text), title=escape(text), caption=escape(text))
    table.add_row(escape(text))
    for thing in (text, escape(text), Text(text), table, Text.assemble(("a", "bold"), text)):
        found = drawn(thing)
        assert not RAW.search(found), repr(found)
    assert not RAW.search(visible(text))
    assert visible(text) != text
    visible(text).encode()  # no lone surrogate is left either
    assert visible(text).isprintable()


def test_a_live_line_is_as_safe_and_still_live() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, width=80)
    with Live(Text("evil \x1b[2J \u202e"), console=console, refresh_per_second=1) as live:
        live.refresh()
    found = out.getvalue()
    assert "evil \\x1b[2J \\u202e" in found
    assert "\x1b[2J" not in found
    assert "\x1b[?25l" in found  # Rich's own sequences pass


def test_plain_text_of_any_script_stays_as_it_is() -> None:
    for text in ("plain", "línea\nnext\tcell", "中文", "עברית", "क्\u200dष", "👩\u200d🔬", "1 × 2 – “quoted”"):
        assert visible(text) == text


def test_an_error_cannot_write_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise CorsaError("no model \x1b]0;owned\x07 \x9b2J \u202e")

    assert answered(command) == 2
    assert not RAW.search(capsys.readouterr().err)


def test_an_answer_and_a_fact_cannot_write_on_the_terminal() -> None:
    from corsa.cli.commands.ask import _table
    from corsa.cli.commands.data import _visible
    from corsa.evaluation.side_by_side import Answer
    from corsa.report.facts import tables

    evil = "\x1b[2J\r\u202e[red]"
    found = drawn(_table([Answer(evil, evil, {evil: 0.5})]))
    assert not RAW.search(found)
    assert found.count("\\x1b[2J\\x0d\\u202e[red]") == 3
    said = dict.fromkeys(("prompt", "question", "answer", "before", "then", "now", "says"), evil)
    fact = said | {"took": False, "right": 0, "wordings": 1, "right_now": False, "outcome": "lost"}
    found = "".join(drawn(one) for one in tables({"facts": [fact], "earlier": [fact], "everyday": [fact]}))
    assert not RAW.search(found)
    assert found.count("\\x1b[2J") == 4 + 4 + 3
    assert _visible(f"a {evil}") == "a␣\\x1b[2J\\x0d\\u202e[red]"


def test_a_title_with_markup_is_shown_as_it_is() -> None:
    from synthetic_run import predictions

    from corsa.evaluation.metrics import compute
    from corsa.report.tables import summary_table

    found = drawn(
        summary_table(compute(predictions(chains=8)) | {"title": "facts [/bold] [link=http://x]of[/link] \x1b[2J"})
    )
    assert "facts [/bold] [link=http://x]of[/link] \\x1b[2J" in " ".join(found.split())


def calls(path: Path) -> list[tuple[int, ast.Call]]:
    return [(n.lineno, n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]


def test_every_console_is_the_safe_one_and_every_print_passes_the_check() -> None:
    """Commands print only literals, ASCII JSON, and text that `visible` has cleaned."""
    files = [path for folder in ("corsa", "tune", "pipelines") for path in sorted((ROOT / folder).rglob("*.py"))]
    faults = []
    for path in files:
        text = path.read_text()
        for line, call in calls(path):
            where = f"{path.relative_to(ROOT)}:{line}: {ast.unparse(call)[:80]}"
            unsafe = "import Console" in text and "from corsa.terminal import Console" not in text
            if ast.unparse(call.func) == "Console" and unsafe and "file=" not in ast.unparse(call):
                faults.append(where)
            shown = path.parent.name in ("commands", "tune") or path.name in ("command_line.py", "main.py")
            if shown and ast.unparse(call.func) == "print" and not all(map(harmless, call.args)):
                faults.append(where)
            if "json.dumps" in ast.unparse(call.func) and shown and "ensure_ascii" in ast.unparse(call):
                faults.append(where)
    assert faults == []


def harmless(value: ast.expr) -> bool:
    if isinstance(value, ast.IfExp):
        return harmless(value.body) and harmless(value.orelse)
    if isinstance(value, ast.JoinedStr):  # formatted numbers, and text that `visible` has cleaned
        parts = [part for part in value.values if isinstance(part, ast.FormattedValue)]
        return all(number(part) or ast.unparse(part.value).startswith("visible(") for part in parts)
    return isinstance(value, ast.Constant) or ast.unparse(value).startswith(("json.dumps(", "visible("))


def number(part: ast.FormattedValue) -> bool:
    return part.format_spec is not None and ast.unparse(part.format_spec).strip("f'\"").endswith(("d", "f", "g"))
