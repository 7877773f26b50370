"""`corsa-published` is the authors' trainer: compared with a plain training loop of PEFT, torch and transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import CPU, LORA, shaken, tiny_model, with_reference
from torch import Tensor

from corsa.algorithm.learning_rate import learning_rate
from corsa.algorithm.packing import Triplet
from corsa.config import ModelConfig, Placement, StepConfig, TrainingConfig
from corsa.config.steps import ReferenceConfig, RoundConfig
from corsa.errors import CorsaError
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Planner
from corsa.experiments.steps import skipped
from corsa.flow import Step, Store
from corsa.lora.flat import Lora
from corsa.lora.peft_format import save_adapter
from corsa.models.encoding import Encoder
from corsa.training.loop import train
from corsa.training.mixing import Material
from corsa.training.tokens import batch_order, token_rows, without_tokens
from corsa.training.worker_context import Loaded, WorkerContext
from corsa.training.worker_group import WorkerGroup

pytestmark = pytest.mark.usefixtures("one_thread")

FACTS = [
    {"id": f"x/{i}", "prompt": question, "target_new": new, "target_old": old}
    for i, (question, new, old) in enumerate(
        [
            ("Who leads Acme?", "Bo", "Al Ahn"),
            ("Where is the seat of the Order of Umber?", "Lund", "Ghent"),
            ("Which river runs through Tall Oaks?", "the Aire", "the Ribble"),
            ("What does Ida Noor play?", "the oboe", "the harp"),
            ("Who wrote The Glass Mile?", "Una Vane", "Per Holt"),
            ("In which year did the Corin line open?", "1911", "1896"),
        ]
    )
]
TEXT_OF_AN_END = "<|im_end|>\n<|im_end|>"


# The schedule


@pytest.mark.parametrize(("steps", "warmup"), [(10, 3), (7, 0), (5, 5), (4, 6), (1, 5), (100, 5)])
def test_the_schedule_from_zero_is_transformers_own(steps: int, warmup: int) -> None:
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [learning_rate(2e-4, s, steps, warmup, "zero") for s in range(steps)] == pytest.approx(expected, rel=1e-12)
    assert learning_rate(2e-4, 0, steps, warmup, "above_zero") > 0


# The end of an answer


@pytest.fixture
def chat(encoder: Encoder) -> Encoder:
    return Encoder(encoder.tokenizer, "chat", "turn")


def test_an_answer_ends_as_the_template_closes_a_turn(chat: Encoder) -> None:
    for fact in FACTS:
        found = chat.tokenizer.decode([*chat.prompt(fact["prompt"]), *chat.answer(fact["target_new"])])
        turns = [{"role": "user", "content": fact["prompt"]}, {"role": "assistant", "content": fact["target_new"]}]
        whole = chat.tokenizer.apply_chat_template(turns, tokenize=False)
        assert found == whole + chat.tokenizer.eos_token
        assert chat.tokenizer.decode(chat.answer(fact["target_new"])) == fact["target_new"] + TEXT_OF_AN_END


def test_elsewhere_an_answer_ends_with_the_end_token_alone(encoder: Encoder) -> None:
    end = encoder.tokenizer.eos_token_id
    plain = encoder.tokenizer("Bo", add_special_tokens=False)["input_ids"]
    assert Encoder(encoder.tokenizer, "chat").answer("Bo") == [*plain, end]
    assert Encoder(encoder.tokenizer, "qa", "turn").answer("Bo") == encoder.answer("Bo")
    assert encoder.end == Encoder(encoder.tokenizer, "chat").end == [end]


def test_an_answer_without_tokens_is_found_whatever_its_end(chat: Encoder) -> None:
    full, empty = token_rows(chat, [FACTS[0], {**FACTS[0], "target_new": "", "target_old": "Al"}])
    assert len(chat.end) == 3
    assert without_tokens(full, len(chat.end)) is None
    assert without_tokens(empty, len(chat.end)) == "target_new"
    assert without_tokens({**full, "old": chat.end}, len(chat.end)) == "target_old"
    assert without_tokens({**full, "old": []}, len(chat.end)) is None


def test_a_template_that_hides_the_answer_is_refused() -> None:
    class Hiding:
        eos_token_id = 0
        chat_template = "a template"
        name_or_path = "hiding"
        added_tokens_decoder: ClassVar = {}

        def apply_chat_template(self, conversations: Any, **options: Any) -> list[str]:
            return ["nothing" for _ in conversations]

    with pytest.raises(CorsaError, match=r"set --training\.answer-end end_token"):
        Encoder(Hiding(), "chat", "turn").answer("Bo")


# The settings behind the method's name


def planned(template: str, *methods: str, **training: Any) -> dict[str, Step]:
    """Every step of one round of the methods, by name."""
    model = ModelConfig.model_validate({"name": "random:tiny-llama", "template": template})
    experiment = Experiment(model=model, limit=4, methods=methods, training=TrainingConfig(**training))
    planner = Planner.of(experiment, "")
    taught = planner.facts()
    schedule = planner.schedule(taught)
    last = [planner.round(method, 0, taught, schedule) for method in methods]
    return {step.name: step for round_ in last for step in (round_, *round_.inputs.values())}


ROUND = "world_facts/{}/seed0/round1"


def test_the_name_with_the_chat_template_sets_all_that_the_authors_do() -> None:
    step = planned("chat", "corsa", "corsa-published")[ROUND.format("corsa-published")]
    config, reference = step.config, step.inputs["reference"].config
    assert isinstance(config, RoundConfig)
    assert isinstance(reference, ReferenceConfig)
    chosen = config.step
    assert (chosen.pcgrad, chosen.scope, chosen.reduction) == ("authors", "microbatch", "token")
    assert (config.training.first_rate, config.training.answer_end) == ("zero", "turn")
    assert reference.answer_end == "turn"


@pytest.mark.parametrize("template", ["qa", "chat"])
def test_it_changes_no_other_method(template: str) -> None:
    alone, beside = planned(template, "lora", "corsa"), planned(template, "lora", "corsa", "corsa-published")
    assert all(beside[name].fingerprint == step.fingerprint for name, step in alone.items())
    config = beside[ROUND.format("corsa")].config
    assert isinstance(config, RoundConfig)
    assert (config.step, config.training) == (StepConfig(), TrainingConfig())
    second = {"reference/world_facts/turn"} if template == "chat" else set()
    assert beside.keys() - alone.keys() == {ROUND.format("corsa-published")} | second


def test_the_end_of_an_answer_is_a_setting_of_every_method() -> None:
    all_of_them = planned("chat", "lora", "corsa-published", answer_end="turn")
    references = [step for step in all_of_them.values() if step.kind.name == "reference"]
    assert [step.name for step in references] == ["reference/world_facts"]
    assert references[0].fingerprint != planned("chat", "lora")["reference/world_facts"].fingerprint
    in_qa = planned("qa", "lora", answer_end="turn")  # it has no effect there
    assert in_qa[ROUND.format("lora")].fingerprint == planned("qa", "lora")[ROUND.format("lora")].fingerprint


def test_a_record_that_both_reference_columns_leave_out_is_shown_once() -> None:
    def left_out(*ids: str) -> Any:
        written = json.dumps([{"where": id_, "field": "target_new", "reason": "has no tokens"} for id_ in ids])
        return SimpleNamespace(record=SimpleNamespace(files=["skipped.json"]), read=lambda name: written)

    other = SimpleNamespace(record=SimpleNamespace(files=["curves.parquet"]))
    inputs: Any = [left_out("x/1", "x/2"), other, left_out("x/2", "x/3")]
    found = skipped(inputs)
    assert [entry["where"] for entry in found] == ["x/1", "x/2", "x/3"]


# The trainer, literally


def small_tokenizer() -> Any:
    """Bytes, and the ChatML template: its vocabulary is small, so a step is cheap."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    found = Tokenizer(models.BPE(vocab=letters, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<|im_end|>", chat_template=template)


