"""Rendering a tokenizer's chat template, a program that came with the model: no more work than a template needs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from corsa.errors import CorsaError

_LONGEST_TEMPLATE = 1 << 18  # characters; the longest in use have a tenth of it
_LINES = 20_000  # of the compiled template, executed for one conversation; those in use take some hundred
_SECONDS = 20.0  # for one call, beside a millisecond a conversation
_ADDED = 100_000  # characters that a template may add to a conversation


class _TooMuch(BaseException):
    """Passes through whatever a template or Jinja catches."""


def render(
    tokenizer: Any, conversations: Sequence[Sequence[dict[str, str]]], *, add_generation_prompt: bool, **options: Any
) -> list[str]:
    """Conversations in the tokenizer's chat template.

    transformers renders in Jinja's sandbox, which keeps a template from files and from Python, but not from nested
    loops. This function counts the lines that a template executes, and stops it at a bound.

    Args:
        tokenizer: of transformers.
        conversations: each a list of turns {role, content}.
        add_generation_prompt: end where the assistant's next answer begins.
        options: variables that the template may read, such as `enable_thinking`.

    Raises:
        CorsaError: there is no template, it fails, or it does more than any template needs to.
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
        return line if frame.f_code.co_filename == "<template>" else None  # Jinja's name for what it compiles

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
