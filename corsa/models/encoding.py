"""Encodes questions and answers as token ids, with one tokenizer and template, and decodes the answer from generated
token ids.

If the text of a fact contains a special token (`<|im_end|>`), it is split into plain tokens. Only the template and this
module set special tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from corsa.config import AnswerEnd
from corsa.data.text import shown
from corsa.errors import CorsaError
from corsa.models.templates import render

OPEN, CLOSE = "<think>", "</think>"
"""The marks that reasoning models write around their thoughts."""


@dataclass(frozen=True)
class Encoder:
    r"""Turns questions and answers into token ids with one tokenizer and template.

    Attributes:
        tokenizer: a transformers tokenizer.
        template: the paper's (Fig. 7), or the tokenizer's chat template.
        answer_end: what follows an answer: the end token; or ("turn", in the chat template) the end of the turn and
            then the end token, as in the authors' trainer: `Bo<|im_end|>\n<|im_end|>`.
    """

    tokenizer: Any
    template: Literal["qa", "chat"]
    answer_end: AnswerEnd = "end_token"

    def __post_init__(self) -> None:
        if self.template == "chat" and not self.tokenizer.chat_template:
            raise CorsaError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no chat template: use --template qa, or name a "
                "model that was trained to chat"
            )

    @cached_property
    def special(self) -> tuple[str, ...]:
        """The texts of the tokenizer's special tokens."""
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in added if token.special)

    def prompt(self, question: str, thinking: bool = False) -> list[int]:
        """Token ids of a question in the paper's template (Fig. 7) or the tokenizer's chat template."""
        return self.prompts([question], thinking)[0]

    def prompts(self, questions: Sequence[str], thinking: bool = False) -> list[list[int]]:
        """Token ids of many questions (see `prompt`), several times faster than one by one.

        `thinking`: the model may think before it answers. Otherwise, the chat template is told to disable thinking; if
        it opens thoughts anyway, they are closed at once.

        Raises:
            CorsaError: `thinking` is set, and the template does not support it.
        """
        if not questions:
            return []
        if thinking and not self._knows_thinking:
            raise CorsaError(
                "the chat template of this model does not support thinking (it has neither enable_thinking nor "
                "<think>): leave --evaluation.thinking out"
            )
        if self.template == "chat":
            return self._chats(questions, thinking)
        return self.texts([f"Q: {question}\nA:" for question in questions])

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that a model shall go on from, with a begin token if the tokenizer has one. Special tokens
        in them are plain text.
        """
        end = self.tokenizer.eos_token_id
        found = self.tokenizer(list(texts), split_special_tokens=True)["input_ids"]
        return [ids[:-1] if ids and ids[-1] == end else ids for ids in found]

    def conversation(self, turns: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation in the chat template, up to the assistant's next turn, with thinking disabled.

        Args:
            turns: messages {role, content}.

        Raises:
            CorsaError: the tokenizer has no chat template, a message contains a special token, or the template refuses
                the roles.
        """
        chat = replace(self, template="chat", answer_end="end_token")
        if len(turns) == 1 and turns[0]["role"] == "user":
            return chat.prompt(turns[0]["content"])
        if found := next((turn["content"] for turn in turns if self._has_special(turn["content"])), None):
            raise CorsaError(f"{shown(found)!r} contains a special token: write it without")
        how = {"enable_thinking": False, "thinking": False}
        (text,) = render(self.tokenizer, [list(turns)], add_generation_prompt=True, **how)
        if text.rfind(OPEN) > text.rfind(CLOSE):
            text = f"{text.rstrip()}\n\n{CLOSE}\n\n"
        return self._ids([text])[0]

    def _chats(self, questions: Sequence[str], thinking: bool) -> list[list[int]]:
        texts = self._turns(questions, thinking)
        if not thinking and self._opened[False]:
            texts = [f"{text.rstrip()}\n\n{CLOSE}\n\n" for text in texts]
        found = self._ids(texts)
        for i, question in enumerate(questions):
            if self._has_special(question):
                before, at, after = texts[i].rpartition(question)
                if not at:
                    raise CorsaError(
                        f"{shown(question)!r} contains a special token, and the chat template of "
                        f"{self.tokenizer.name_or_path} changes the question: write it without"
                    )
                found[i] = [*self._ids([before])[0], *self._plain_ids(question), *self._ids([after])[0]]
        return found

    def answer(self, text: str) -> list[int]:
        """Token ids of `" " + text` (chat: `text`), tokenized separately, and of its end, which is part of y.

        A text without tokens gives only the end.
        """
        return self.answers([text])[0]

    @cached_property
    def end(self) -> list[int]:
        """Token ids of the end of an answer."""
        return [*self._ids([self._turn_end])[0], self.tokenizer.eos_token_id]

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many answers (see `answer`)."""
        if not texts:
            return []
        lead, end = "" if self.template == "chat" else " ", self.tokenizer.eos_token_id
        found = self._ids([lead + text + self._turn_end for text in texts])
        for i, text in enumerate(texts):
            if self._has_special(text):
                found[i] = [*self._plain_ids(lead + text), *self._ids([self._turn_end])[0]]
        return [[*ids, end] for ids in found]

    def _has_special(self, text: str) -> bool:
        return any(token in text for token in self.special)

    def _plain_ids(self, text: str) -> list[int]:
        """Token ids of a text in which special tokens are plain text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    @cached_property
    def _turn_end(self) -> str:
        """The text that the chat template writes after an answer; "" if it is not taught.

        Raises:
            CorsaError: the template changes the text of the answer.
        """
        if self.template != "chat" or self.answer_end != "turn":
            return ""
        turns = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": _ANSWER}]
        (text,) = render(self.tokenizer, [turns], add_generation_prompt=False)
        if _ANSWER not in text:
            raise CorsaError(
                "the tokenizer's chat template does not show an assistant's answer as it is, so the end of its turn "
                "cannot be found: set --training.answer-end end_token"
            )
        return text.rpartition(_ANSWER)[2]

    def read(self, ids: Sequence[int], thinking: bool = False) -> str:
        """The answer in generated token ids, without special tokens and without thoughts.

        `thinking`: the value used for the prompt. If the thoughts do not end, the answer is "".
        """
        opened = self.template == "chat" and thinking and self._opened[True]
        first, last = self._thought_tokens
        ids = list(ids)
        if last is not None and last in ids:  # by token first: if the marks are special, decoding drops only them
            ids, opened = ids[len(ids) - ids[::-1].index(last) :], False
        if first is not None and first in ids:
            ids = ids[: ids.index(first)]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return without_thoughts(f"{OPEN}{text}" if opened else text)

    def _turns(self, questions: Sequence[str], thinking: bool) -> list[str]:
        turns = [[{"role": "user", "content": question}] for question in questions]
        how = {"enable_thinking": thinking, "thinking": thinking}  # Qwen's, GLM's, SmolLM's; DeepSeek's, Granite's
        return render(self.tokenizer, turns, add_generation_prompt=True, **how)

    @cached_property
    def _opened(self) -> dict[bool, bool]:
        """Whether a prompt ends inside thoughts, with thinking off and on."""
        prompts = {thinking: self._turns(["?"], thinking)[0] for thinking in (False, True)}
        return {thinking: prompt.rfind(OPEN) > prompt.rfind(CLOSE) for thinking, prompt in prompts.items()}

    @cached_property
    def _knows_thinking(self) -> bool:
        """Whether the chat template supports thinking."""
        template = self.tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template or ""]
        return self.template == "chat" and any("thinking" in text or OPEN in text for text in texts)

    @cached_property
    def _thought_tokens(self) -> tuple[int | None, int | None]:
        """The tokens that open and close thoughts; None if the tokenizer does not have them."""
        known = self.tokenizer.get_added_vocab()
        return known.get(OPEN), known.get(CLOSE)


_ANSWER = "Corsa-Answer"


def without_thoughts(text: str) -> str:
    """The text after the thoughts. Thoughts that do not end are removed.

    >>> without_thoughts("<think>Paris? No.</think>Rome"), without_thoughts("<think>Paris"), without_thoughts("Rome")
    ('Rome', '', 'Rome')
    """
    return text.rpartition(CLOSE)[2].partition(OPEN)[0]
