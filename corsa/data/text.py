"""Forms of a text: the stored form, the form for comparison, and which texts are invalid.

One name can be written in several ways that look the same: with composed or combining accents, typographic or straight
quotes, no-break or plain spaces. Text is stored in composed form (NFC) and compared in folded form.
"""

from __future__ import annotations

import re
import unicodedata

_QUOTES = str.maketrans(dict.fromkeys("‘’‚‛ʼ‹›′`´", "'") | dict.fromkeys("“”„‟«»″", '"') | dict.fromkeys("‐‑‒–−", "-"))
"""Maps typographic quotes, hyphens, the en dash (1990–2000) and the minus sign to plain characters."""

_INVISIBLE_LETTERS = "\u034f\u115f\u1160\u2800\u3164\uffa0"
"""Invisible characters that Unicode classifies as letters, marks or symbols."""

LONGEST = 100_000
"""Maximum number of characters of a question or an answer, checked before tokenization."""

_MARKS = r"""\s,;:!?"'()\[\]…。、，！？：；¿¡「」『』《》〈〉【】"""
_AROUND = re.compile(rf"^(?:[{_MARKS}]|\.{{2,}}|\.(?!\w))+|[{_MARKS}.]+$")
"""A single dot before a word belongs to it: .5, .NET."""


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
    >>> folded("1990\u20132000")
    '1990-2000'
    """
    if text.isascii():  # fast path, as in the functions below: most text of a benchmark is plain
        return " ".join(text.lower().split())
    text = unicodedata.normalize("NFKC", text.translate(_QUOTES))
    text = "".join(c for c in text if unicodedata.category(c) != "Cf" and c not in _INVISIBLE_LETTERS)
    return " ".join(unicodedata.normalize("NFKC", text.casefold()).split())


def same_text(first: str, second: str) -> bool:
    r"""Whether two texts differ in form only. No rule of matching can tell the two from each other.

    >>> same_text("Zoe\u0308", "ZO\u00cb."), same_text("10 km", "10 m")
    (True, False)
    """
    return bare(first) == bare(second)


def bare(text: str) -> str:
    """The folded text without surrounding punctuation and quotes. A text of punctuation only is not changed. Wordings
    with the same bare text are the same question.

    >>> bare("Who leads Acme?") == bare("who leads  Acme")
    True
    >>> bare(' "Tim  COOK".'), bare(".NET"), bare("?")
    ('tim cook', '.net', '?')
    """
    text = folded(text)
    if text[:1].isalnum() and text[-1:].isalnum():
        return text
    return _AROUND.sub("", text) or text


def fault(text: str) -> str | None:
    r"""Why a text cannot be a question or an answer, or None if it can be one.

    >>> fault("\u200b"), fault("a\0b"), fault("Ada")
    ('has no visible character', 'holds the control character U+0000', None)
    """
    if _plain(text) and len(text) <= LONGEST:
        return None
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
    return _plain(text) or not all(map(_blank, text))


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


def _plain(text: str) -> bool:
    """Whether the text is printable ASCII with a character that is no space."""
    return text.isascii() and text.isprintable() and text.strip() != ""


def _blank(character: str) -> bool:
    return character.isspace() or character in _INVISIBLE_LETTERS or unicodedata.category(character) in _BLANK


_BLANK = ("Cc", "Cf", "Cn", "Cs", "Zs", "Zl", "Zp", "Mn")
"""Categories of characters that are invisible alone, such as combining marks without a letter."""

_ASKED = "Q|Question|Human|User|Input|Instruction|Frage|Pregunta|Вопрос|问|問|问题|問題|質問"
_ANSWERED = "A|Answer|Assistant|Response|Antwort|Respuesta|Réponse|Ответ|答|回答|答案"
_BEGINNING = re.compile(
    rf"""[*_\#]* \s* (?:{_ASKED}) \s* \d* \s* [*_]* \s* :
         | (?:<s>|<bos>|<\|begin_of_text\|>)? \s* (?:\[INST\]|<start_of_turn>|<\|(?:im_start|user|system)\|>
                                                 | <\|start_header_id\|>)""",
    re.VERBOSE | re.IGNORECASE,
)
_HEADING = re.compile(rf"^\#\#\#\ (?:{_ASKED})\s*:", re.VERBOSE | re.IGNORECASE | re.MULTILINE)
_END = re.compile(
    rf"""(?: \n | [.?!]["”’]?[\s*_\#]+ | [。?](?=[答回]) ) [\s*_\#]* (?:{_ANSWERED}) \s* [*_]* \s* : [\s*_]* \Z
         | (?: \[/INST\] | <start_of_turn>model | <\|assistant\|> ) \Z""",
    re.VERBOSE | re.IGNORECASE,
)
_EDGE = 100
"""Characters at each end of a prompt that can belong to a template."""


def templated(prompt: str) -> bool:
    r"""Whether a prompt is already in a template, so that a second template would be added.

    >>> [templated(text) for text in ("Q: Who leads Acme?\nA:", "Who leads Acme? Answer:", "Who leads Vitamin A:")]
    [True, True, False]
    """
    text = unicodedata.normalize("NFKC", prompt).strip()
    if not (":" in text or "[" in text or "<" in text or text[:2] in ("Q.", "q.")):
        return False  # every template has one of these
    start, end = text[:_EDGE], text[-_EDGE:]
    if _BEGINNING.match(start) or _END.search(end) or _HEADING.search(text):
        return True
    return (
        re.match(r"Q\.\s", start, re.IGNORECASE) is not None and re.search(r"\sA\.\Z", end, re.IGNORECASE) is not None
    )
