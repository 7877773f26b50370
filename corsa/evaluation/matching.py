"""Whether an output gives an answer, by one of three rules. Every reported number names its rule.

`words` finds the target as whole words: "Iran" is not in "Tirana", "4" is neither in "2004" nor in "3.4". The
protocol `full` uses it. `contains` finds the target anywhere, also inside words; the protocols `paper` and `authors`
use it. `exact` accepts only the target itself. All three compare folded text (`corsa.data.text.folded`: NFKC, case,
quotes, spaces), and all three are stored for every output.

The protocol `authors` matches as the published evaluation code does: a plain lower-cased substring test of the target,
without folding, aliases, or preference for a longer name (`plain_matches`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from corsa.data import text as forms

Answer = tuple[str, Sequence[str]]
"""A target and its aliases: any of the names counts."""

Found = Callable[[str, str], bool]
"""Whether a folded text contains a folded name."""


class Match(NamedTuple):
    """Which answers one output gives: `new` and `old` by the rule `contains`, and the same by the other two rules."""

    new: bool
    old: bool
    exact_new: bool
    exact_old: bool
    words_new: bool
    words_old: bool


def words(output: str, target: str, aliases: Sequence[str] = ()) -> bool:
    """Whether the target or an alias occurs in the output as whole words. An empty name never does.

    No letter, digit or accent may continue the name. In scripts without spaces (Chinese, Japanese, Thai, ...) it may
    occur anywhere. A number is one word, with its sign, decimals and groups of thousands.

    >>> words("He plays for the Lakers.", "Los Angeles Lakers", ["Lakers"])
    True
    >>> words("It was in 2004, for 1,000 experiences", "4"), words("New York-based", "New York")
    (False, True)
    """
    return bool(_longest(output, (target, aliases), _as_words))


def contains(output: str, target: str, aliases: Sequence[str] = ()) -> bool:
    """Whether the target or an alias occurs anywhere in the output. An empty name never does.

    >>> contains("He plays for the Lakers.", "Los Angeles Lakers", ["Lakers"])
    True
    >>> contains("in 2004", "4")
    True
    """
    return bool(_longest(output, (target, aliases), _anywhere))


def exact(output: str, target: str, aliases: Sequence[str] = ()) -> bool:
    r"""Whether the first line of the output, normalised, is the target or an alias. If one of these names has several
    lines, the whole output must be the name.

    >>> exact(" Tim Cook.\nQ: Who", "tim cook")
    True
    >>> exact("in 2004", "4")
    False
    >>> exact("Ada Lind\nCy Moss", "Ada Lind\nBo Holm")
    False
    """
    names = (target, *aliases)
    return _exact(output, names, whole=several_lines(names))


def matches(output: str, new: Answer, old: Answer) -> Match:
    """Which of two answers the output gives, by each rule. If the name found for one answer contains the name found for
    the other, the longer one wins.

    >>> matches("New York City", new=("New York City", ()), old=("New York", ()))[:2]
    (True, False)

    An output that names both, neither inside the other, matches both. Pass `("", ())` as `old` for a probe without
    an old answer.
    """
    whole = several_lines((new[0], *new[1], old[0], *old[1]))
    return Match(
        *_which(output, new, old, _anywhere),
        exact_new=_exact(output, (new[0], *new[1]), whole),
        exact_old=_exact(output, (old[0], *old[1]), whole),
        **dict(zip(("words_new", "words_old"), _which(output, new, old, _as_words), strict=True)),
    )


def plain_matches(output: str, new: str, old: str) -> Match:
    """As `matches` for the protocol `authors`: `contains` is a plain test of the lower-cased target. No rule uses
    aliases or prefers a longer name.

    >>> plain_matches("New York City", "New York City", "New York")[:2]
    (True, True)
    """
    whole, text = several_lines((new, old)), output.lower()
    return Match(
        *(bool(target.strip()) and target.strip().lower() in text for target in (new, old)),
        exact_new=_exact(output, (new,), whole),
        exact_old=_exact(output, (old,), whole),
        words_new=words(output, new),
        words_old=words(output, old),
    )


def several_lines(names: Sequence[str]) -> bool:
    """Whether one of the names has several lines: then it can only be compared with a whole output."""
    return any(len(name.strip().splitlines()) > 1 for name in names)


@lru_cache(maxsize=4096)  # each output is compared with several names, under several rules
def folded(text: str) -> str:
    """The text as every rule compares it (`corsa.data.text.folded`)."""
    return forms.folded(text)


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """The text as the rules compare a whole answer (`corsa.data.text.bare`)."""
    return forms.bare(text)


def _exact(output: str, names: Sequence[str], whole: bool) -> bool:
    given = normalise(output if whole else first_line(output))
    return bool(given) and any(given == normalise(name) for name in names)


def first_line(text: str) -> str:
    """The first non-blank line, without surrounding blanks; "" if there is none."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _which(output: str, new: Answer, old: Answer, found: Found) -> tuple[bool, bool]:
    new_name, old_name = _longest(output, new, found), _longest(output, old, found)
    return (
        bool(new_name) and not (new_name != old_name and found(old_name, new_name)),
        bool(old_name) and not (new_name != old_name and found(new_name, old_name)),
    )


