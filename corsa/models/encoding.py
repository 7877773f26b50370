"""How a model is asked: from the text of a question and an answer to token ids, with one tokenizer and template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from corsa.models.templates import render


@dataclass(frozen=True)
class Encoder:
    """Turns questions and answers into token ids with one tokenizer and template."""

    tokenizer: Any
    template: Literal["qa", "chat"]

    def prompt(self, question: str) -> list[int]:
        """Token ids of a question as the model is asked it: in the paper's template (Fig. 7) or the tokenizer's own."""
        return self.prompts([question])[0]

    def prompts(self, questions: Sequence[str]) -> list[list[int]]:
        """Of many at once: several times as fast as one by one."""
        if not questions:
            return []
        if self.template == "chat":
            return self.tokenizer(render(self.tokenizer, questions), add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        found = self.tokenizer([f"Q: {q}\nA:" for q in questions])["input_ids"]  # begin token where there is one
        return [ids[:-1] if ids and ids[-1] == end else ids for ids in found]

    def answer(self, text: str) -> list[int]:
        """Token ids of `" " + text` tokenized on its own (chat: `text`), and the end-of-text token, which is part of y.

        A text without tokens gives the end token alone.
        """
        return self.answers([text])[0]

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Of many at once."""
        if not texts:
            return []
        lead, end = "" if self.template == "chat" else " ", self.tokenizer.eos_token_id
        found = self.tokenizer([lead + text for text in texts], add_special_tokens=False)["input_ids"]
        return [[*ids, end] for ids in found]
