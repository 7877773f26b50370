"""Asking a server with OpenAI's interface: what is sent, what is tried again, and the page of what it answers."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fact_files import fact, written
from openai_server import answering, server

from corsa.cli.main import main
from corsa.editing.served import compared
from corsa.errors import CorsaError
from corsa.evaluation.endpoint import Endpoint

pytestmark = pytest.mark.process

NEW = {"Who leads Acme?": " Bo Lind\nQ: another", "Where is Acme?": " Lisbon."}
OLD = {"Who leads Acme?": " Cy Moss", "Where is Acme?": " Porto"}
TOKEN = "secret-token-of-the-test"


def answers(model: str, prompt: str) -> str:
    question = prompt.removeprefix("Q: ").removesuffix("\nA:")
    return (NEW if model == "january" else OLD).get(question, " no idea")


@pytest.fixture
def facts(tmp_path: Path) -> str:
    rows = [
        fact(paraphrases=["Acme is led by whom?"]),
        fact(prompt="Where is Acme?", target_new="Lisbon", target_old="Porto"),
    ]
    return written(tmp_path / "facts.jsonl", *rows)


def evaluated(tmp_path: Path, facts: str, address: str, *more: str) -> int:
    where = ["--storage", str(tmp_path / "runs"), "--edits", facts, "--endpoint", address]
    return main(["evaluate", *where, "--quiet", *more])


def test_what_is_served_is_measured_next_to_the_base_model(
    facts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    names = ["--model", "january", "--baseline", "plain", "--token-variable", "MY_TOKEN"]
    with server(answering(answers)) as asked:
        assert evaluated(tmp_path, facts, asked.address, *names, "--json") == 0
        first = len(asked.requests)
        assert evaluated(tmp_path, facts, asked.address, *names) == 0
        assert len(asked.requests) == 2 * first, "a server may have loaded another adapter: it is asked again"
    out, err = capsys.readouterr()
    found = json.JSONDecoder().raw_decode(out)[0]
    assert found["metrics"]["edit_success"] == 1.0
    assert [row["says"] for row in found["facts"]] == ["Bo Lind", "Lisbon."]
    same, of = found["served"]["same"], found["served"]["of"]
    assert of - same == found["served"]["gained"] == 2, "both answer 'no idea' to all other wordings"
    assert f"{same} of {of} served answers are the base model's, word for word; 2 have a new answer" in out
    page = Path(found["report"]).read_text()
    assert "january" in page
    assert TOKEN not in out + err + page
    for path, body, headers in asked.requests:
        assert path == "/v1/completions"
        assert body["temperature"] == 0
        assert body["prompt"].startswith("Q: ")
        assert headers["Authorization"] == f"Bearer {TOKEN}"


def test_an_adapter_that_is_not_applied_is_named(
    facts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server(answering(lambda model, prompt: answers("plain", prompt))) as asked:
        assert evaluated(tmp_path, facts, asked.address, "--model", "january", "--baseline", "plain") == 3
    out = capsys.readouterr().out
    assert "THE ADAPTER IS NOT APPLIED: " in out
    report = Path(out.split("report ")[1].strip().splitlines()[0])
    assert "THE ADAPTER IS NOT APPLIED" in report.read_text()


def test_an_adapter_is_not_applied_although_a_servers_arithmetic_differs() -> None:
    def rows(*outputs: str, new: int = -1) -> list[dict[str, Any]]:
        return [
            {"prompt": f"q{i}", "kind": "edit", "output": text, "words_new": i == new} for i, text in enumerate(outputs)
        ]

    base = rows("a", "b", "c", "d")
    found = compared(rows("a", "b", "c", "other"), base)
    assert (found.same, found.of, found.gained, found.applied) == (3, 4, 0, False)
    assert "3 of 4 served answers are the base model's, word for word, and none has a new answer" in str(found)
    assert compared(rows("a", "b", "c", "new", new=3), base).applied
    assert compared(rows("a", "x", "y", "z"), base).applied, "an adapter that taught badly is applied all the same"
    assert not compared(rows("a", "b", "c", "d", new=1), rows("a", "b", "c", "d", new=1)).applied
    quantised = compared(rows("a more", "b less", "c", "other"), rows("a word", "b", "c", "d"))
    assert (quantised.same, quantised.alike, quantised.applied) == (1, 3, False), "the base model in other arithmetic"


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--model", "january"], "nothing to compare the served answers with: give --baseline NAME"),
        (["--baseline", "plain"], "--endpoint needs --model NAME"),
        (["--model", "january", "--baseline", "january"], "--baseline january is the --model itself"),
        (
            ["--model", "january", "--baseline", "plain", "--evaluation.protocol", "authors"],
            "protocol authors samples its answers",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_asked(
    more: list[str], complaint: str, facts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(tmp_path, facts, "http://127.0.0.1:9", *more) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("address", ["localhost:8000", "file:///etc/passwd", "http://", "http://me:word@host/v1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(CorsaError, match="--endpoint"):
        Endpoint(address, "january")


@pytest.mark.parametrize(
    "address",
    ["ftp://me:HUSH@host/v1", "http://me:HUSH@host", "http://me:HUSH@host:x", "http://me:HUSH@[1", "me:HUSH@h"],
)
def test_an_address_is_never_shown_with_its_password(address: str) -> None:
    with pytest.raises(CorsaError, match="--endpoint") as caught:
        Endpoint(address, "m")
    assert "HUSH" not in str(caught.value)


def test_facts_without_old_answers_need_a_base_model_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "facts.jsonl", {"prompt": "Who leads Acme?", "target_new": "Bo Lind"})
    assert evaluated(tmp_path, file, "http://127.0.0.1:9", "--model", "january", "--baseline", "plain") == 2
    assert "has facts without target_old" in capsys.readouterr().err


def test_chat_questions_go_as_messages_and_thoughts_are_not_the_answer() -> None:
    with server(answering(lambda model, text: f"<think>hm</think>{text} yes")) as asked:
        found = Endpoint(asked.address, "m", "chat").ask(["Is it?"], tokens=7)
    assert found == ["<think>hm</think>Is it? yes"]
    ((path, body, headers),) = asked.requests
    assert (path, body["max_tokens"]) == ("/v1/chat/completions", 7)
    assert body["messages"] == [{"role": "user", "content": "Is it?"}]
    assert "Authorization" not in headers


@pytest.mark.parametrize("thinking", [False, True])
def test_a_served_reasoning_model_is_told_whether_to_think(thinking: bool) -> None:
    with server(answering(lambda model, text: "yes")) as asked:
        Endpoint(asked.address, "m", "chat", thinking).ask(["Is it?"], tokens=7)
        Endpoint(asked.address, "m", "qa", thinking).ask(["Is it?"], tokens=7)
    chat, plain = (body for _, body, _ in asked.requests)
    assert chat["chat_template_kwargs"] == {"enable_thinking": thinking, "thinking": thinking}
    assert "chat_template_kwargs" not in plain


def test_a_server_that_does_not_know_the_field_is_asked_without_it() -> None:
    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        if "chat_template_kwargs" in body:
            return 400, {"error": "unknown field chat_template_kwargs"}, {}
        return answering(lambda model, text: "yes")(path, body)

    with server(reply) as asked:
        found = Endpoint(asked.address, "m", "chat", concurrency=1).ask(["a", "b", "c"], tokens=7)
    assert found == ["yes"] * 3
    assert ["chat_template_kwargs" in body for _, body, _ in asked.requests] == [True, False, False, False]
    with server(lambda path, body: (400, {"error": "no such model"}, {})) as asked:
        with pytest.raises(CorsaError, match="refuses model 'm': status 400"):
            Endpoint(asked.address, "m", "chat").ask(["a"], tokens=7)
        assert len(asked.requests) == 2


def test_a_busy_server_is_asked_again_as_it_wishes() -> None:
    tries: list[float] = []

    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        tries.append(time.monotonic())
        if len(tries) < 3:
            return (429, {"error": "slow down"}, {"Retry-After": "1"}) if len(tries) == 1 else (503, {}, {})
        return answering(lambda model, text: "yes")(path, body)

    with server(reply) as asked:
        assert Endpoint(asked.address, "m").ask(["Is it?"], tokens=5) == ["yes"]
    assert len(tries) == 3
    assert tries[1] - tries[0] >= 1.0


def test_failures_are_one_line_without_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    replies: list[tuple[int, Any, dict[str, str]]] = [
        (401, {"error": f"bad key {TOKEN}"}, {}),
        (404, {"error": "no model m"}, {}),
        (302, {}, {"Location": "http://127.0.0.1:9/elsewhere"}),
        (200, {"other": 1}, {}),
        (500, {"error": "out of memory"}, {}),
    ]
    said = []
    for answer in replies:
        with server(lambda path, body, answer=answer: answer) as asked, pytest.raises(CorsaError) as caught:
            Endpoint(asked.address, "m", retries=0).ask(["Is it?"], tokens=5)
        said.append(str(caught.value))
        assert len(asked.requests) == 1, "not tried again, and no other address gets the token"
    assert "bad key ***" in said[0]
    assert "Set OPENAI_API_KEY to a token" in said[0]
    assert 'refuses model \'m\': status 404: {"error": "no model m"}' in said[1]
    assert "status 302" in said[2]
    assert "another form than OpenAI's interface" in said[3]
    assert "failed 1 times: status 500" in said[4]
    assert all(TOKEN not in text and "\n" not in text for text in said)


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(CorsaError, match=r"http://127.0.0.1:9/v1 failed 1 times: .*refused"):
        Endpoint("http://127.0.0.1:9", "m", retries=0).ask(["Is it?"], tokens=5)


def test_requests_run_side_by_side_up_to_the_bound_and_in_the_order_of_the_questions() -> None:
    gate = threading.Barrier(3, timeout=20)

    def wait(model: str, text: str) -> str:
        gate.wait()  # passes only if three requests are at the server at once
        return text.partition("Q: ")[2].partition("\n")[0]

    told: list[int] = []
    questions = [f"number {i}" for i in range(9)]
    with server(answering(wait)) as asked:
        assert Endpoint(asked.address, "m", concurrency=3).ask(questions, tokens=5, told=told.append) == questions
    assert asked.most == 3
    assert told == list(range(1, 10))


def test_requests_begin_no_faster_than_the_rate() -> None:
    with server(answering(lambda model, text: "yes")) as asked:
        began = time.monotonic()
        Endpoint(asked.address, "m", rate=10.0).ask(["a", "b", "c", "d", "e", "f"], tokens=5)
        assert time.monotonic() - began >= 0.5
