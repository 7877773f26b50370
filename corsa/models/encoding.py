"""How a model is asked: from the text of a question and an answer to token ids, with one tokenizer and template.

The text of a fact is text: where it holds what the tokenizer takes for a special token (`<|im_end|>`), that is split
into plain tokens. Only the template and this module set special tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from jinja2 import TemplateError

from corsa.errors import CorsaError
from corsa.text import shown


@dataclass(frozen=True)
class Encoder:
    """Turns questions and answers into token ids with one tokenizer and template."""

    tokenizer: Any
    template: Literal["qa", "chat"]

    def __post_init__(self) -> None:
        if self.template == "chat" and not self.tokenizer.chat_template:
            raise CorsaError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no chat template: use --template qa, or name a "
                "model that was trained to chat"
            )

    @cached_property
    def special(self) -> tuple[str, ...]:
        """The texts that the tokenizer takes for special tokens."""
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in added if token.special)

    def prompt(self, question: str) -> list[int]:
        """Token ids of a question as the model is asked it: in the paper's template (Fig. 7) or the tokenizer's own."""
        return self.prompts([question])[0]

    def prompts(self, questions: Sequence[str]) -> list[list[int]]:
        """Of many at once: several times as fast as one by one."""
        if not questions:
            return []
        if self.template == "chat":
            return self._chats(questions)
        end = self.tokenizer.eos_token_id
        # With a begin token where there is one.
        found = self.tokenizer([f"Q: {q}\nA:" for q in questions], split_special_tokens=True)["input_ids"]
        return [ids[:-1] if ids and ids[-1] == end else ids for ids in found]

    def _chats(self, questions: Sequence[str]) -> list[list[int]]:
        turns = [[{"role": "user", "content": question}] for question in questions]
        try:
            texts = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise CorsaError(f"the chat template of {self.tokenizer.name_or_path} fails: {error}") from error
        found = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for i, question in enumerate(questions):
            if any(token in question for token in self.special):
                before, at, after = texts[i].rpartition(question)
                if not at:
                    raise CorsaError(
                        f"{shown(question)!r} holds a special token, and the chat template of "
                        f"{self.tokenizer.name_or_path} changes the question: write it without"
                    )
                parts = zip((before, question, after), (False, True, False), strict=True)
                found[i] = [
                    id_
                    for text, split in parts
                    for id_ in self.tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]
                ]
        return found

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
        found = self.tokenizer([lead + text for text in texts], add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        return [[*ids, end] for ids in found]
