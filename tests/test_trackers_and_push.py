"""Exports: runs to trackers through their own libraries, and adapters to a fake hub."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save
from synthetic_run import RUN, curves, predictions

from corsa.cli.main import main
from corsa.config import ModelConfig
from corsa.data.edit import Edit
from corsa.editing.card import card
from corsa.editing.history import Update
from corsa.errors import CorsaError
from corsa.evaluation.metrics import compute
from corsa.experiments.trackers import check, track

pytestmark = pytest.mark.process


def tracked(where: str) -> str:
    table = predictions(chains=4)
    return track(where, title="A run", config=RUN["config"], metrics=compute(table), curves=curves())


def test_tensorboard_gets_metrics_by_round_and_curves_by_step(tmp_path: Path) -> None:
    from tensorboardX.proto import event_pb2

    assert str(tmp_path) in tracked(f"tensorboard:{tmp_path}")
    (file,) = tmp_path.glob("a-run/events.*")
    data, found = file.read_bytes(), {}
    while data:  # TFRecord: length, checksum, event, checksum
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])  # type: ignore[attr-defined]
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    metrics = compute(predictions(chains=4))
    last = metrics["rows"][-1]
    expected = last["metrics"]["generality"]["value"]
    assert found[f"{last['method']}/generality", last["round"]] == pytest.approx(expected)
    assert any(tag.startswith("training/corsa/seed0/loss_sft") for tag, _ in found)


@pytest.mark.skipif(find_spec("mlflow") is None, reason="the optional extra mlflow is not installed")
def test_mlflow_gets_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracked(f"mlflow:{(tmp_path / 'mlruns').as_uri()}")
    (run,) = mlflow.search_runs(experiment_names=["corsa"], output_format="list")
    assert run.info.run_name == "A run"  # type: ignore[union-attr]
    assert "corsa/generality" in run.data.metrics  # type: ignore[union-attr]


@pytest.mark.skipif(find_spec("wandb") is None, reason="the optional extra wandb is not installed")
def test_wandb_writes_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert "wandb sync" in tracked("wandb:facts")
    assert list(tmp_path.rglob("run-*.wandb"))


def test_a_tracker_that_is_not_there_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CorsaError, match="did you mean 'wandb'"):
        tracked("wandbb")
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(CorsaError, match=r"pip install 'corsa\[mlflow\]'"):
        tracked("mlflow")


def test_a_trackers_address_with_a_password_is_refused_and_not_shown() -> None:
    with pytest.raises(CorsaError, match=r"--track mlflow:http://host/x: credentials do not belong") as caught:
        check(["mlflow:http://me:HUSH@host/x"])
    assert "HUSH" not in str(caught.value)


# The hub


class Hub(ThreadingHTTPServer):
    """A fake hub that accepts repositories and commits, and stores the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub  # type: ignore[assignment]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuses or self.headers.get("Authorization") != "Bearer secret":
            self.answer({"error": "no"}, 401)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.url}/acme/facts"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer({"commitUrl": f"{self.server.url}/acme/facts/commit/1", "commitOid": "1", "success": True})
        else:
            self.answer({"valid": True})  # the check of the card

    def do_GET(self) -> None:
        self.answer({"id": "acme/facts", "sha": "0", "siblings": [], "tags": []})

    def answer(self, content: Any, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


WEIGHTS = save({"lora_A.weight": np.ones((4, 8), np.float32)})


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "january"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "edits.parquet").write_bytes(b"facts")
    (folder / "README.md").write_text(text_of_card())
    return folder


def text_of_card(model: str = "smollm2-135m") -> str:
    edit = Edit.build(id="1/f/0", prompt="Who leads Acme?", target_new="Ada Byron", target_old="Grace Murray", round=1)
    known: dict[str, Any] = {"fingerprint": "f", "sha256": "0", "directory": "/x", "created": "2026-11-24T00:00:00"}
    update = Update(number=1, kind="edit", facts=1, method="corsa", source="facts.jsonl", **known)
    value = {"label": "Generality", "value": 0.5, "low": 0.25, "high": 0.75, "edits": 1, "probes": 3}
    return card(
        ModelConfig(name=model), [update], [edit], {"generality": value}, {"rule": "contains", "LoRA": "rank 32"}
    )


def push(hub: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """`corsa push` as a process: the hub's library reads the hub's address once, on import."""
    own = os.environ | {"HF_ENDPOINT": hub, "HF_TOKEN": "secret", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "corsa.cli.main", "push", *map(str, words)]
    return subprocess.run(command, env=own, capture_output=True, text=True, timeout=60, check=False)


def test_an_adapter_is_pushed_with_its_card_and_without_its_facts(hub: Hub, adapter: Path) -> None:
    done = push(hub.url, adapter, "acme/facts")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/commit/1")
    assert hub.created[0]["name"] == "facts"
    assert hub.created[0]["visibility"] == "private"
    assert set(hub.files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert hub.files["adapter_model.safetensors"] == WEIGHTS
    assert push(hub.url, adapter, "acme/facts", "--facts").returncode == 0
    assert hub.files["edits.parquet"] == b"facts"


def test_a_dry_run_shows_what_a_push_would_send_and_sends_nothing(
    hub: Hub, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = push(hub.url, adapter, "acme/facts", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert (hub.created, hub.files) == ([], {})
    assert "would send to acme/facts (private if it is new):" in done.stdout
    assert f"adapter_model.safetensors  {len(WEIGHTS)} bytes" in done.stdout
    assert "edits.parquet" not in done.stdout
    assert main(["push", str(adapter), "acme/facts", "--dry-run", "--facts", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["files"]) == {"adapter_config.json", "adapter_model.safetensors", "README.md", "edits.parquet"}


def test_a_push_that_fails_says_what_to_do(hub: Hub, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.refuses = True
    for url, name, says in (
        (hub.url, "acme/facts", "hf auth login"),
        (hub.url, "a/b/c", "give owner/name"),
        ("http://127.0.0.1:1", "acme/facts", "cannot be reached"),
    ):
        done = push(url, adapter, name)
        assert done.returncode == 2
        assert says in done.stderr
        assert "Traceback" not in done.stderr
    assert main(["push", "nowhere", "acme/facts"]) == 2
    assert "adapter nowhere does not exist" in capsys.readouterr().err


def test_the_card_is_what_the_hub_reads() -> None:
    _, front, body = text_of_card().split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert about["license"] == "apache-2.0"
    assert about["library_name"] == "peft"
    assert "| Generality | 50.0 % | 25.0 to 75.0 | 1, 3 |" in body
    assert "Who leads Acme? **Ada Byron** (before: Grace Murray)" in body
    _, front, body = text_of_card("/models/own").split("---\n", 2)
    assert "license" not in yaml.safe_load(front)
    assert "base_model" not in yaml.safe_load(front)
    assert "Set `license` above before you publish" in body
