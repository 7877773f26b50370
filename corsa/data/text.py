"""Forms of a text: the stored form, the form for comparison, and which texts are invalid.

One name can be written in several ways that look the same: with composed or combining accents, typographic or straight
quotes, no-break or plain spaces. Text is stored in composed form (NFC) and compared in folded form.
"""

from __future__ import annotations

import re
import unicodedata

_QUOTES = str.maketrans(dict.fromkeys("‘’‚‛ʼ‹›′`´", "'") | dict.fromkeys("“”„‟«»″", '"') | {"‐": "-", "‑": "-"})
"""Maps typographic quotes and hyphens to plain characters."""

_INVISIBLE_LETTERS = "\u034f\u115f\u1160\u2800\u3164\uffa0"
"""Invisible characters that Unicode classifies as letters, marks or symbols."""

LONGEST = 100_000
"""Maximum number of characters of a question or an answer, checked before tokenization."""

_SURROUNDING = " \t\n.,;:!?\"'()[]…。、，！？：；"


def composed(text: str) -> str:
    r"""The text in composed form (NFC), without surrounding blanks and without invisible characters at its ends.

    >>> composed("Zoe\u0308\u200b ") == "Zo\u00eb"
    True
    """
    text = text.strip()
    if text.isascii():
        return text
    text = unicodedata.normalize("NFC", text)
    start, end = 0, len(text)
    while start < end and _blank(text[start]):
        start += 1
    while end > start and _blank(text[end - 1]):
        end -= 1
    return text[start:end]


def folded(text: str) -> str:
    r"""The form for comparison: NFKC, case folded, plain quotes and spaces, no invisible characters.

    >>> folded("  Zoe\u0308\u00a0 L\u2019Or ")
    "zoë l'or"
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_QUOTES))
        text = "".join(c for c in text if unicodedata.category(c) != "Cf" and c not in _INVISIBLE_LETTERS)
    return " ".join(unicodedata.normalize("NFKC", text.casefold()).split())


def same_text(first: str, second: str) -> bool:
    r"""Whether two texts differ in form only.

    >>> same_text("Zoe\u0308", "ZO\u00cb"), same_text("10 km", "10 m")
    (True, False)
    """
    return folded(first) == folded(second)


def bare(text: str) -> str:
    """The folded text without surrounding punctuation. Wordings with the same bare text are the same question.

    >>> bare("Who leads Acme?") == bare("who leads  Acme")
    True
    """
    text = folded(text)
    return text.strip(_SURROUNDING) or text


def fault(text: str) -> str | None:
    r"""Why a text cannot be a question or an answer, or None if it can be one.

    >>> fault("\u200b"), fault("a\0b"), fault("Ada")
    ('has no visible character', 'holds the control character U+0000', None)
    """
    if not visible(text):
        return "has no visible character" if text.strip() else "is blank"
    if len(text) > LONGEST:
        return f"has {len(text):,} characters, and {LONGEST:,} are the most"
    if text.isprintable():
        return None
    for character in text:
        category = unicodedata.category(character)
        if category == "Cc" and character not in "\n\t\r\f":
            return f"holds the control character U+{ord(character):04X}"
        if category == "Cs":
            return f"holds U+{ord(character):04X}, half of a character"
    return None


def visible(text: str) -> bool:
    """Whether the text has a visible character."""
    return not all(map(_blank, text))


def invisible(text: str) -> bool:
    """Whether the text contains invisible characters, except the joiners of emoji and of Persian and Indic words."""
    return not text.isascii() and any(
        c in _INVISIBLE_LETTERS or (unicodedata.category(c) == "Cf" and c not in "\u200c\u200d") for c in text
    )


def shown(text: str, longest: int = 60) -> str:
    r"""The text on one line with at most `longest` characters, control characters as escapes.

    >>> shown("a\x1b[31m" + "b" * 100, 12)
    'a\\x1b[31m...'
    """
    cut = text if len(text) <= longest else text[: longest - 3]
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
    return plain if len(plain) <= longest and cut is text else f"{plain[: longest - 3]}..."


def _blank(character: str) -> bool:
    return character.isspace() or character in _INVISIBLE_LETTERS or unicodedata.category(character) in _BLANK


_BLANK = ("Cc", "Cf", "Cn", "Cs", "Zs", "Zl", "Zp", "Mn")
"""Categories of characters that are invisible alone, such as combining marks without a letter."""

_TEMPLATE = re.compile(
    r"""\s* (?: (?:Q|Question|Human|User|Input) \s* :                                   # the beginning of a template
              | (?:<s>|<bos>|<\|begin_of_text\|>)? \s* (?:\[INST\]|<start_of_turn>|<\|(?:im_start|user|system)\|>
              | <\|start_header_id\|>|\#\#\#\ Instruction) )
        | .* (?: \n\s*|[.?!]["”’]?\s+ ) (?:A|Answer|Assistant|Response) \s* : \s* \Z    # or its end
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)


def templated(prompt: str) -> bool:
    r"""Whether a prompt is already in a template, so that a second template would be added.

    >>> [templated(text) for text in ("Q: Who leads Acme?\nA:", "Who leads Acme? Answer:", "Who leads Vitamin A:")]
    [True, True, False]
    """
    return _TEMPLATE.match(prompt) is not None
