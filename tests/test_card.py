"""A model card quotes facts, names and answers of others. A Markdown reader must show them as plain text."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from corsa.config import ModelConfig
from corsa.data.edit import Edit
from corsa.editing.card import card, plain
from corsa.editing.history import Update

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=https://tracker.example/x.png>",
    "![](https://tracker.example/x.png)",
    "[click](https://evil.example)",
    "[click]: https://evil.example",
    "<https://evil.example>",
    "https://evil.example/path",
    "www.evil.example",
    "me@evil.example",
    "@everybody",
    "a | b | c",
    "a\n\n# Heading\n\n| x |\n|---|\n| y |",
    "a\n---\nlicense: mit\n---\n",
    "# heading",
    "- list",
    "+ list",
    "1. list",
    "1) list",
    "> quote",
    "```\ncode\n```",
    "`code`",
    "~~gone~~",
    "**bold** _it_ __bold__",
    "$x^2$ $$y$$",
    "&lt;b&gt; &#60;b&#62;",
    "back\\slash \\[x](y)",
    "\u202egnp.exe",
    "=====",
    "<!-- hidden -->",
    "{{ 7 * 7 }} {% raw %}",
    "x" * 5_000,
]
READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def text(fact: str, name: str = "smollm2-135m") -> str:
    edit = Edit.build(id="1/f/0", prompt=f"{fact} who?", target_new=f"{fact} new", target_old=f"{fact} old", round=1)
    known: dict[str, Any] = {"fingerprint": "f", "sha256": "0", "directory": "/x", "created": fact}
    update = Update(number=1, kind="edit", facts=1, method=fact, source=fact, **known)
    value = {"label": "Generality", "value": 0.5, "low": 0.25, "high": 0.75, "edits": 1, "probes": 3}
    return card(ModelConfig(name=name), [update], [edit], {"generality": value}, {"rule": "contains", "LoRA": fact})


def pieces(markdown: str) -> list[tuple[str, str]]:
    """(kind, content) of every element that a Markdown reader finds."""
    tokens = READER.parse(markdown)
    return [(t.type, t.content) for block in tokens for t in (block, *(block.children or []))]


def structure(markdown: str) -> list[str]:
    """The kinds of blocks and spans, without their text."""
    kinds = [kind for kind, _ in pieces(markdown)]
    return [kind for kind in kinds if kind not in ("text", "text_special", "inline", "softbreak")]


@pytest.mark.parametrize("fact", HOSTILE)
def test_a_card_has_the_structure_of_a_plain_ones_whatever_its_facts_say(fact: str) -> None:
    _, front, body = text(fact).split("---\n", 2)
    _, plain_front, plain_body = text("plain").split("---\n", 2)
    assert yaml.safe_load(front) == yaml.safe_load(plain_front)
    assert structure(body) == structure(plain_body)
    assert not re.search(
        r"(?i)https?://(?!huggingface\.co/)|\bwww\.|\w@\w", body
    )  # what GitHub and the hub turn into links
    assert "\x1b" not in body
    assert "\u202e" not in body


@pytest.mark.parametrize("fact", HOSTILE)
def test_a_text_is_shown_as_it_is(fact: str) -> None:
    shown = "".join(content for kind, content in pieces(plain(fact)) if kind in ("text", "text_special"))
    wanted = " ".join(fact.split()).replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert shown.rstrip(".") == wanted[:500].rstrip(".")


@pytest.mark.parametrize(
    "name",
    [
        "a/b\nlicense: mit\n---\n<script>",
        'a/b"); import os; os.system("x',
        "a/b'\"",
        "/models/own](https://evil.example)",
        "a/b```\n",
        "../../etc/passwd",
        "a/../b",
    ],
)
def test_a_models_name_is_a_name_in_the_front_matter_the_code_and_the_title(name: str) -> None:
    written = text("plain", name)
    _, front, body = written.split("---\n", 2)
    assert set(yaml.safe_load(front)) <= {"base_model", "library_name", "pipeline_tag", "tags"}
    (code,) = [content for kind, content in pieces(body) if kind == "fence"]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert len(calls) == 2
    assert [a.value for c in calls for a in c.args if isinstance(a, ast.Constant)] == ["PATH OF THIS DIRECTORY", name]
    plain_body = text("plain", "/models/own").split("---\n", 2)[2]
    assert [k for k in structure(body) if not k.startswith("link")] == structure(plain_body)
