"""Finds links to lines of code, and commands, in the documents. `python tests/documents.py` fixes the line numbers."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("cluster/*.md")])

_LINK = re.compile(r"\[`(?P<file>[\w/.]+): (?P<name>\w+)`\]\((?P<to>[^)#]+)#L(?P<line>\d+)\)")
_FENCE = re.compile(r"^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.DOTALL | re.MULTILINE)
_SHELL = ("sh", "bash", "console")
_COMMAND = re.compile(r"^\s*(python|corsa|make|ray|pip|--training)\b", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document, and the line it begins at."""

    document: str
    line: int
    language: str
    text: str

    @property
    def elsewhere(self) -> bool:
        """Whether the text says that it needs something this machine may lack. All of cluster/ needs a cluster."""
        return self.text.lstrip().startswith("# needs ") or self.document.startswith("cluster/")

    def commands(self) -> Iterator[list[str]]:
        """The words of each command, without comments and with continued lines joined."""
        if self.language not in _SHELL and (self.language or not _COMMAND.search(self.text)):
            return
        for line in self.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def blocks() -> list[Block]:
    """Every fenced block of every document."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text()
        for match in _FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(str(path.relative_to(ROOT)), line, match["language"], match["text"]))
    return found


def example(start: str) -> str:
    """The Python block of extending.md that begins with this comment."""
    (found,) = [
        block.text
        for block in blocks()
        if block.document == "docs/extending.md" and textwrap.dedent(block.text).startswith(f"# {start}\n")
    ]
    assert len(found.splitlines()) < 60
    return textwrap.dedent(found)


def inline_commands() -> Iterator[tuple[str, list[str]]]:
    """Inline commands with options: the document, and the words."""
    for path in DOCUMENTS:
        prose = _FENCE.sub("", path.read_text())
        for span in re.findall(r"`([^`]+)`", prose):
            text = " ".join(span.split())
            if re.match(r"(python )?pipelines/\w+\.py |corsa [a-z]+ .*--", text):
                yield str(path.relative_to(ROOT)), shlex.split(text)


def line_of(file: str, name: str) -> int | None:
    """The line on which a module defines a name."""
    for number, line in enumerate((ROOT / file).read_text().splitlines(), start=1):
        if re.match(rf"(def|class) {name}\b|{name}(:.*)? = ", line):
            return number
    return None


def wrong_links() -> list[str]:
    """Links to lines that do not define the linked name."""
    wrong = []
    for path in DOCUMENTS:
        for link in _LINK.finditer(path.read_text()):
            file = (path.parent / link["to"]).resolve()
            fits = file == ROOT / link["file"] and line_of(link["file"], link["name"]) == int(link["line"])
            if not fits:
                wrong.append(f"{path.relative_to(ROOT)}: {link[0]}")
    return wrong


def mended(text: str) -> str:
    """The document with current line numbers."""

    def now(link: re.Match[str]) -> str:
        line = line_of(link["file"], link["name"]) or link["line"]
        return f"[`{link['file']}: {link['name']}`]({link['to']}#L{line})"

    return _LINK.sub(now, text)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(mended(document.read_text()))
