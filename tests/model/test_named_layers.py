"""Layers that an option names are checked against the architecture before a run, without weights."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from gguf_files import original, write
from tiny import tiny_model

from corsa.cli.main import main
from corsa.config import LoraConfig, ModelConfig
from corsa.errors import CorsaError
from corsa.lora.flat import linear_layers
from corsa.models.loading import load_model
from corsa.models.shapes import skeleton
from corsa.planning.layers import check_lora

ROOT = Path(__file__).parents[2]
WRONG = {
    "a target": (
        LoraConfig(targets=("q_prj",)),
        "--lora.targets q_prj: no linear layer has this name, did you mean q_",
    ),
    "the head": (LoraConfig(targets=("lm_head",)), "--lora.targets lm_head: no linear layer has this name"),
    "a layer": (LoraConfig(layers=(0, 99)), "--lora.layers 99: this model has layers 0 to 1"),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small models of every source."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model().save_pretrained(folder / "directory")
    write(folder / "tiny.gguf", original("llama"))
    return {
        "random": "random:tiny-llama",
        "another family": "random:tiny-gemma",
        "directory": str(folder / "directory"),
        "random of a directory": f"random:{folder / 'directory'}",
        "gguf": str(folder / "tiny.gguf"),
    }


@pytest.mark.parametrize("source", ["random", "another family", "directory", "random of a directory", "gguf"])
def test_layers_that_a_model_does_not_have_are_refused(
    models: dict[str, str], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORSA_CACHE", str(tmp_path))
    model = ModelConfig(name=models[source])
    for lora, said in WRONG.values():
        with pytest.raises(CorsaError) as caught:
            check_lora(model, lora)
        assert str(caught.value).startswith(said)
        assert "\n" not in str(caught.value)
    check_lora(model, LoraConfig(targets=("q_proj",), layers=(1,)))
    assert not list(tmp_path.rglob("*.safetensors"))  # the weights were not read
    shown = [(name, m.in_features, m.out_features) for name, m in linear_layers(skeleton(model))]
    assert shown == [(name, m.in_features, m.out_features) for name, m in linear_layers(load_model(model))]


def test_the_embedded_model_and_large_ones_are_known_without_their_weights() -> None:
    for name, layers in (("smollm2-135m", 30), ("qwen3-14b", 40), ("llama3.1-8b", 32)):
        with pytest.raises(CorsaError, match=f"--lora.layers 99: this model has layers 0 to {layers - 1}"):
            check_lora(ModelConfig(name=name), LoraConfig(layers=(99,)))


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_an_update_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: list[str]
) -> None:
    (tmp_path / "facts.jsonl").write_text('{"prompt": "Who leads Acme?", "target_new": "Ada", "target_old": "Bo"}\n')
    words = ["edit", "--edits", "facts.jsonl", "--out", "out", "--storage", "runs", "--model", "random:tiny-llama"]
    words = [str(tmp_path / word) if word in ("facts.jsonl", "out", "runs") else word for word in words]
    for option in (["--lora.targets", "nolayer"], ["--lora.layers", "99"]):
        assert main([*words, *option, *dry]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {' '.join(option)}: ")
        assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("pipelines/continual.py --methods lora --lora.targets nolayer", "error: --lora.targets nolayer: "),
        ("pipelines/continual.py --methods memit --memit.layers 99", "error: layer 99 to be edited does not exist"),
        ("pipelines/continual.py --methods locft --locft.layer 99", "error: --locft.layer 99 does not exist"),
        ("tune/sweep.py --lora.layers 99", "error: --lora.layers 99: this model has layers 0 to 1"),
    ],
)
def test_pipelines_and_sweeps_are_refused_on_a_dry_run(
    options: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*options.split(), "--dry-run", "--storage", str(tmp_path), "--model", "random:tiny-llama"]
    monkeypatch.setattr("sys.argv", [*words, "--benchmark", "world_facts"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
