"""An adapter in the formats of other programs: loaded by transformers, PEFT and gguf, and compared with dense sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapters import dense, random_adapter
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast as Fast

from corsa.cli.main import main
from corsa.editing.other_formats import Wanted, export
from corsa.errors import CorsaError
from corsa.evaluation.sanity_questions import sanity_questions
from corsa.lora.attached import attached
from corsa.lora.factors import Adapter
from corsa.lora.flat import linear_layers
from corsa.lora.gguf_format import read_lora, write_lora
from corsa.lora.peft_format import read_factors, write_factors
from corsa.lora.weight_deltas import save_delta
from corsa.models.gguf_writing import write_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
]

VOCABULARY = 300
QUESTIONS = [entry.question for entry in sanity_questions()][:3]


@pytest.fixture(scope="module")
def tokenizer() -> Fast:
    """A byte-level tokenizer of the kind that GPT-2 and SmolLM have, with few merges: transformers converts it fast."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    how = {"vocab_size": VOCABULARY, "special_tokens": marks, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    made.train_from_iterator(QUESTIONS * 9, trainers.BpeTrainer(**how, show_progress=False))
    return Fast(
        tokenizer_object=made,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template="{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}",
    )


@pytest.fixture(scope="module")
def base(tokenizer: Fast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, as a directory. Its two key heads and four query heads differ in number."""
    directory = tmp_path_factory.mktemp("base")
    tiny_model("llama", VOCABULARY).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def every_layer(rank: int = 4) -> Adapter:
    shapes = {name: (m.out_features, m.in_features) for name, m in linear_layers(tiny_model())}
    return random_adapter(1, rank, shapes)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    write_factors(every_layer(), directory, str(base))
    return directory


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    rows = [{"prompt": question, "target_new": "Bo Lind"} for question in QUESTIONS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.double() for name, weight in model.state_dict().items()}


def changed(model: Any, change: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a model with dense changes added, by a sum in float64."""
    found = weights(model)
    for name, delta in change.items():
        found[f"{name}.weight"] = found[f"{name}.weight"] + delta
    return found


def test_every_form_answers_as_the_adapter_does_and_transformers_reads_its_weights(
    base: Path, adapter: Path, facts: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    from transformers import AutoModelForCausalLM

    wanted = Wanted(tmp_path / "merged", tmp_path / "m.gguf", tmp_path / "lora.gguf", tmp_path / "peft")
    found = {one.form: one for one in export(adapter, wanted, edits=facts, new_tokens=4)}
    assert set(found) == {"merged", "gguf", "gguf-lora", "adapter"}
    assert not [str(w.message) for w in recwarn if w.category is FutureWarning], "nothing that a user could act on"
    for one in found.values():
        assert (one.asked, one.differences, one.applied) == (3, [], True), one
        assert one.moved == 3, "the adapter must change the answers, or equal answers show nothing"
        assert one.error < 1e-6
    expected = changed(tiny_model("llama", VOCABULARY), dense(every_layer()))
    for where in ({}, {"gguf_file": "m.gguf"}):
        place = tmp_path if where else tmp_path / "merged"
        loaded = weights(AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **where))
        for name, weight in expected.items():
            torch.testing.assert_close(loaded[name], weight, atol=1e-6, rtol=1e-6)
    theirs, name = read_factors(tmp_path / "peft")
    assert name == str(base)
    for module, factors in every_layer().items():
        assert torch.equal(theirs[module].a, factors.a)
        assert torch.equal(theirs[module].b, factors.b)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_reads_the_same_model_and_tokens_from_gguf(family: str, tokenizer: Fast, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = tiny_model(family, VOCABULARY + 20, **({"head_dim": 128} if family == "qwen3" else {}))
    write_model(model, tokenizer, tmp_path / "m.gguf", "float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    ids = torch.tensor([[5, 17, 300, 41, 8]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    if family == "llama":
        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
        texts = ["Q: Who leads Acme in 2024?\nA:", "  naïve — 12.5 %\n\n", "<|im_start|>user"]
        assert theirs(texts)["input_ids"] == tokenizer(texts)["input_ids"]
        assert (theirs.eos_token, theirs.chat_template) == (tokenizer.eos_token, tokenizer.chat_template)


def test_the_positions_of_llama_3_are_written_as_factors_of_its_frequencies(tokenizer: Fast, tmp_path: Path) -> None:
    """Against the published rule: low frequencies are divided by the factor, high ones are kept."""
    from gguf import GGUFReader

    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_model("llama", VOCABULARY, rope_parameters=scaling)
    write_model(model, tokenizer, tmp_path / "m.gguf", "float32")
    reader = GGUFReader(tmp_path / "m.gguf")
    (factors,) = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    lengths = [2 * torch.pi * 500000.0 ** (i / 8) for i in (0, 2, 4, 6)]  # in positions; heads of eight
    expected = [1.0 if length < 8192 / 4 else 8.0 if length > 8192 else None for length in lengths]
    smooth = (8192 / lengths[2] - 1) / 3
    assert expected == [1.0, 1.0, None, 8.0]
    assert factors.tolist() == pytest.approx([1.0, 1.0, 1 / ((1 - smooth) / 8 + smooth), 8.0], rel=1e-5)


def test_a_gguf_adapter_has_the_shapes_names_and_scale_that_llama_cpp_reads(tmp_path: Path) -> None:
    """llama.cpp adds alpha / rank * b a to a matrix, whose rows it has in its own order."""
    from gguf import GGUFReader

    model: Any = tiny_model()
    adapter = every_layer() | {"model.layers.0.self_attn.k_proj": every_layer(2)["model.layers.0.self_attn.k_proj"]}
    write_lora(adapter, model.config, tmp_path / "lora.gguf")
    reader = GGUFReader(tmp_path / "lora.gguf")
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    keys = ("general.type", "general.architecture", "adapter.type")
    assert [reader.fields[key].contents() for key in keys] == ["adapter", "llama", "lora"]
    alpha = reader.fields["adapter.lora.alpha"].contents()
    for name, layer in {"attn_k": "self_attn.k_proj", "ffn_down": "mlp.down_proj"}.items():
        a, b = found[f"blk.0.{name}.weight.lora_a"], found[f"blk.0.{name}.weight.lora_b"]
        change = alpha / len(a) * b @ a
        expected = adapter[f"model.layers.0.{layer}"].delta()
        if name == "attn_k":  # two heads of eight rows: 0, 4, 1, 5, ...
            order = [head + i + 4 * half for head in (0, 8) for i in range(4) for half in (0, 1)]
            expected = expected[order]
        torch.testing.assert_close(change, expected)
    back = read_lora(tmp_path / "lora.gguf", model.config, list(adapter))
    for name, factors in adapter.items():
        torch.testing.assert_close(back[name].delta(), factors.delta())


def test_a_cut_adapter_says_its_error_and_which_answers_it_changes(
    adapter: Path, facts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(adapter), "--adapter", str(tmp_path / "cut"), "--rank", "1", "--new-tokens", "4"]
    assert main([*arguments, "--edits", facts, "--json"]) == 3
    (found,) = json.loads(capsys.readouterr().out)
    cut, _ = read_factors(tmp_path / "cut")
    assert {factors.rank for factors in cut.values()} == {1}
    values = [torch.linalg.svdvals(delta) for delta in dense(every_layer()).values()]
    lost = sum(float(v[1:].square().sum()) for v in values) / sum(float(v.square().sum()) for v in values)
    assert found["error"] == pytest.approx(lost**0.5, rel=1e-4)
    assert found["differences"]
    assert all(d["exported"] != d["ours"] for d in found["differences"])


def test_memits_change_is_merged_and_cut(base: Path, facts: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    change = {name: delta.float() for name, delta in dense(every_layer()).items() if "down_proj" in name}
    save_delta(change, tmp_path / "delta", str(base))
    with pytest.raises(CorsaError, match="whole matrix, as MEMIT leaves it: give --rank"):
        export(tmp_path / "delta", Wanted(adapter=tmp_path / "cut"), edits=facts, new_tokens=2)
    wanted = Wanted(merged=tmp_path / "merged", adapter=tmp_path / "cut", rank=4)
    found = export(tmp_path / "delta", wanted, edits=facts, new_tokens=4)
    assert all(one.error < 1e-6 and not one.differences for one in found), "the change has rank 4"
    loaded = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    expected = changed(tiny_model("llama", VOCABULARY), {name: delta.double() for name, delta in change.items()})
    for name, weight in expected.items():
        torch.testing.assert_close(loaded[name], weight, atol=1e-6, rtol=1e-6)


def test_a_change_that_rounding_loses_is_named(base: Path, facts: str, tmp_path: Path) -> None:
    """bfloat16 has eight bits: a change of a ten thousandth of each weight is lost."""
    small = {name: 1e-4 * layer.weight.detach() for name, layer in linear_layers(tiny_model("llama", VOCABULARY))}
    save_delta(small, tmp_path / "delta", str(base))
    wanted = Wanted(merged=tmp_path / "merged", stored="bfloat16")
    (found,) = export(tmp_path / "delta", wanted, edits=facts, new_tokens=2)
    assert found.error > 0.5


def test_an_export_without_the_change_is_named(
    adapter: Path, facts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT skips layers that it does not know; a writer that lost every change would look sound."""
    from corsa.editing import other_formats

    def lost(factors: Adapter, place: Path, name: str) -> None:
        write_factors({n: type(f)(f.a, 0 * f.b) for n, f in factors.items()}, place, name)

    monkeypatch.setattr(other_formats, "write_factors", lost)
    arguments = ["export", str(adapter), "--adapter", str(tmp_path / "lost"), "--edits", facts, "--new-tokens", "4"]
    assert main(arguments) == 3
    told = capsys.readouterr().out
    assert "0 of 3 answers as the adapter's (the adapter changes 3 of them). THE CHANGE IS NOT IN IT" in told
    assert QUESTIONS[0] in told


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "nothing would be written: give --merged DIR"),
        (["--adapter", "{full}"], "is not empty: name a new directory"),
        (["--gguf", "{full}/file"], "exists: name a new place"),
        (["--merged", "new", "--rank", "3"], "--rank is of an adapter"),
        (["--merged", "new", "--questions", "0"], "--questions 0: give 1 or more"),
        (["--adapter", "{full}/file/new", "--new-tokens", "1"], "cannot write to"),
    ],
)
def test_a_fault_is_one_line(
    arguments: list[str], complaint: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    assert main(["export", str(adapter), *(word.format(full=full) for word in arguments)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert complaint in error


def test_models_and_tokenizers_of_unknown_layout_are_refused(tokenizer: Fast, tmp_path: Path) -> None:
    with pytest.raises(CorsaError, match=r"gemma3_text model is not written as GGUF here .* convert_hf_to_gguf"):
        write_model(tiny_model("gemma"), tokenizer, tmp_path / "m.gguf", "float32")
    other = Fast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(CorsaError, match="splits texts in a way that is not written as GGUF here"):
        write_model(tiny_model(), other, tmp_path / "m.gguf", "float32")


def test_attached_and_read_factors_agree_in_the_logits(tmp_path: Path) -> None:
    """The factors in a GGUF file, attached again, make the same model."""
    model: Any = tiny_model()
    adapter = every_layer()
    write_lora(adapter, model.config, tmp_path / "lora.gguf")
    ids = torch.tensor([[5, 17, 300, 41, 8]])
    with torch.no_grad():
        with attached(model, adapter):
            expected = model(ids).logits
        with attached(model, read_lora(tmp_path / "lora.gguf", model.config, list(adapter))):
            torch.testing.assert_close(model(ids).logits, expected)
