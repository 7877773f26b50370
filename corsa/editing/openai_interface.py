"""OpenAI's HTTP interface of served models: /v1/models, /v1/completions, /v1/chat/completions, with streaming."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from secrets import randbits
from typing import Annotated, Any
from uuid import uuid4

from fastapi import FastAPI
from fastapi.concurrency import iterate_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from corsa.editing.serving import Ended, Pieces, ServedModels, Wanted
from corsa.errors import CorsaError


class Request(BaseModel):
    """What both kinds of requests have. Fields that change nothing here (user, metadata, ...) are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0)] = Field(default_factory=lambda: randbits(32))  # sampled answers differ without it
    stop: str | list[str] | None = None
    stream: bool = False
    n: int = 1
    logprobs: bool | int | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, body: Any) -> Any:
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    def wanted(self, tokens: int) -> Wanted:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Wanted(tokens, self.temperature, self.top_p, self.seed, tuple(stop))


class Completion(Request):
    """A request to /v1/completions."""

    prompt: str | list[str]
    max_tokens: Annotated[int, Field(ge=1)] = 16


class Message(BaseModel):
    """A message of a conversation; its text may come in parts."""

    role: str
    content: str | list[dict[str, Any]]

    def turn(self) -> dict[str, str]:
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        if any(part.get("type") != "text" for part in self.content):
            raise CorsaError("a message has a part that is not text: only text is answered")
        return {"role": self.role, "content": "".join(str(part.get("text", "")) for part in self.content)}


class Chat(Request):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


def interface(models: ServedModels) -> FastAPI:
    """The application that answers for these models."""
    app = FastAPI(title="corsa serve")
    app.add_api_route("/v1/models", lambda: _list(models), methods=["GET"])

    @app.exception_handler(CorsaError)
    def refused(_: Any, error: CorsaError) -> JSONResponse:
        return _error(400, str(error))

    @app.exception_handler(RequestValidationError)
    def malformed(_: Any, error: RequestValidationError) -> JSONResponse:
        return _error(400, _complaint(error.errors()[0]))

    @app.post("/v1/completions")
    async def complete(request: Completion) -> Any:
        if wrong := _unknown(models, request):
            return wrong
        if not isinstance(request.prompt, str) and len(request.prompt) != 1:
            raise CorsaError("give one prompt in a request")
        text = request.prompt if isinstance(request.prompt, str) else request.prompt[0]
        (ids,) = models.encoder.texts([text])
        if not ids:
            raise CorsaError("the prompt is empty")
        return await _answered(models, request, ids, request.max_tokens, chat=False)

    @app.post("/v1/chat/completions")
    async def chat(request: Chat) -> Any:
        if wrong := _unknown(models, request):
            return wrong
        ids = models.encoder.conversation([message.turn() for message in request.messages])
        tokens = request.max_completion_tokens or request.max_tokens or min(256, max(models.context - len(ids), 1))
        return await _answered(models, request, ids, tokens, chat=True)

    return app


def _list(models: ServedModels) -> dict[str, Any]:
    owned = {"object": "model", "created": 0, "owned_by": "corsa"}
    return {"object": "list", "data": [{"id": name, **owned} for name in models.names]}


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)


def _complaint(error: dict[str, Any]) -> str:
    """What is wrong with a request: one of pydantic's errors, in a line."""
    if error["type"] == "json_invalid":
        return f"the request is not JSON: {error['ctx']['error']} at character {error['loc'][-1]}"
    if error["loc"] == ("body",):
        return "send a JSON object, with the header Content-Type: application/json"
    return f"{'.'.join(map(str, error['loc'][1:]))}: {error['msg']}"


def _unknown(models: ServedModels, request: Request) -> JSONResponse | None:
    if request.model not in models.names:
        return _error(404, f"no model {request.model!r} is served here, only {', '.join(models.names)}")
    if request.n != 1 or request.logprobs:
        return _error(400, "n above 1 and logprobs are not supported here: vLLM has both")
    return None


async def _answered(models: ServedModels, request: Request, ids: Sequence[int], tokens: int, *, chat: bool) -> Any:
    if len(ids) + tokens > models.context:
        raise CorsaError(
            f"the prompt has {len(ids)} tokens and its answer may have {tokens}, and the model's context holds "
            f"{models.context}: lower max_tokens or shorten the prompt"
        )
    pieces = models.pieces(request.model, ids, request.wanted(tokens))
    about = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}",
        "created": int(time.time()),
        "model": request.model,
    }
    if request.stream:
        kind = "chat.completion.chunk" if chat else "text_completion"
        return _Stream(pieces, about | {"object": kind}, chat)
    *parts, end = await _whole(pieces)
    text = "".join(map(str, parts))
    assert isinstance(end, Ended)
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    usage = {"prompt_tokens": len(ids), "completion_tokens": end.tokens, "total_tokens": len(ids) + end.tokens}
    choice = {"index": 0, **said, "finish_reason": end.reason, "logprobs": None}
    return about | {"object": "chat.completion" if chat else "text_completion", "choices": [choice], "usage": usage}


async def _whole(pieces: Pieces) -> list[str | Ended]:
    """All pieces of an answer. If its reader goes away, Ray Serve cancels this, and the generation ends."""
    try:
        return [piece async for piece in iterate_in_threadpool(pieces)]
    finally:
        pieces.close()


class _Stream(StreamingResponse):
    """Server-sent events. A reader that goes away ends the generation."""

    def __init__(self, pieces: Pieces, about: dict[str, Any], chat: bool) -> None:
        super().__init__(_events(pieces, about, chat), media_type="text/event-stream")
        self._pieces = pieces

    async def __call__(self, *connection: Any) -> None:
        try:
            await super().__call__(*connection)
        finally:
            self._pieces.close()


def _events(pieces: Iterator[str | Ended], about: dict[str, Any], chat: bool) -> Iterator[str]:
    """Server-sent events, one for each piece."""

    def event(said: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, **said, "finish_reason": reason, "logprobs": None}
        return f"data: {json.dumps(about | {'choices': [choice]})}\n\n"

    if chat:
        yield event({"delta": {"role": "assistant", "content": ""}})
    for piece in pieces:
        if isinstance(piece, Ended):
            yield event({"delta": {}} if chat else {"text": ""}, piece.reason)
        else:
            yield event({"delta": {"content": piece}} if chat else {"text": piece})
    yield "data: [DONE]\n\n"
