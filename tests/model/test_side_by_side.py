"""`corsa ask`, `corsa merge`, `corsa data` and `corsa doctor` on a tiny model."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch

from corsa.cli.doctor import examine
from corsa.cli.main import main
from corsa.config import LoraConfig, ModelConfig
from corsa.errors import CorsaError
from corsa.evaluation.side_by_side import SideBySide
from corsa.lora.factors import Factors
from corsa.lora.flat import Lora
from corsa.lora.peft_format import save_adapter, write_factors
from corsa.models.encoding import Encoder
from corsa.models.loading import load_model

pytestmark = pytest.mark.usefixtures("encoder", "one_thread")

TINY = ModelConfig(name="random:tiny-llama")


def write_adapter(folder: Path, seed: int = 0, base: str = TINY.name) -> str:
    """A PEFT directory of rank 2 whose change is large enough to show."""
    lora = Lora(load_model(TINY), LoraConfig(rank=2, alpha=4.0))
    with torch.no_grad():
        lora.phi.copy_(torch.randn(lora.phi.shape, generator=torch.Generator().manual_seed(seed)))
    save_adapter(lora, folder, base)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "one")


def test_the_base_and_every_adapter_answer_side_by_side(adapter: str, encoder: Encoder) -> None:
    models = SideBySide(TINY, [adapter])
    base, edited = models.ask("Who leads Acme?", ["Ada", "Bob"], new_tokens=3)
    assert (base.model, edited.model) == ("base", adapter)
    assert base.output != edited.output
    ids = [*encoder.prompt("Who leads Acme?"), *encoder.answer("Ada")]
    with torch.no_grad():
        logits = load_model(TINY)(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    answer = encoder.answer("Ada")
    start = len(ids) - len(answer)
    logp = sum(float(logits[start + i - 1, token]) for i, token in enumerate(answer))
    assert base.probabilities["Ada"] == pytest.approx(math.exp(logp), rel=1e-4)
    assert edited.probabilities["Ada"] != pytest.approx(base.probabilities["Ada"], rel=1e-2)
    assert models.ask("Who leads Acme?", new_tokens=3)[0].output == base.output  # an adapter does not change the base


def test_questions_and_adapters_that_cannot_be_asked(adapter: str, tmp_path: Path) -> None:
    models = SideBySide(TINY)
    with pytest.raises(CorsaError, match="the question is empty"):
        models.ask("  ")
    with pytest.raises(CorsaError, match="a candidate is empty"):
        models.ask("Who?", ["", "Bob"])
    with pytest.raises(CorsaError, match="is of base model 'random:tiny-llama', not of 'random:tiny-gemma'"):
        SideBySide(ModelConfig(name="random:tiny-gemma"), [adapter])
    narrow = {"model.layers.0.self_attn.q_proj": Factors(torch.zeros(2, 8), torch.zeros(8, 2))}
    write_factors(narrow, tmp_path / "narrow", base_model="")
    with pytest.raises(CorsaError, match="was it made for another model"):
        SideBySide(TINY, [tmp_path / "narrow"])


def test_ask_once_and_in_a_conversation(
    adapter: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["ask", "--adapter", adapter, "--new-tokens", "3", "--candidates", "Ada,Bob"]
    assert main([*words, "Who leads Acme?", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in rows] == ["base", adapter]
    assert set(rows[0]["probabilities"]) == {"Ada", "Bob"}
    monkeypatch.setattr("sys.stdin", io.StringIO("Who leads Acme?\n\nWho is the pope?\n"))
    assert main([*words, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[0]) == rows
    assert len(lines) == 2
    assert main([*words, "Who leads Acme?"]) == 0
    shown = capsys.readouterr().out
    assert "p(Ada)" in shown
    assert "\x1b" not in shown
    assert main(["ask", " "]) == 2
    assert "the question is empty" in capsys.readouterr().err
    assert main(["ask", "--adapter", "nowhere", "Who?"]) == 2
    assert "adapter nowhere does not exist" in capsys.readouterr().err


def test_merge_writes_a_peft_directory(adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_adapter(tmp_path / "other", seed=1)
    out = tmp_path / "both"
    assert main(["merge", adapter, other, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "rank": 4, "error": 0.0, "remarks": []}
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == TINY.name
    assert main(["merge", adapter, other, "--out", str(out)]) == 2
    assert "is not empty: name a new directory" in capsys.readouterr().err
    foreign = write_adapter(tmp_path / "foreign", base="qwen3-4b")
    assert main(["merge", adapter, foreign, "--out", str(tmp_path / "x")]) == 2
    assert "different base models" in capsys.readouterr().err
    assert main(["merge", adapter, "--out", str(tmp_path / "x")]) == 2
    assert "two adapters or more" in capsys.readouterr().err


def test_data_lists_benchmarks_and_shows_what_a_model_sees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoder: Encoder
) -> None:
    assert main(["data", "--json"]) == 0
    assert {"counterfact", "file"} < {row["name"] for row in json.loads(capsys.readouterr().out)}
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "Who leads Acme?", "target_new": "Ada Byron"}\n')
    assert main(["data", str(path), "--model", TINY.name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["facts"], found["with_old_answer"]) == (1, 0)
    (edit,) = found["edits"]
    start, end = edit["answer_span"]
    ids = [token["id"] for token in edit["prompt"] + edit["target_new"]]
    assert ids == [*encoder.prompt("Who leads Acme?"), *encoder.answer("Ada Byron")]
    assert ids[start:end] == encoder.answer("Ada Byron")
    assert edit["target_old"] is None
    assert main(["data", str(path), "--model", TINY.name]) == 0
    assert "Q·:·␣Who" in capsys.readouterr().out
    path.write_text('{"prompt": "Who leads Acme?"}\n')
    assert main(["data", str(path)]) == 2
    assert "line 1: target_new: is missing" in capsys.readouterr().err
    assert main(["data", "--benchmark", "conterfact"]) == 2
    assert "did you mean 'counterfact'" in capsys.readouterr().err


def test_doctor_names_a_remedy_for_every_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sound = {finding.what: finding for finding in examine(str(tmp_path), TINY.name)}
    assert {"Python", "torch", "ray", "deepspeed", "CPU", "Ray", "storage", "model", "hub token"} <= set(sound)
    assert sound["storage"].state == "ok"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    (tmp_path / "file").write_text("")
    findings = examine(str(tmp_path / "file"), "smolm2")
    faults = {finding.what for finding in findings if finding.state == "fault"}
    assert {"Ray", "storage", "model"} <= faults
    assert all(finding.remedy for finding in findings if finding.state != "ok")
    assert main(["doctor", "--storage", str(tmp_path / "file"), "--json"]) == 1
    assert any(row["state"] == "fault" for row in json.loads(capsys.readouterr().out))
