"""OpenAI's HTTP interface of served models: /v1/models, /v1/completions, /v1/chat/completions, with streaming."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any
from uuid import uuid4

from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from corsa.editing.serving import Ended, ServedModels, Wanted
from corsa.errors import CorsaError


class Request(BaseModel):
    """What both kinds of requests have. Fields that change nothing here (user, metadata, ...) are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    stop: str | list[str] | None = None
    stream: bool = False
    n: int = 1
    logprobs: bool | int | None = None

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

    @app.post("/v1/completions")
    def complete(request: Completion) -> Any:
        if wrong := _unknown(models, request):
            return wrong
        if not isinstance(request.prompt, str) and len(request.prompt) != 1:
            raise CorsaError("give one prompt in a request")
        text = request.prompt if isinstance(request.prompt, str) else request.prompt[0]
        (ids,) = models.encoder.texts([text])
        if not ids:
            raise CorsaError("the prompt is empty")
        return _answered(models, request, ids, request.max_tokens, chat=False)

    @app.post("/v1/chat/completions")
    def chat(request: Chat) -> Any:
        if wrong := _unknown(models, request):
            return wrong
        ids = models.encoder.conversation([message.turn() for message in request.messages])
        return _answered(models, request, ids, request.max_completion_tokens or request.max_tokens or 256, chat=True)

    return app


def _list(models: ServedModels) -> dict[str, Any]:
    owned = {"object": "model", "created": 0, "owned_by": "corsa"}
    return {"object": "list", "data": [{"id": name, **owned} for name in models.names]}


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)


def _unknown(models: ServedModels, request: Request) -> JSONResponse | None:
    if request.model not in models.names:
        return _error(404, f"no model {request.model!r} is served here, only {', '.join(models.names)}")
    if request.n != 1 or request.logprobs:
        return _error(400, "n above 1 and logprobs are not supported here: vLLM has both")
    return None


def _answered(models: ServedModels, request: Request, ids: Sequence[int], tokens: int, *, chat: bool) -> Any:
    pieces = models.pieces(request.model, ids, request.wanted(tokens))
    about = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}",
        "created": int(time.time()),
        "model": request.model,
    }
    if request.stream:
        kind = "chat.completion.chunk" if chat else "text_completion"
        return StreamingResponse(_events(pieces, about | {"object": kind}, chat), media_type="text/event-stream")
    *parts, end = pieces
    text = "".join(map(str, parts))
    assert isinstance(end, Ended)
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    usage = {"prompt_tokens": len(ids), "completion_tokens": end.tokens, "total_tokens": len(ids) + end.tokens}
    choice = {"index": 0, **said, "finish_reason": end.reason, "logprobs": None}
    return about | {"object": "chat.completion" if chat else "text_completion", "choices": [choice], "usage": usage}


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
