"""Makes text from models and files safe for a terminal: it is shown and has no other effect.

Every command writes through `Console`, or passes what it prints through `visible`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import rich.console
from rich.markup import escape
from rich.segment import Segment

_PLAIN = "\n\t\u200c\u200d"  # the last two join letters of some scripts, and parts of an emoji
_ACTIVE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (bidi overrides among them), surrogates, line separators


def visible(text: str) -> str:
    r"""The text with everything that a terminal would obey, or not show, as an escape sequence that it shows.

    >>> print(visible("red \x1b[31m, turned \u202e and a line\nbreak"))
    red \x1b[31m, turned \u202e and a line
    break
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if c not in _PLAIN and unicodedata.category(c) in _ACTIVE else c for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def without_user(address: str) -> str:
    """A URL without its user information, for a message.

    >>> without_user("http://me:secret@host/path"), without_user("me:secret@host")
    ('http://host/path', 'host')
    """
    return re.sub(r"^([\w+.-]+://)?[^?#]*@", r"\1", address)


class Console(rich.console.Console):
    """Rich's console, which passes on no control character but its own."""

    def print(self, *objects: Any, **how: Any) -> None:
        """As Rich's; it would drop some control characters of texts without a trace."""
        super().print(*(visible(o) if isinstance(o, str) else o for o in objects), **how)

    def render(self, renderable: Any, options: rich.console.ConsoleOptions | None = None) -> Iterable[Segment]:
        """As Rich's: whatever is printed, a table or a live line, becomes segments of text here."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


@contextmanager
def working(doing: str) -> Iterator[None]:
    """Says on stderr what is being done that takes a while: on a terminal until the block ends, else in a line."""
    say = Console(stderr=True)
    if say.is_terminal:
        with say.status(escape(doing)):
            yield
    else:
        say.print(f"{doing} ...", markup=False, highlight=False, soft_wrap=True)
        yield
