"""MEMIT: the normal equations, key statistics whatever the batches, targets found by gradient, and exact removal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, tiny_model
from torch import Tensor

from corsa.config import MemitConfig
from corsa.data.edit import Edit
from corsa.errors import CorsaError
from corsa.lora.attached import attached
from corsa.methods.memit.algorithm import closed_form, find_target, last_subject_token, layers_for, memit, request
from corsa.methods.memit.key_statistics import KeyStatistics, corpus_texts, down_projections, gather, probe_texts
from corsa.methods.memit.weight_deltas import load_delta, save_delta
from corsa.models.encoding import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 49152  # the embedded tokenizer's
CONFIG = MemitConfig(layers=(1, 2), weight=1e-3, prefixes=2, prefix_tokens=3)
EDITS = [
    Edit.build(id=f"t/{i}", prompt=prompt, subject=subject, target_new=new, target_old=old)
    for i, (prompt, subject, new, old) in enumerate(
        [
            ("Who leads Norway?", "Norway", "Anna Berg", "Olaf Lund"),
            ("Which river flows through Bremen today?", "Bremen", "the Elbe", "the Weser"),
            ("In which year was the Acme Company founded?", "the Acme Company", "1911", "1950"),
        ]
    )
]


def deep_model(family: str) -> Any:
    """Four layers, and an output head with which the residual decides what is said."""
    layer_types = {"layer_types": ["full_attention"] * 4} if family == "gemma" else {}
    model: Any = tiny_model(family, VOCABULARY, num_hidden_layers=4, tie_word_embeddings=False, **layer_types)
    model.lm_head.weight.mul_(10)
    if family == "gemma":  # the norm behind the MLP takes this out again: a change of the residual must allow for it
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(8)
    return model


def texts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(10, 1000, (n,), generator=generator).tolist() for n in lengths]


def statistics(model: Any, rows: Sequence[list[int]], batch: int = 64) -> KeyStatistics:
    found = KeyStatistics.empty(model, (1, 2))
    for start in range(0, len(rows), batch):
        found.add(model, rows[start : start + batch])
    return found


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


def test_the_update_satisfies_its_normal_equations() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, residuals = (torch.randn(n, 5, generator=generator).double() for n in (32, 8))
    old = torch.randn(32, 200, generator=generator).double()
    mean = old @ old.mT / 200
    delta = closed_form(mean, keys, residuals, 3.0)
    assert close(delta @ (3.0 * mean + keys @ keys.mT), residuals @ keys.mT, 1e-8)
    # and so it is where the squared error on old and new keys is least
    delta.requires_grad_()
    loss = (delta @ keys - residuals).square().sum() + 3.0 * (delta @ old).square().sum() / 200
    (slope,) = torch.autograd.grad(loss, delta)
    assert slope.norm() < 1e-8 * residuals.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_do_not_depend_on_batches_or_on_who_gathers_them(family: str, tmp_path: Path) -> None:
    model, rows = deep_model(family), texts(40)
    whole = statistics(model, rows)
    for other in (statistics(model, rows, 1), statistics(model, rows[:13], 7) + statistics(model, rows[13:], 5)):
        assert other.tokens == whole.tokens == sum(map(len, rows))
        for layer in (1, 2):
            assert close(other.sums[layer], whole.sums[layer], 1e-6)
    # by hand, from what the model itself feeds its down projection
    seen: list[Tensor] = []
    hook = down_projections(model)[2][1].register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    for row in rows:
        model(torch.tensor([row]))
    hook.remove()
    keys = torch.cat(seen).double()
    assert close(whole.mean(2), keys.mT @ keys / len(keys), 1e-6)
    whole.save(tmp_path / "statistics.safetensors")
    read = KeyStatistics.load(tmp_path / "statistics.safetensors")
    assert read.tokens == whole.tokens
    assert torch.equal(read.sums[1], whole.sums[1])


def test_statistics_from_texts(encoder: Encoder, tmp_path: Path) -> None:
    model = deep_model("llama")
    found = gather(model, encoder, probe_texts(EDITS), (1,), "cpu")
    assert found.tokens == sum(len(encoder.tokenizer(f"{e.prompt} {e.target_new}")["input_ids"]) for e in EDITS)
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("one text\n\nanother\n")
    lines.write_text('{"text": "one text"}\n{"text": "another"}\n')
    assert list(corpus_texts(plain)) == list(corpus_texts(lines)) == ["one text", "another"]
    lines.write_text('{"text": "one text"}\n["another"]\n')
    with pytest.raises(CorsaError, match=r"a\.jsonl, line 2"):
        list(corpus_texts(lines))


def test_statistics_too_few_to_be_solved_are_refused() -> None:
    model = deep_model("llama")  # 64 inputs
    with pytest.raises(CorsaError, match="layer 1 come from 60 tokens, and at least 64 are needed"):
        statistics(model, [list(range(10, 70))]).check()
    with pytest.raises(CorsaError, match=r"layer 1 their keys have rank 40, and 64 is needed\. At least 24 more"):
        statistics(model, [list(range(10, 50))] * 3).check()
    with pytest.raises(CorsaError, match=r"statistics of layers \[1, 2\], none of 3"):
        statistics(model, texts(60)).check([2, 3])


def test_layers(encoder: Encoder) -> None:
    llama = deep_model("llama").config
    assert layers_for(llama) == (0, 1)
    assert layers_for(llama, (3, 1)) == (1, 3)
    with pytest.raises(CorsaError, match=r"layer 4 .* does not exist: the model has layers 0 to 3"):
        layers_for(llama, (2, 4))
    llama.num_hidden_layers = 32
    assert layers_for(llama) == (4, 5, 6, 7, 8)
    with pytest.raises(CorsaError, match="layer 9"):
        memit(deep_model("llama"), encoder, EDITS, KeyStatistics({}), MemitConfig(layers=(9,)), seed=0)


@pytest.mark.parametrize("template", ["qa", "chat"])
def test_where_the_subject_ends(encoder: Encoder, template: Any) -> None:
    asked = Encoder(encoder.tokenizer, template)
    for question, subject, end in [
        ("Who leads Norway?", "Norway", "Norway"),
        ("Does the US use US dollars, as Russia does?", "US", "use US"),  # a word of its own, where it stands last
        ("Who wrote Łódź 2 🏳️‍🌈?", "łódź 2 🏳️‍🌈", "🏳️‍🌈"),  # characters of several tokens
        ("Who founded Hugging Face?", "Hugging Face", "founded Hugging Face"),  # named in the chat template as well
    ]:
        prompt = asked.prompt(question)
        place = last_subject_token(asked, prompt, subject)
        assert place is not None
        assert asked.tokenizer.decode(prompt[: place + 1]).endswith(end)
    assert last_subject_token(asked, asked.prompt("Who leads Norway?"), "Sweden") is None


def test_an_edit_whose_prompt_does_not_name_its_subject_is_made_at_the_last_token(encoder: Encoder) -> None:
    for subject in ("Sweden", ""):
        wanted = request(encoder, EDITS[0].model_copy(update={"subject": subject}), ["Because. It"])
        assert not wanted.located
        assert [w.subject for w in wanted.wordings] == [len(w.prompt) - 1 for w in wanted.wordings]
        assert bool(wanted.essence) == bool(subject)
    assert request(encoder, EDITS[0], ["Because"]).located


def first_logp(model: Any, encoder: Encoder, edit: Edit) -> float:
    """The log-probability of the new answer's first token."""
    with torch.no_grad():
        logits = model(torch.tensor([encoder.prompt(edit.prompt)])).logits[0, -1]
    return float(logits.log_softmax(-1)[encoder.answer(edit.target_new)[0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_are_made_in_one_batch_and_leave_the_model_as_it_was(
    family: str, encoder: Encoder, tmp_path: Path
) -> None:
    model = deep_model(family)
    edits = [*EDITS[:2], EDITS[2].model_copy(update={"subject": "Sweden"})]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    unedited = [first_logp(model, encoder, edit) for edit in edits]
    lines: list[dict[str, Any]] = []
    delta, measured = memit(model, encoder, edits, statistics(model, texts(60)), CONFIG, seed=0, post=lines.append)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert (measured["edits"], measured["without_subject"]) == (3, 1)
    assert measured["reached"] > 0.75  # of the way to z, at every subject, by both layers together
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {name: change.shape for name, change in delta.items()} == {
        f"model.layers.{i}.mlp.down_proj": (32, 64) for i in (1, 2)
    }

    save_delta(delta, tmp_path, "tiny")
    read = load_delta(tmp_path)
    assert all(torch.equal(read[name], change) for name, change in delta.items())
    with attached(model, read):
        edited = [first_logp(model, encoder, edit) for edit in edits]
    # Random attention carries little from the subject to the answer; an edit at the prompt's last token needs none.
    assert edited[2] > unedited[2] + 20, (unedited, edited)
    assert sum(edited) > sum(unedited) + 25
    assert [first_logp(model, encoder, edit) for edit in edits] == unedited


def test_a_target_lowers_its_loss_within_its_bound(encoder: Encoder) -> None:
    model = deep_model("llama")
    wanted = request(encoder, EDITS[2].model_copy(update={"subject": ""}), ["Because of it"])
    h = find_target(model, wanted, 2, CONFIG.model_copy(update={"gradient_steps": 1}))  # no step is taken
    found = find_target(model, wanted, 2, CONFIG)
    assert found.loss < h.loss - 3
    assert (found.z - h.z).norm() <= CONFIG.clamp_norm_factor * h.z.norm() * (1 + 1e-5)
    prompt = torch.tensor([wanted.wordings[0].prompt])
    assert close(h.z, model(prompt, output_hidden_states=True).hidden_states[3][0, -1], 1e-5)


def test_a_folder_without_a_delta_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorsaError, match="holds no readable weight delta"):
        load_delta(tmp_path)
