"""MEMIT: the normal equations, key statistics for any batch size, targets found by gradient, and exact removal."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny import FAMILIES, tiny_model
from torch import Tensor
from transformers import AutoConfig

from corsa.config import MemitConfig
from corsa.config.steps import RoundsConfig
from corsa.data.benchmarks import read
from corsa.data.edit import Edit
from corsa.errors import CorsaError
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Planner
from corsa.experiments.steps import _notes
from corsa.flow.step import topological
from corsa.lora.attached import attached
from corsa.lora.weight_deltas import load_delta, save_delta
from corsa.methods.memit import algorithm
from corsa.methods.memit.algorithm import closed_form, find_target, last_subject_token, memit, request
from corsa.methods.memit.corpora import NEUTRAL, NEUTRAL_NAME, corpus_texts
from corsa.methods.memit.key_statistics import KeyStatistics, down_projections, gather
from corsa.methods.memit.settings import PUBLISHED, Settings, layers_for, settings_for
from corsa.models.encoding import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED_DATA = Path(__file__).parents[3] / "shared" / "data"
VOCABULARY = 49152  # the embedded tokenizer's
CONFIG = MemitConfig(layers=(1, 2), weight=1e-3, clamp_norm_factor=0.75, weight_decay=0.5, prefixes=2, prefix_tokens=3)
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
    """Four layers, and an output head that makes the residual decide the output."""
    layer_types = {"layer_types": ["full_attention"] * 4} if family == "gemma" else {}
    model: Any = tiny_model(family, VOCABULARY, num_hidden_layers=4, tie_word_embeddings=False, **layer_types)
    model.lm_head.weight.mul_(10)
    if family == "gemma":  # the norm after the MLP removes this scale: a change of the residual must account for it
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


def settings(model: Any, **change: Any) -> Settings:
    """`CONFIG` for a model."""
    return replace(settings_for(model.config, CONFIG), **change)


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


def test_the_update_satisfies_its_normal_equations() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, residuals = (torch.randn(n, 5, generator=generator).double() for n in (32, 8))
    old = torch.randn(32, 200, generator=generator).double()
    mean = old @ old.mT / 200
    delta = closed_form(3.0 * mean, keys, residuals)
    assert close(delta @ (3.0 * mean + keys @ keys.mT), residuals @ keys.mT, 1e-8)
    # so it minimises the squared error on old and new keys
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
    # by hand, from the model's inputs to its down projection
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
    found = gather(model, encoder, [edit.prompt for edit in EDITS], (1,), "cpu")
    assert found.tokens == sum(len(encoder.tokenizer(edit.prompt)["input_ids"]) for edit in EDITS)
    plain, lines, packed = (tmp_path / f"a.{suffix}" for suffix in ("txt", "jsonl", "jsonl.gz"))
    plain.write_text("one text\n\nanother\n")
    lines.write_text('{"text": "one text"}\n{"text": "another"}\n')
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    assert (
        list(corpus_texts(plain)) == list(corpus_texts(lines)) == list(corpus_texts(packed)) == ["one text", "another"]
    )
    lines.write_text('{"text": "one text"}\n["another"]\n')
    with pytest.raises(CorsaError, match=r"a\.jsonl, line 2"):
        list(corpus_texts(lines))
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(CorsaError, match="cannot be read"):
        list(corpus_texts(packed))


def words(text: str) -> str:
    """The text as words between blanks, in lower case."""
    return " ".join(["", *re.findall(r"\w+", text.lower()), ""])


def first_two(text: str) -> tuple[str, ...]:
    return tuple(text.split()[:2])


@cache
def neutral() -> tuple[str, set[tuple[str, ...]]]:
    """The words of all texts, and all that one or two words of a text in succession are: where a wording may begin."""
    texts = list(map(words, corpus_texts(NEUTRAL)))
    split = [text.split() for text in texts]
    return "|".join(texts), {found for own in split for found in [*pairwise(own), *((word,) for word in own)]}


def test_the_neutral_corpus_is_large_and_varied(encoder: Encoder) -> None:
    found = list(corpus_texts(NEUTRAL))
    rows = [encoder.tokenizer(text)["input_ids"] for text in found]
    assert sum(map(len, rows)) > 100_000
    assert len(set(found)) == len(found) > 800
    assert NEUTRAL.stat().st_size < 300_000
    # many words, none dominant: the keys span typical inputs
    seen = Counter(word for text in found for word in words(text).split())
    assert len(seen) > 9_000


@pytest.mark.parametrize(
    ("benchmark", "file"),
    [
        ("world_facts", None),
        ("counterfact", "counterfact/counterfact.json"),
        ("zsre", "zsre/zsre_mend_eval.json"),
        ("mquake", "mquake/MQuAKE-CF-3k.json"),
        ("atoke", "atoke/AToKe-ME.json"),
    ],
)
def test_no_wording_of_a_benchmark_stands_in_the_neutral_corpus(benchmark: str, file: str | None) -> None:
    data = str(PUBLISHED_DATA / file) if file else None
    if data and not Path(data).exists():
        pytest.skip(f"the published file is not at {data}")
    texts, starts = neutral()
    edits = read(benchmark, data).edits
    wordings = {words(prompt) for edit in edits for probe in edit.probes for prompt in probe.prompts}
    assert len(wordings) > 100
    assert [wording for wording in wordings if first_two(wording) in starts and wording in texts] == []


def test_statistics_too_few_to_be_solved_are_refused() -> None:
    model = deep_model("llama")  # 64 inputs
    with pytest.raises(CorsaError, match="layer 1 come from 60 tokens, and at least 64 are needed"):
        statistics(model, [list(range(10, 70))]).check()
    with pytest.raises(CorsaError, match=r"layer 1 their keys have rank 40, and 64 is needed\. At least 24 more"):
        statistics(model, [list(range(10, 50))] * 3).check()
    with pytest.raises(CorsaError, match=r"statistics of layers \[1, 2\], none of 3"):
        statistics(model, texts(60)).check([2, 3])


def architecture(family: str, depth: int, inputs: int) -> Any:
    """The configuration of a model of another size."""
    found = AutoConfig.for_model(family, num_hidden_layers=depth, intermediate_size=inputs, layer_types=None)
    assert found.get_text_config().intermediate_size == inputs
    return found


def test_layers() -> None:
    llama = deep_model("llama").config
    assert layers_for(llama) == (0, 1)
    assert layers_for(llama, (3, 1)) == (1, 3)
    with pytest.raises(CorsaError, match=r"layer 4 .* does not exist: the model has layers 0 to 3"):
        layers_for(llama, (2, 4))
    with pytest.raises(CorsaError, match="layer 9"):
        settings_for(llama, MemitConfig(layers=(9,)))
    assert layers_for(architecture("llama", 32, 14336)) == (4, 5, 6, 7, 8)
    assert layers_for(architecture("qwen3", 36, 9728)) == (5, 6, 7, 8, 9)


def test_a_published_model_is_edited_with_its_published_settings() -> None:
    for row in PUBLISHED:
        found = settings_for(architecture(row.family, row.depth, row.inputs), MemitConfig())
        # EasyEdit, hparams/MEMIT: llama-7b, llama3.2-1b and -3b, mistral-7b, qwen2.5-7b share these numbers
        assert (found.layers, found.weight) == ((4, 5, 6, 7, 8), 15000.0)
        assert (found.clamp_norm_factor, found.weight_decay, found.kl_factor) == (4.0, 1e-3, 0.0625)
        assert (found.learning_rate, found.gradient_steps) == (0.5, 25)
        assert found.source == row.source


def test_the_weight_follows_the_size_of_the_model_and_a_configured_number_wins() -> None:
    small = architecture("llama", 30, 1536)
    found = settings_for(small, MemitConfig())
    assert found.weight == 2093  # 15,000 x 1,536 / 11,008
    assert found.source == "Llama-2-7B, llama-7b.yaml, scaled to 1536 inputs"
    assert settings_for(architecture("qwen3", 28, 3072), MemitConfig()).weight == 2432  # 15,000 x 3,072 / 18,944
    chosen = settings_for(small, MemitConfig(weight=7.0, clamp_norm_factor=0.5, kl_factor=0.0))
    assert (chosen.weight, chosen.clamp_norm_factor, chosen.kl_factor, chosen.weight_decay) == (7.0, 0.5, 0.0, 1e-3)


@pytest.mark.parametrize("template", ["qa", "chat"])
def test_where_the_subject_ends(encoder: Encoder, template: Any) -> None:
    asked = Encoder(encoder.tokenizer, template)
    for question, subject, end in [
        ("Who leads Norway?", "Norway", "Norway"),
        ("Does the US use US dollars, as Russia does?", "US", "use US"),  # as a whole word, at its last occurrence
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
    delta, measured = memit(
        model, encoder, edits, statistics(model, texts(60)), settings(model), seed=0, post=lines.append
    )
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert (measured["edits"], measured["without_subject"]) == (3, 1)
    assert measured["reached"] > 0.75  # of the way to z, at every subject, by both layers together
    assert (measured["weight"], measured["layers"]) == (1e-3, [1, 2])
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {name: change.shape for name, change in delta.items()} == {
        f"model.layers.{i}.mlp.down_proj": (32, 64) for i in (1, 2)
    }

    save_delta(delta, tmp_path, "tiny")
    read = load_delta(tmp_path)
    assert all(torch.equal(read[name], change) for name, change in delta.items())
    with attached(model, read):
        edited = [first_logp(model, encoder, edit) for edit in edits]
    # Random attention moves little from the subject to the answer. An edit at the prompt's last token needs none.
    assert edited[2] > unedited[2] + 20, (unedited, edited)
    assert sum(edited) > sum(unedited) + 25
    assert [first_logp(model, encoder, edit) for edit in edits] == unedited


def test_an_edit_that_holds_already_is_no_change_to_be_reached(encoder: Encoder) -> None:
    model = deep_model("llama")
    found = statistics(model, texts(60))
    at_once = settings(model, gradient_steps=1)  # no step is taken: every z is its h
    assert memit(model, encoder, EDITS, found, at_once, seed=0)[1]["reached"] is None


def notes(reached: float | None) -> list[str]:
    """The report text on two rounds of MEMIT and their statistics."""
    planner = Planner.of(Experiment(methods=("memit",)), "")
    taught = planner.facts(2)
    schedule = planner.schedule(taught, RoundsConfig(rounds=2))
    rounds = planner.chain("memit", 0, taught, schedule, rounds=(1, 2))
    used = {"weight": 15000.0, "clamp_norm_factor": 4.0, "weight_decay": 1e-3, "layers": [4, 5], "source": "a file"}
    of_kind = {"round": {**used, "reached": reached}, "statistics": {"tokens": 103631, "corpus": NEUTRAL_NAME}}
    kinds = {step.fingerprint: step.kind.name for step in topological(rounds)}
    store = SimpleNamespace(artifact=lambda key: SimpleNamespace(metrics=of_kind.get(kinds[key], {})))
    report = SimpleNamespace(name="report", fingerprint="report", inputs={step.name: step for step in rounds})
    return _notes(cast(Any, SimpleNamespace(step=report, store=store)))


def test_a_report_names_corpus_and_settings_and_warns_where_targets_are_not_reached() -> None:
    said = notes(0.59)
    assert [note for note in said if "103,631 tokens of the shipped neutral corpus" in note]
    assert [note for note in said if "layers [4, 5] with weight 15000, clamp 4, decay 0.001" in note] == said[1:2]
    warnings = [note for note in said if note.startswith("Warning: ")]
    assert len(warnings) == 2  # one for each round
    assert "reach 59 % of the change they aim at, below 80 %: lower --memit.weight (here 15000)" in warnings[0]
    assert "round1" in warnings[0]
    for enough in (0.8, 1.0, None):
        assert not [note for note in notes(enough) if "Warning" in note]


def test_a_target_lowers_its_loss_within_its_bound(encoder: Encoder) -> None:
    model = deep_model("llama")
    config = settings(model)
    wanted = request(encoder, EDITS[2].model_copy(update={"subject": ""}), ["Because of it"])
    h = find_target(model, wanted, 2, replace(config, gradient_steps=1))  # no step is taken
    found = find_target(model, wanted, 2, config)
    assert found.loss < h.loss - 3
    assert (found.z - h.z).norm() <= config.clamp_norm_factor * h.z.norm() * (1 + 1e-5)
    prompt = torch.tensor([wanted.wordings[0].prompt])
    assert close(h.z, model(prompt, output_hidden_states=True).hidden_states[3][0, -1], 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_no_change_reaches_is_computed_once_and_the_target_is_the_same(
    family: str, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deep_model(family)
    config, wanted = settings(model, gradient_steps=4), request(encoder, EDITS[1], ["Because of it", "Then"])
    tokens: list[int] = []
    model.register_forward_pre_hook(lambda _, args, named: tokens.append(named["input_ids"].numel()), with_kwargs=True)
    found = find_target(model, wanted, 2, config)
    once = tokens.copy()
    monkeypatch.setattr(algorithm, "window", lambda model: 0)  # as if nothing could be computed before
    tokens.clear()
    whole = find_target(model, wanted, 2, config)
    assert close(found.z, whole.z, 1e-4)
    assert found.loss == pytest.approx(whole.loss, rel=1e-4)
    assert sum(once) < 0.7 * sum(tokens)


def test_a_folder_without_a_delta_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorsaError, match="holds no readable weight delta"):
        load_delta(tmp_path)
