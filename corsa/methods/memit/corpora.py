"""Texts for MEMIT's key statistics: the neutral corpus that ships with the project, or a user's file.

Imports no torch.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from corsa.errors import CorsaError

NEUTRAL = Path(__file__).parent / "corpus" / "neutral.txt.gz"
"""The default corpus: passages on many subjects, without the benchmarks' facts. corpus/README.md has their origin."""

NEUTRAL_NAME = "the shipped neutral corpus (presidential addresses 1900-1988, WordNet entries)"
"""Its name in a report."""


def corpus_texts(path: str | Path) -> Iterator[str]:
    """The texts of a file, one per line; in a `.jsonl` file, the field `text` of each line. Leaves out blank texts. The
    file may be compressed with gzip (`.gz`).

    Raises:
        CorsaError: the file cannot be read, or a JSON line has no text.
    """
    opened = gzip.open if str(path).endswith(".gz") else open
    json_lines = str(path).removesuffix(".gz").endswith(".jsonl")
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                text = _json_text(line, path, number) if json_lines and line.strip() else line
                if text.strip():
                    yield text.strip()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise CorsaError(f"the corpus {path} cannot be read: {e}; give a text file in UTF-8, a text a line") from e


def _json_text(line: str, path: str | Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise CorsaError(f'{path}, line {number}: is no JSON object with a string "text"; write {{"text": "..."}}')
    return text
