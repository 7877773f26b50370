"""How a model is asked: from the text of a question and an answer to token ids, with one tokenizer and template; and
back, from generated token ids to the answer in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from corsa.config import AnswerEnd
from corsa.errors import CorsaError

OPEN, CLOSE = "<think>", "</think>"
"""What reasoning models write around their thoughts."""


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

    def prompt(self, question: str, thinking: bool = False) -> list[int]:
        """Token ids of a question as the model is asked it: in the paper's template (Fig. 7) or the tokenizer's own."""
        return self.prompts([question], thinking)[0]

    def prompts(self, questions: Sequence[str], thinking: bool = False) -> list[list[int]]:
        """Of many at once: several times as fast as one by one.

        `thinking`: the model may think before it answers. Otherwise the chat template is told not to let it, and
        thoughts that the template opens all the same are closed at once.

        Raises:
            CorsaError: `thinking`, and the template knows nothing of it.
        """
        if not questions:
            return []
        if thinking and not self._knows_thinking:
            raise CorsaError(
                "the chat template of this model knows no thinking (it has neither enable_thinking nor <think>): "
                "leave --evaluation.thinking out"
            )
        if self.template == "chat":
            texts = self._turns(questions, thinking)
            if not thinking and self._opened[False]:
                texts = [f"{text.rstrip()}\n\n{CLOSE}\n\n" for text in texts]
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

    def read(self, ids: Sequence[int], thinking: bool = False) -> str:
        """The answer in generated token ids, without special tokens and without what the model thought before it.

        `thinking`: as the prompt was made. Thoughts that do not end leave no answer: "".
        """
        opened = self.template == "chat" and thinking and self._opened[True]
        first, last = self._thought_tokens
        ids = list(ids)
        if last is not None and last in ids:  # by token first: where they are special, decoding drops the marks alone
            ids, opened = ids[len(ids) - ids[::-1].index(last) :], False
        if first is not None and first in ids:
            ids = ids[: ids.index(first)]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return without_thoughts(f"{OPEN}{text}" if opened else text)

    def _turns(self, questions: Sequence[str], thinking: bool) -> list[str]:
        if not self.tokenizer.chat_template:
            raise CorsaError("the tokenizer of this model has no chat template: use --template qa")
        turns = [[{"role": "user", "content": question}] for question in questions]
        how = {"enable_thinking": thinking, "thinking": thinking}  # Qwen's, GLM's, SmolLM's; DeepSeek's, Granite's
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **how)

    @cached_property
    def _opened(self) -> dict[bool, bool]:
        """Whether a prompt ends inside of thoughts, with thinking off and on."""
        prompts = {thinking: self._turns(["?"], thinking)[0] for thinking in (False, True)}
        return {thinking: prompt.rfind(OPEN) > prompt.rfind(CLOSE) for thinking, prompt in prompts.items()}

    @cached_property
    def _knows_thinking(self) -> bool:
        """Whether the chat template says anything of thinking."""
        template = self.tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template or ""]
        return self.template == "chat" and any("thinking" in text or OPEN in text for text in texts)

    @cached_property
    def _thought_tokens(self) -> tuple[int | None, int | None]:
        """The tokens that open and close thoughts, where the tokenizer has them."""
        known = self.tokenizer.get_added_vocab()
        return known.get(OPEN), known.get(CLOSE)


_ANSWER = "Corsa-Answer"


def without_thoughts(text: str) -> str:
    """What stands after the thoughts in a text; of thoughts that do not end nothing is left.

    >>> without_thoughts("<think>Paris? No.</think>Rome"), without_thoughts("<think>Paris"), without_thoughts("Rome")
    ('Rome', '', 'Rome')
    """
    return text.rpartition(CLOSE)[2].partition(OPEN)[0]
