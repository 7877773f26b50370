"""Renders a tokenizer's chat template. It is an untrusted program from the model, so its work is limited."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from corsa.errors import CorsaError

_LONGEST_TEMPLATE = 1 << 18  # characters; the longest templates in use have a tenth of this
_LINES = 20_000  # executed lines of the compiled template per conversation; templates in use need a few hundred
_SECONDS = 20.0  # for one call, plus a millisecond per conversation
_ADDED = 100_000  # characters that a template may add to a conversation


class _TooMuch(BaseException):
    """A BaseException, so that neither a template nor Jinja catches it."""


def render(
    tokenizer: Any, conversations: Sequence[Sequence[dict[str, str]]], *, add_generation_prompt: bool, **options: Any
) -> list[str]:
    """Conversations in the tokenizer's chat template.

    transformers renders in Jinja's sandbox, which denies a template access to files and to Python, but allows
    nested loops. This function counts the lines that a template executes, and stops it at a limit.

    Args:
        tokenizer: a transformers tokenizer.
        conversations: each a list of turns {role, content}.
        add_generation_prompt: end where the assistant's next answer begins.
        options: variables that the template may read, such as `enable_thinking`.

    Raises:
        CorsaError: there is no template, it fails, or it exceeds a limit.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str) and len(template) > _LONGEST_TEMPLATE:
        raise CorsaError(
            f"the chat template has {len(template)} characters: more than {_LONGEST_TEMPLATE} are not read"
        )
    until = time.monotonic() + _SECONDS + 0.001 * len(conversations)
    left = _LINES * len(conversations)

    def line(frame: FrameType, event: str, value: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or (left % 256 == 0 and time.monotonic() > until):
            raise _TooMuch
        return line

    def call(frame: FrameType, event: str, value: Any) -> Any:
        return line if frame.f_code.co_filename == "<template>" else None  # Jinja's file name for compiled templates

    before = sys.gettrace()
    sys.settrace(call)
    try:
        texts = tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except _TooMuch:
        raise CorsaError(
            f"the chat template was stopped: it does more than {_LINES} lines of work for a question, or takes longer "
            f"than {_SECONDS:g} s. Use --template qa"
        ) from None
    except Exception as error:  # whatever the template, Jinja or transformers raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CorsaError(f"the chat template of this tokenizer fails: {reason[:300]}. Use --template qa") from error
    finally:
        sys.settrace(before)
    for turns, text in zip(conversations, texts, strict=True):
        given = sum(len(turn["content"]) for turn in turns)
        if len(text) > 8 * given + _ADDED:
            raise CorsaError(f"the chat template makes {len(text)} characters of a conversation of {given}")
    return texts
