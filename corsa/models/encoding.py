"""How a model is asked: from the text of a question and an answer to token ids, with one tokenizer and template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from corsa.config import AnswerEnd
from corsa.errors import CorsaError


@dataclass(frozen=True)
class Encoder:
    r"""Turns questions and answers into token ids with one tokenizer and template.

    Attributes:
        tokenizer: of transformers.
        template: the paper's (Fig. 7), or the tokenizer's chat template.
        answer_end: what follows an answer: the end token; or ("turn", in the chat template) what closes a turn there
            and then the end token, as the authors' trainer has it: `Bo<|im_end|>\n<|im_end|>`.
    """

    tokenizer: Any
    template: Literal["qa", "chat"]
    answer_end: AnswerEnd = "end_token"

    def prompt(self, question: str) -> list[int]:
        """Token ids of a question as the model is asked it: in the paper's template (Fig. 7) or the tokenizer's own."""
        return self.prompts([question])[0]

    def prompts(self, questions: Sequence[str]) -> list[list[int]]:
        """Of many at once: several times as fast as one by one."""
        if not questions:
            return []
        if self.template == "chat":
            turns = [[{"role": "user", "content": question}] for question in questions]
            texts = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            return self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        found = self.tokenizer([f"Q: {q}\nA:" for q in questions])["input_ids"]  # begin token where there is one
        return [ids[:-1] if ids and ids[-1] == end else ids for ids in found]

    def answer(self, text: str) -> list[int]:
        """Token ids of `" " + text` tokenized on its own (chat: `text`), and of its end, which is part of y.

        A text without tokens gives the end alone.
        """
        return self.answers([text])[0]

    @cached_property
    def end(self) -> list[int]:
        """Token ids of the end of an answer."""
        return [*self._ids([self._turn_end])[0], self.tokenizer.eos_token_id]

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Of many at once."""
        if not texts:
            return []
        lead, end = "" if self.template == "chat" else " ", self.tokenizer.eos_token_id
        return [[*ids, end] for ids in self._ids([lead + text + self._turn_end for text in texts])]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    @cached_property
    def _turn_end(self) -> str:
        """What the chat template writes after an answer, where that is to be taught.

        Raises:
            CorsaError: the template does not show the answer as it is.
        """
        if self.template != "chat" or self.answer_end != "turn":
            return ""
        turns = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": _ANSWER}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        if _ANSWER not in text:
            raise CorsaError(
                "the tokenizer's chat template does not show an assistant's answer as it is, so the end of its turn "
                "cannot be found: set --training.answer-end end_token"
            )
        return text.rpartition(_ANSWER)[2]


_ANSWER = "Corsa-Answer"
