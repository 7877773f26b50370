"""Errors that a person reads: what was wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class CorsaError(Exception):
    """A failure with a cause the user can mend. Commands print its text and exit with `status`, without a traceback."""

    status = 2


class StepsFailedError(CorsaError):
    """Steps of a run failed; which, and why, has been said. What is finished is kept."""

    status = 1


def unknown_name(kind: str, name: str, known: Iterable[str]) -> CorsaError:
    """An error for a name that is not known, with the nearest right one.

    >>> str(unknown_name("method", "crosa", ["lora", "corsa"]))
    "unknown method 'crosa': did you mean 'corsa'? Known: lora, corsa"
    """
    names = list(known)
    near = nearest(name, names)
    hint = f"did you mean {near!r}? " if near else ""
    return CorsaError(f"unknown {kind} {name!r}: {hint}Known: {', '.join(names)}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like this one, whatever their case and closing punctuation; None if none is like it.

    >>> nearest("who leads acme", ["1/0", "Who leads Acme?", "Who led Acme?"])
    'Who leads Acme?'
    """
    by_text = {_bare(other): other for other in known}
    near = get_close_matches(_bare(name), list(by_text), n=1, cutoff=0.5)
    return by_text[near[0]] if near else None


def _bare(text: str) -> str:
    return text.casefold().strip().strip(".?!")
