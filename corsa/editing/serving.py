"""A base model and its adapters behind OpenAI's interface, for trying out and for demos. vLLM is for production.

One request at a time: an adapter is attached to the base model for as long as it answers, so adapters are switched from
request to request and the base is loaded once.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from corsa.errors import CorsaError
from corsa.evaluation.generation import end_tokens, generate, sample
from corsa.evaluation.side_by_side import SideBySide
from corsa.lora.attached import attached
from corsa.models.encoding import without_thoughts

BASE = "base"


class Ended(NamedTuple):
    """The end of an answer: "stop" or "length", and its number of tokens."""

    reason: str
    tokens: int


@dataclass(frozen=True)
class Wanted:
    """How to answer. `temperature` 0 is greedy. The answer ends before the first text of `stop`."""

    tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


class _StoppedError(Exception):
    """Ends the generation."""


def names_of(adapters: Sequence[str | Path]) -> dict[str, str]:
    """The names under which adapters are served, {name of the directory: path}.

    Raises:
        CorsaError: two adapters have the same name, or one is called "base".
    """
    found: dict[str, str] = {}
    for path in adapters:
        name = Path(path).expanduser().absolute().name
        if name == BASE or name in found:
            raise CorsaError(f"two models would be served as {name!r}: rename the directory {path}")
        found[name] = str(path)
    return found


class Pieces(Iterator[str | Ended]):
    """The pieces of an answer while a thread generates it, and its end."""

    def __init__(self, answer: Callable[[Callable[[str], None], threading.Event], Ended]) -> None:
        self._queue: SimpleQueue[str | Ended | BaseException] = SimpleQueue()
        self._gone = threading.Event()
        self._ended = False
        threading.Thread(target=self._work, args=(answer,), daemon=True).start()

    def close(self) -> None:
        """Ends the generation, also while another thread waits for the next piece."""
        self._gone.set()

    def __next__(self) -> str | Ended:
        if self._ended:
            raise StopIteration
        piece = self._queue.get()
        self._ended = not isinstance(piece, str)
        if isinstance(piece, BaseException):
            raise piece
        return piece

    def _work(self, answer: Callable[[Callable[[str], None], threading.Event], Ended]) -> None:
        try:
            self._queue.put(answer(self._queue.put, self._gone))
        except BaseException as error:
            self._queue.put(error)


class ServedModels:
    """Answers of a base model ("base") and of adapters by their names."""

    def __init__(self, models: SideBySide, adapters: Mapping[str, str]) -> None:
        self._models = models
        self._changes = {BASE: models.changes[BASE]} | {name: models.changes[path] for name, path in adapters.items()}
        self._ends = end_tokens(models.model, models.encoder.tokenizer)
        self._lock = threading.Lock()
        self.encoder = models.encoder
        positions = getattr(models.model.config.get_text_config(), "max_position_embeddings", None)
        self.context: int = positions or sys.maxsize
        """Most tokens of a prompt and its answer."""

    @property
    def names(self) -> list[str]:
        return list(self._changes)

    def pieces(self, name: str, prompt: Sequence[int], wanted: Wanted) -> Pieces:
        """The answer of the model `name` to a prompt (token ids), piece by piece as it is generated, and its end."""
        return Pieces(lambda put, gone: self._answer(name, prompt, wanted, put, gone))

    def _answer(
        self, name: str, prompt: Sequence[int], wanted: Wanted, put: Callable[[str], None], gone: threading.Event
    ) -> Ended:
        told = _Text(self.encoder.tokenizer, wanted.stop, put)

        def said(_: int, token: int) -> None:
            if gone.is_set() or told.add(token):
                raise _StoppedError

        how: dict[str, Any] = {"stops": self._ends, "new_tokens": wanted.tokens, "batch": 1, "said": said}
        how["device"] = self._models.device
        model = self._models.model
        with self._lock, attached(model, self._changes[name]):
            try:
                if wanted.temperature:
                    drawn = {"temperature": wanted.temperature, "top_p": wanted.top_p, "seeds": [[wanted.seed]]}
                    sample(model, [prompt], **drawn, **how)
                else:
                    generate(model, [prompt], **how)
            except _StoppedError:
                return Ended("stop", len(told.ids))
        told.finish()
        return Ended("length" if len(told.ids) == wanted.tokens else "stop", len(told.ids))


class _Text:
    """The text of an answer while its tokens arrive. Text that may be the beginning of a stop text is held back."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], put: Callable[[str], None]) -> None:
        self.ids: list[int] = []
        self._tokenizer, self._stop, self._put, self._sent = tokenizer, [text for text in stop if text], put, 0
        self._held = max((len(text) - 1 for text in self._stop), default=0)

    def add(self, token: int) -> bool:
        """Adds a token. Whether the answer has ended with a stop text."""
        self.ids.append(token)
        text = self._text()
        ends = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if ends:
            self._send(text[: min(ends)])
        elif not text.endswith("\ufffd"):  # the bytes of a character are not complete yet
            self._send(text[: max(len(text) - self._held, 0)])
        return bool(ends)

    def finish(self) -> None:
        """Sends what is held back."""
        self._send(self._text())

    def _text(self) -> str:
        return without_thoughts(self._tokenizer.decode(self.ids, skip_special_tokens=True))

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            self._put(text[self._sent :])
            self._sent = len(text)
