"""Asks a server with OpenAI's interface (vLLM, llama.cpp, Ollama, LM Studio, hosted ones) questions, many at a time.

Questions in the paper's template go to `/completions` as text, since there the prompt is what was taught. Questions in
the chat template go to `/chat/completions`, where the server applies its own.
"""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, Literal
from urllib.parse import urlsplit

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from corsa.errors import CorsaError
from corsa.terminal import without_user

_LARGEST = 1 << 22  # bytes of an answer
_LATER = (408, 409, 425, 429, 500, 502, 503, 504)
_BACKOFF = wait_exponential(multiplier=0.5, max=30) + wait_random(0, 0.5)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another address must not get the token."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _UnknownFieldError(CorsaError):
    """The server refuses a request, perhaps for a field that it does not know."""


class _LaterError(Exception):
    """A failure that may pass. `wait`: seconds that the server asks for; None if it does not say."""

    def __init__(self, cause: str, wait: float | None = None) -> None:
        super().__init__(cause)
        self.wait = wait


@dataclass
class Endpoint:
    """A model on a server.

    Attributes:
        address: base URL, such as http://localhost:8000/v1; `/v1` is added to an address without a path.
        model: its name on the server.
        template: "qa" or "chat".
        thinking: in the chat template, whether a reasoning model may think. The server is told by
            `chat_template_kwargs` (vLLM, SGLang, llama.cpp), and is asked without it if it refuses this field.
        concurrency: requests at a time.
        rate: requests begun per second at most; None: no limit.
        retries: further tries of a request that fails (connection, timeout, status 408, 429, 5xx).
        token_variable: environment variable with the token, if the server wants one. It is never shown.
        timeout: seconds for one request.

    Raises:
        CorsaError: the address is no http or https URL.
    """

    address: str
    model: str
    template: Literal["qa", "chat"] = "qa"
    thinking: bool = False
    concurrency: int = 8
    rate: float | None = None
    retries: int = 5
    token_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    _began: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        self.address = checked_address(self.address)
        self._lock = threading.Lock()
        self._knows_thinking = True
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(
        self,
        questions: Sequence[str],
        *,
        tokens: int,
        lines: bool = False,
        told: Callable[[int], None] = lambda done: None,
    ) -> list[str]:
        """The greedy answer to each question, as the server gives it.

        Args:
            questions: without a template.
            tokens: most tokens of an answer.
            lines: an answer may have several lines.
            told: called with the number of answered questions.

        Raises:
            CorsaError: the server cannot be reached, refuses, or answers in another form.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            places = {pool.submit(self._asked, text, tokens, lines): i for i, text in enumerate(questions)}
            answers = [""] * len(questions)
            try:
                for done, future in enumerate(as_completed(places), start=1):
                    answers[places[future]] = future.result()
                    told(done)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return answers

    def _asked(self, question: str, tokens: int, lines: bool) -> str:
        body: dict[str, Any] = {"model": self.model, "max_tokens": tokens, "temperature": 0}
        if self.template == "chat":
            path, body["messages"] = "chat/completions", [{"role": "user", "content": question}]
        else:
            path, body["prompt"] = "completions", f"Q: {question}\nA:"
            body |= {} if lines else {"stop": ["\n"]}
        found = self._told_about_thinking(path, body) if self.template == "chat" else self._posted(path, body)
        try:
            choice = found["choices"][0]
            text = choice["message"]["content"] if self.template == "chat" else choice["text"]
        except (KeyError, IndexError, TypeError):
            raise CorsaError(f"{self.address}/{path} answers in another form than OpenAI's interface") from None
        return text or ""

    def _told_about_thinking(self, path: str, body: dict[str, Any]) -> Any:
        """As `_posted`, with the field that switches thinking on or off, if the server takes it."""
        if self._knows_thinking:
            how = {"enable_thinking": self.thinking, "thinking": self.thinking}
            try:
                return self._posted(path, body | {"chat_template_kwargs": how})
            except _UnknownFieldError:
                found = self._posted(path, body)
                self._knows_thinking = False
                return found
        return self._posted(path, body)

    def _posted(self, path: str, body: dict[str, Any]) -> Any:
        tries = Retrying(
            stop=stop_after_attempt(1 + self.retries),
            wait=_wait,
            retry=retry_if_exception(lambda error: isinstance(error, _LaterError)),
            reraise=True,
        )
        try:
            return tries(self._once, path, json.dumps(body).encode())
        except _LaterError as error:
            raise CorsaError(
                f"{self.address} failed {1 + self.retries} times: {error}. Is the server running?"
            ) from None

    def _once(self, path: str, body: bytes) -> Any:
        self._wait_for_turn()
        token = os.environ.get(self.token_variable, "")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        request = urllib.request.Request(f"{self.address}/{path}", data=body, headers=headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                return json.loads(answer.read(_LARGEST))
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(2000).decode(errors="replace").split())[:300]
            said = said.replace(token, "***") if token else said
            cause = f"status {error.code}: {said or error.reason}"
            if error.code in _LATER:
                raise _LaterError(cause, _seconds(error.headers.get("Retry-After"))) from None
            hint = f" Set {self.token_variable} to a token" if error.code in (401, 403) else ""
            kind = _UnknownFieldError if error.code in (400, 422) else CorsaError
            raise kind(f"{self.address}/{path} refuses model {self.model!r}: {cause}.{hint}") from None
        except (OSError, HTTPException) as error:  # URLError is an OSError
            raise _LaterError(str(getattr(error, "reason", error)) or type(error).__name__) from None
        except ValueError:
            raise CorsaError(f"{self.address}/{path} does not answer with JSON") from None

    def _wait_for_turn(self) -> None:
        if not self.rate:
            return
        with self._lock:  # each request takes the next place in time
            now = time.monotonic()
            self._began = max(now, self._began + 1 / self.rate)
            wait = self._began - now
        time.sleep(wait)


def checked_address(address: str) -> str:
    """The base URL without a slash at its end; with `/v1` if it has no path.

    Raises:
        CorsaError: it is no http or https URL, or holds a password.

    >>> checked_address("http://localhost:8000"), checked_address("https://host/api/v1/")
    ('http://localhost:8000/v1', 'https://host/api/v1')
    """
    try:
        parts, port = urlsplit(address), urlsplit(address).port
    except ValueError:  # a port or an IPv6 address that is none
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise CorsaError(
            f"--endpoint {without_user(address)} is no http or https address: such as http://localhost:8000/v1"
        )
    if parts.username or parts.password or parts.query:
        raise CorsaError("--endpoint takes no password and no query: put the token into an environment variable")
    return address.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait if isinstance(error, _LaterError) else None
    return _BACKOFF(state) if asked is None else min(asked, 60.0)


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; None for a date or nothing."""
    return float(text) if text and text.isdigit() else None
