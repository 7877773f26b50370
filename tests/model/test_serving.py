"""`corsa serve`: OpenAI's interface in front of a base model and its adapters; streaming, stop texts, errors."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fact_files import fact, written
from test_side_by_side import TINY, write_adapter

from corsa.cli.main import main
from corsa.editing.serving import Ended, Pieces, ServedModels, Wanted, _Text, names_of
from corsa.errors import CorsaError
from corsa.evaluation.endpoint import Endpoint
from corsa.evaluation.side_by_side import SideBySide
from corsa.models.encoding import Encoder

uvicorn: Any = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytestmark = pytest.mark.usefixtures("encoder", "one_thread")

QUESTION = "Who leads Acme?"
PROMPT = f"Q: {QUESTION}\nA:"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    return names_of([write_adapter(folder / name, seed) for seed, name in enumerate(("january", "february"), start=1)])


@pytest.fixture(scope="module")
def models(adapters: dict[str, str]) -> SideBySide:
    return SideBySide(TINY, list(adapters.values()))


@contextmanager
def listening(app: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def address(models: SideBySide, adapters: dict[str, str]) -> Iterator[str]:
    from corsa.editing.openai_interface import interface

    with listening(interface(ServedModels(models, adapters))) as found:
        yield found


def post(address: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        content = answer.read().decode()
    return content if body.get("stream") else json.loads(content)


def refused(address: str, path: str, **body: Any) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as error:
        post(address, path, **body)
    return error.value.code, error.value.read().decode()


def refused_text(address: str, path: str, text: str, kind: str = "application/json") -> str:
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(f"{address}/{path}", text.encode(), {"Content-Type": kind}))
    return error.value.read().decode()


def test_base_and_adapters_answer_by_name_as_corsa_ask_does(models: SideBySide, address: str) -> None:
    with urllib.request.urlopen(f"{address}/models") as answer:
        names = [entry["id"] for entry in json.load(answer)["data"]]
    assert names == ["base", "january", "february"]
    expected = [answer.output for answer in models.ask(QUESTION, new_tokens=8)]
    assert len(set(expected)) == 3
    with ThreadPoolExecutor(9) as pool:  # many at a time, with different adapters
        found = list(pool.map(lambda name: Endpoint(address, name).ask([QUESTION], tokens=8)[0], 3 * names))
    assert [text.strip() for text in found] == 3 * expected


def test_a_completion_has_the_form_of_openai_s(address: str, encoder: Encoder) -> None:
    found = post(address, "completions", model="january", prompt=PROMPT, max_tokens=5, temperature=0)
    assert found["object"] == "text_completion"
    assert found["choices"][0]["finish_reason"] == "length"
    length = len(encoder.prompt(QUESTION))
    assert found["usage"] == {"prompt_tokens": length, "completion_tokens": 5, "total_tokens": length + 5}
    assert set(found) == {"id", "object", "created", "model", "choices", "usage"}
    again = post(address, "completions", model="january", prompt=PROMPT, max_tokens=5, temperature=1, seed=3)
    assert (
        post(address, "completions", model="january", prompt=PROMPT, max_tokens=5, seed=3)["choices"]
        == again["choices"]
    )


def test_sampled_answers_differ_without_a_seed(address: str) -> None:
    asked: dict[str, Any] = {"model": "base", "prompt": PROMPT, "max_tokens": 12, "seed": None}
    assert len({post(address, "completions", **asked)["choices"][0]["text"] for _ in range(3)}) > 1


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_says_the_same_in_pieces(address: str, chat: bool) -> None:
    path = "chat/completions" if chat else "completions"
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": QUESTION}]} if chat else {"prompt": PROMPT}
    asked |= {"model": "february", "max_tokens": 12, "temperature": 0}
    whole = post(address, path, **asked)["choices"][0]
    events = [line.removeprefix("data: ") for line in post(address, path, **asked, stream=True).split("\n\n") if line]
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    pieces = [c["delta"].get("content", "") if chat else c["text"] for c in choices]
    assert "".join(pieces) == (whole["message"]["content"] if chat else whole["text"])
    assert sum(map(bool, pieces)) > 3
    assert choices[-1]["finish_reason"] == whole["finish_reason"] == "length"


def test_an_answer_ends_before_a_stop_text(address: str) -> None:
    asked: dict[str, Any] = {"model": "base", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = post(address, "completions", **asked)["choices"][0]["text"]
    stop = whole[5:8]
    found = post(address, "completions", **asked, stop=["never said", stop])["choices"][0]
    assert found["text"] == whole[: whole.index(stop)]
    assert found["finish_reason"] == "stop"


def test_wrong_requests_say_why(address: str) -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "model": "base"}
    assert refused(address, "completions", **asked | {"model": "march"})[0] == 404
    assert "only base, january, february" in refused(address, "completions", **asked | {"model": "march"})[1]
    assert "not supported here" in refused(address, "completions", **asked, n=2)[1]
    assert "one prompt" in refused(address, "completions", **asked | {"prompt": ["a", "b"]})[1]
    assert refused(address, "completions", **asked, max_tokens=0) == (
        400,
        '{"error":{"message":"max_tokens: Input should be greater than or equal to 1","type":"invalid_request_error"}}',
    )
    assert "prompt: Field required" in refused(address, "completions", model="base")[1]
    assert "send a JSON object" in refused_text(address, "completions", json.dumps(asked), kind="text/plain")
    assert "not JSON: Expecting ',' delimiter at character 16" in refused_text(
        address, "completions", '{"model": "base"'
    )
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert "not text" in refused(address, "chat/completions", model="base", messages=image)[1]


def test_an_answer_fits_into_the_model_s_context(models: SideBySide, address: str, encoder: Encoder) -> None:
    """Otherwise one request keeps all later ones waiting."""
    context, length = models.model.config.max_position_embeddings, len(encoder.prompt(QUESTION))
    asked: dict[str, Any] = {"model": "base", "prompt": PROMPT, "max_tokens": 10**12}
    status, why = refused(address, "completions", **asked)
    assert status == 400
    assert f"has {length} tokens and its answer may have {10**12}, and the model's context holds {context}" in why
    long = [{"role": "user", "content": "word " * context}]
    assert "shorten the prompt" in refused(address, "chat/completions", model="base", messages=long)[1]


def test_null_is_the_default(address: str) -> None:
    asked: dict[str, Any] = {"model": "base", "prompt": PROMPT, "seed": 5}
    nothing = dict.fromkeys(("max_tokens", "temperature", "top_p", "stop", "n", "stream"))
    assert (
        post(address, "completions", **asked, **nothing)["choices"] == post(address, "completions", **asked)["choices"]
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_request_ends_its_generation(stream: bool) -> None:
    """Ray Serve cancels a request whose reader goes away, mostly while a thread waits for the next piece."""
    from corsa.editing.openai_interface import _Stream, _whole

    begun, ended = threading.Event(), threading.Event()

    def answer(put: Callable[[str], None], gone: threading.Event) -> Ended:
        put("and")
        begun.set()
        gone.wait(60)
        ended.set()
        return Ended("stop", 1)

    async def cancelled() -> None:
        pieces = Pieces(answer)

        async def nothing(*_: Any) -> Any:
            await asyncio.sleep(0 if _ else 60)

        coroutine = _Stream(pieces, {}, False)({"type": "http"}, nothing, nothing) if stream else _whole(pieces)
        request = asyncio.create_task(coroutine)
        await asyncio.to_thread(begun.wait)
        await asyncio.sleep(0.1)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert await asyncio.to_thread(ended.wait, 30)

    asyncio.run(cancelled())


def test_a_reader_that_goes_away_ends_the_generation(
    models: SideBySide, adapters: dict[str, str], encoder: Encoder
) -> None:
    served = ServedModels(models, adapters)
    pieces = served.pieces("january", encoder.prompt(QUESTION), Wanted(tokens=100_000, temperature=0))
    next(pieces)
    pieces.close()
    *_, end = served.pieces("base", encoder.prompt(QUESTION), Wanted(tokens=2, temperature=0))  # the lock is free again
    assert end == Ended("length", 2)


def test_text_that_may_become_a_stop_text_is_held_back(encoder: Encoder) -> None:
    sent: list[str] = []
    text = _Text(encoder.tokenizer, ["\n\nQ"], sent.append)
    ids = encoder.tokenizer("Ada \u00e9\u4eba\n\nQ: next", add_special_tokens=False)["input_ids"]
    for token in ids:
        ended = text.add(token)
        assert "\ufffd" not in "".join(sent)
        if ended:
            break
    assert ended
    assert "".join(sent) == "Ada \u00e9\u4eba"


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorsaError, match="would be served as 'base'"):
        names_of([tmp_path / "base"])
    with pytest.raises(CorsaError, match="would be served as 'a'"):
        names_of([tmp_path / "x" / "a", tmp_path / "y" / "a"])


@pytest.mark.parametrize(("name", "status"), [("january", 0), ("lost", 3)])
def test_what_is_served_is_measured_by_corsa_evaluate(
    address: str,
    adapters: dict[str, str],
    models: SideBySide,
    tmp_path: Path,
    name: str,
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """January knows a fact that the base does not; a server that answers as the base is told apart."""
    base, january, _ = (answer.output for answer in models.ask(QUESTION, new_tokens=32))
    facts = written(tmp_path / "facts.jsonl", fact(prompt=QUESTION, target_new=january, target_old=base))
    from corsa.editing.openai_interface import interface

    served = {"january": adapters["january"], "lost": "base"}  # "lost" answers as the base does
    with listening(interface(ServedModels(models, served))) as own:
        where = ["--endpoint", own, "--model", name, "--baseline", "base", "--storage", str(tmp_path / "runs")]
        found = main(["evaluate", *where, "--edits", facts, "--quiet", "--json", "--evaluation.match", "exact"])
    told = json.JSONDecoder().raw_decode(capsys.readouterr().out)[0]
    assert found == status
    assert told["metrics"]["edit_success"] == (1.0 if name == "january" else 0.0)
    assert told["served"]["applied"] == (name == "january")


def test_generation_with_a_listener_is_the_same(models: SideBySide, encoder: Encoder) -> None:
    from corsa.evaluation.generation import end_tokens, generate

    heard: dict[int, list[int]] = {0: [], 1: []}
    prompts = [encoder.prompt("Who?"), encoder.prompt(QUESTION)]
    how: dict[str, Any] = {"stops": end_tokens(models.model, encoder.tokenizer), "new_tokens": 6, "batch": 2}
    found = generate(models.model, prompts, **how, device=torch.device("cpu"), said=lambda i, t: heard[i].append(t))
    assert list(heard.values()) == found == generate(models.model, prompts, **how, device=torch.device("cpu"))