def _longest(output: str, answer: Answer, found: Found) -> str:
    """The longest folded name of the answer in the output; "" if there is none."""
    text, form = folded(output), normalise if found is _as_words else folded
    names = [form(name) for name in (answer[0], *answer[1])]
    return max((name for name in names if name and found(text, name)), key=len, default="")


def _anywhere(text: str, name: str) -> bool:
    return bool(name) and name in text


def _as_words(text: str, name: str) -> bool:
    start = text.find(name) if name else -1
    while start >= 0:
        if _bounded(text, start, start + len(name)):
            return True
        start = text.find(name, start + 1)
    return False


# Where words end

_NUMBER = re.compile(r"\d{1,3}(?:[,.' ]\d{3})+(?:[.,]\d+)?|\d+[.,]\d+")
"""A number with decimals or groups of thousands. A date such as 12.05.2004 does not match."""
_DIGITS = re.compile(r"\d+(?:[.,']\d+| \d{3}(?!\d))*")
_CONTRACTED = frozenset({"s", "t", "d", "m", "re", "ve", "ll"})
"""What follows the apostrophe in "Acme's" and "don't"."""

_SUFFIX = re.compile(r"[+#]+(?!\w)")
"""So that C does not match in C++ or C#."""

_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f"
    "\u3005-\u3007\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua980-\ua9df\uaa60-\uaadf"
    "\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer and related ones, Chinese, Japanese. Also
Korean, where particles are attached to a name.
"""


def _bounded(text: str, start: int, end: int) -> bool:
    """Whether text[start:end] consists of whole words of the text."""
    before, after = text[:start], text[end:]
    if before and _goes_on(text[start], before[-1]) and not (before[-1] == "_" and _emphasis(before[::-1])):
        return False
    if after and _goes_on(text[end - 1], after[0]) and not (after[0] == "_" and _emphasis(after)):
        return False
    if after and unicodedata.category(after[0]).startswith("M"):  # a combining accent without a precomposed letter
        return False
    if text[end - 1].isalpha() and _SUFFIX.match(after):
        return False
    if re.search(r"\w'$", before) and text[start:end] in _CONTRACTED:
        return False
    return not ((text[start].isdigit() or text[end - 1].isdigit()) and _inside_a_number(text, start, end))


def _goes_on(edge: str, neighbour: str) -> bool:
    """Whether a word with the character `edge` at its end continues in `neighbour`."""
    return _of_word(edge) and _of_word(neighbour) and not (_UNSPACED.match(edge) or _UNSPACED.match(neighbour))


def _of_word(character: str) -> bool:
    return character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")


def _emphasis(following: str) -> bool:
    """Whether underscores mark emphasis, as in _Paris_: no word continues after them."""
    rest = following.lstrip("_")
    return not rest or not _of_word(rest[0])


def _inside_a_number(text: str, start: int, end: int) -> bool:
    """Whether the match is only a part of a number: 3 in 3.14, 000 in 1,000, 5 in -5."""
    for number in _DIGITS.finditer(text):
        first, last = number.span()
        if first < end and start < last and _NUMBER.fullmatch(number[0]) and (first < start or end < last):
            return True
    sign = text[start - 1 : start]
    return bool(text[start].isdigit() and sign and sign in "-+" and not text[: start - 1][-1:].strip())