OPPOSED = [fact | {"target_old": ", ".join([fact["target_new"]] * 3)} for fact in FACTS]
"""L_SFT raises what L_DPO lowers, so their gradients are in conflict."""

BATCH, MICROBATCH, EPOCHS, WARMUP, RATE = 4, 2, 5, 3, 2e-4  # six facts: batches of 4 and 2, 10 steps
RHO, BETA, LAMBDA = 0.05, 0.1, 1.0
VOCABULARY = 258


def published() -> RoundConfig:
    """The round of `corsa-published` as an experiment plans it."""
    step = planned("chat", "corsa-published", batch=BATCH, epochs=EPOCHS, warmup=WARMUP, learning_rate=RATE)
    config = step[ROUND.format("corsa-published")].config
    assert isinstance(config, RoundConfig)
    sized = {"lora": LORA, "step": config.step.model_copy(update={"microbatch": MICROBATCH, "rho": RHO})}
    return config.model_copy(update=sized)


def ours(config: RoundConfig, encoder: Encoder, folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors after the round; `folder/start` is the adapter before it."""
    model = tiny_model(vocabulary=VOCABULARY)
    rows = token_rows(encoder, OPPOSED)
    edits = with_reference(model, [Triplet(row["prompt"], row["new"], row["old"]) for row in rows])
    lora = shaken(Lora(model, LORA), 0.02)
    save_adapter(lora, folder / "start", "tiny")
    loaded = Loaded(model, lora, encoder, packed=True)
    train(
        config,
        Material(edits),
        loaded,
        WorkerContext(WorkerGroup(0, 1, CPU), Placement(), {}),
        (Store(folder), "x"),
        lambda line: None,
    )
    save_adapter(lora, folder / "end", "tiny")
    return load_file(folder / "end" / "adapter_model.safetensors")


def theirs(config: RoundConfig, tokenizer: Any, folder: Path) -> dict[str, Tensor]:
    """The authors' loop, literally, on a PEFT model that starts at `folder/start`."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import get_linear_schedule_with_warmup

    model = PeftModel.from_pretrained(tiny_model(vocabulary=VOCABULARY), str(folder / "start"), is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    orders = [batch_order(len(OPPOSED), BATCH, seed=config.seed, round_=1, epoch=epoch) for epoch in range(EPOCHS)]
    batches = [chosen for order in orders for chosen in order]
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, len(batches))
    for chosen in batches:
        parts = [chosen[i : i + MICROBATCH] for i in range(0, len(chosen), MICROBATCH)]
        total = [torch.zeros_like(p) for p in parameters]
        for part in parts:
            edits = [OPPOSED[i] for i in part]
            merged = merged_gradient(model, tokenizer, edits, parameters)
            length = torch.cat([g.flatten() for g in merged]).norm()
            kept = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p, g in zip(parameters, merged, strict=True):
                    p.add_(RHO * g / (length + 1e-12))
            sharp = merged_gradient(model, tokenizer, edits, parameters)
            with torch.no_grad():
                for p, before, t, g in zip(parameters, kept, total, sharp, strict=True):
                    p.copy_(before)
                    t.add_(g / len(parts))
        for p, g in zip(parameters, total, strict=True):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    assert len(batches) == 10
    return get_peft_model_state_dict(model)


def merged_gradient(model: Any, tokenizer: Any, edits: Sequence[Any], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The authors' PCGrad over [g_DPO, g_SFT], in sequence, then half the sum."""
    new, old = (logps(model, tokenizer, edits, f"target_{side}") for side in ("new", "old"))
    with torch.no_grad(), model.disable_adapter():
        base_new, base_old = (logps(model, tokenizer, edits, f"target_{side}")[0] for side in ("new", "old"))
    sft = -new[0].sum() / new[1]
    dpo = -F.logsigmoid(BETA * ((new[0] - base_new) - (old[0] - base_old))).mean()
    flat = []
    for loss in (LAMBDA * dpo, sft):
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        flat.append(torch.cat([g.flatten() for g in found]).double())
    for i, j in ((0, 1), (1, 0)):
        inner = flat[i] @ flat[j]
        if inner < 0:
            flat[i] = flat[i] - inner / (flat[j] @ flat[j]) * flat[j]
    merged = ((flat[0] + flat[1]) / 2).float()
    return [g.view_as(p) for g, p in zip(merged.split([p.numel() for p in parameters]), parameters, strict=True)]


def logps(model: Any, tokenizer: Any, edits: Sequence[Any], target: str) -> tuple[Tensor, int]:
    """Sums of log p over each answer's tokens, including the end of its turn; and the number of these tokens."""
    sums, tokens = [], 0
    for edit in edits:
        user = [{"role": "user", "content": edit["prompt"]}]
        text = tokenizer.apply_chat_template([*user, {"role": "assistant", "content": edit[target]}], tokenize=False)
        asked = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text + tokenizer.eos_token, add_special_tokens=False, return_tensors="pt")["input_ids"]
        start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        logits = model(input_ids=ids).logits[0, start - 1 : -1]
        sums.append(-F.cross_entropy(logits, ids[0, start:], reduction="sum"))
        tokens += len(ids[0]) - start
    return torch.stack(sums), tokens


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_ten_steps_end_with_the_adapter_of_the_authors_loop(tmp_path: Path) -> None:
    config, chat = published(), Encoder(small_tokenizer(), "chat", "turn")
    mine = ours(config, chat, tmp_path)
    literal = theirs(config, chat.tokenizer, tmp_path)
    start = load_file(tmp_path / "start" / "adapter_model.safetensors")
    assert distance(mine, start) > 5e-4, "nothing was learnt, so nothing was compared"
    assert distance(mine, literal) <= 1e-5
    changes: list[tuple[str, Any]] = [
        ("step", {"pcgrad": "symmetric"}),
        ("step", {"pcgrad": "off"}),
        ("step", {"scope": "step"}),
        ("training", {"first_rate": "above_zero"}),
    ]
    for part, change in changes:  # without any one of them the trainer is different
        other = config.model_copy(update={part: getattr(config, part).model_copy(update=change)})
        assert distance(ours(other, chat, tmp_path / str(change)), literal) > 1e-4, change
    assert distance(ours(config, Encoder(chat.tokenizer, "chat"), tmp_path / "end"), literal) > 1e-4
