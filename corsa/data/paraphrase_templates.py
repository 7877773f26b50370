"""Template paraphrases, used when the file gives only one wording of a fact.

They keep the content words and change the words around them, so they are easier for a model than paraphrases
written by people. A report states for how many facts they were used.
"""

from __future__ import annotations

import re

_OF = re.compile(r"(?P<ask>who|what|which \w+|where|when) (?P<verb>is|was|are|were) (?P<of>the .+? of .+?)\?", re.I)
_OPENING = re.compile(r"(who|whom|whose|what|which|where|when|how|why|in|on|at|for|of)\b", re.I)


def wordings(prompt: str) -> tuple[str, str, str]:
    """Three paraphrases of a question, or of the beginning of a sentence.

    >>> for wording in wordings("Who is the head of Acme?"):
    ...     print(wording)
    The head of Acme is
    Tell me who the head of Acme is.
    I have a question: who is the head of Acme?
    >>> wordings("Acme was founded in")[0]
    'Complete the sentence: Acme was founded in'
    """
    prompt = prompt.strip()
    asking = _lowered(prompt)
    if found := _OF.fullmatch(prompt):
        ask, verb, of = found["ask"].lower(), found["verb"], found["of"]
        return (f"{of[0].upper()}{of[1:]} {verb}", f"Tell me {ask} {of} {verb}.", f"I have a question: {asking}")
    if prompt.endswith("?"):
        return (f"I have a question: {asking}", f"Answer in a few words: {asking}", f"{prompt} Please tell me.")
    return (f"Complete the sentence: {prompt}", f"What comes next? {prompt}", f"Go on from here: {prompt}")


def _lowered(prompt: str) -> str:
    """The prompt, with its first word in lower case if that is a question word or a preposition."""
    return prompt[0].lower() + prompt[1:] if _OPENING.match(prompt) else prompt
