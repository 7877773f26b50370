"""A small server with OpenAI's interface, whose answers a test gives."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Asked:
    """What the server was asked: (path, body, headers) of each request; its address; the most requests at a time."""

    address: str = ""
    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    most: int = 0


Reply = Callable[[str, dict[str, Any]], tuple[int, Any, dict[str, str]]]
"""From a path and a body: status, JSON of the answer, headers."""


def answering(answers: Callable[[str, str], str]) -> Reply:
    """Replies to prompts and messages with `answers(model, text)`."""

    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        if path.endswith("/chat/completions"):
            text = answers(body["model"], body["messages"][-1]["content"])
            return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}, {}
        return 200, {"choices": [{"text": answers(body["model"], body["prompt"])}]}, {}

    return reply


@contextmanager
def server(reply: Reply) -> Iterator[Asked]:
    """The server, in a thread of its own."""
    asked, lock, now = Asked(), threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal now
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                now += 1
                asked.most = max(asked.most, now)
                asked.requests.append((self.path, body, dict(self.headers.items())))
            status, answer, headers = reply(self.path, body)
            with lock:
                now -= 1
            content = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    asked.address = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
