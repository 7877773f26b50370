"""The packed triplet: one row gives both answers the same log-probabilities as separate rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import CPU, END, FAMILIES, LORA, SLIDING, round_config, shaken, tiny_model, triplets
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices

from corsa.algorithm.logprobs import answer_logprobs, packing_is_exact
from corsa.algorithm.packing import PADDING, SAVING, WIDEST, Rows, Triplet, pack
from corsa.config import Placement
from corsa.lora.flat import Lora
from corsa.training.worker_context import Share, WorkerContext
from corsa.training.worker_group import WorkerGroup

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny model of each family, with LoRA whose factors are all non-zero."""
    found = tiny_model(request.param)
    shaken(Lora(found, LORA))
    return found


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def mixed() -> list[Triplet]:
    """Eight edits. Two have answers too long to be packed; one has an answer of only the end token."""
    edits = triplets(8, long=(1, 4))
    return [*edits[:7], replace(edits[7], new=[END])]


def one_by_one(model: Any, edits: Sequence[Triplet]) -> Tensor:
    """The reference: a forward pass per answer, no mask, no positions, all logits."""
    sums = []
    for side in ("new", "old"):
        for t in edits:
            answer = list(getattr(t, side))
            logits = model(input_ids=torch.tensor([[*t.prompt, *answer]]), use_cache=False).logits[0]
            logp = logits[len(t.prompt) - 1 : -1].log_softmax(-1)
            sums.append(logp[range(len(answer)), answer].sum())
    return torch.stack(sums).view(2, len(edits))


@pytest.mark.parametrize("packed", [True, False])
def test_logprobs_are_those_of_plain_forwards(model: Any, packed: bool) -> None:
    edits = mixed()
    found = answer_logprobs(model, pack(edits, packed=packed), len(edits))
    torch.testing.assert_close(found, one_by_one(model, edits), rtol=1e-5, atol=1e-4)


def test_what_does_not_pack_runs_beside_what_does() -> None:
    edits = mixed()
    assert [t.packs for t in edits] == [True, False, True, True, False, True, True, True]
    packed, plain = pack(edits)
    assert packed.mask is not None
    assert plain.mask is None
    assert {*packed.answer.tolist()} == {0, 2, 3, 5, 6, 7, 8, 10, 11, 13, 14, 15}
    assert len(plain.input_ids) == 2 * 2
    assert {*packed.answer.tolist(), *plain.answer.tolist()} == set(range(16))
    (unpacked,) = pack(edits, packed=False)
    assert unpacked.mask is None
    assert len(unpacked.input_ids) == 16
    assert [rows.mask is None for rows in pack([edits[1]])] == [True]
    assert [rows.mask is None for rows in pack([edits[0]])] == [False]


def test_an_edit_packs_if_a_fifth_of_its_tokens_is_saved() -> None:
    assert SAVING == 0.2
    assert Triplet([1] * 10, [1] * 15, [1] * 15).packs  # 40 tokens instead of 50
    assert not Triplet([1] * 10, [1] * 15, [1] * 16).packs


def test_answers_do_not_see_each_other(model: Any) -> None:
    edits = triplets(4)
    base = answer_logprobs(model, pack(edits), 4)
    other_new = [replace(t, new=t.new[::-1]) for t in edits]
    changed = answer_logprobs(model, pack(other_new), 4)
    assert torch.equal(changed[1], base[1])
    assert not torch.isclose(changed[0], base[0]).any()
    other_old = [replace(t, old=[5, *t.old[1:]]) for t in edits]
    changed = answer_logprobs(model, pack(other_old), 4)
    assert torch.equal(changed[0], base[0])
    assert not torch.isclose(changed[1], base[1]).any()


def test_padding_has_no_effect(model: Any) -> None:
    edits = mixed()
    alone = torch.cat([answer_logprobs(model, pack([t]), 1) for t in edits], dim=1)
    torch.testing.assert_close(answer_logprobs(model, pack(edits), len(edits)), alone, rtol=1e-5, atol=1e-4)


def test_next_to_nothing_is_padded_whatever_the_lengths() -> None:
    edits = [Triplet([1] * length, [1, END], [2, END]) for length in (40, 22, 12, 11, 10, 9, 8, 7)]
    (rows,) = pack(edits)
    needed = sum(map(len, edits))
    assert needed <= rows.input_ids.numel() <= PADDING * needed
    several = pack([*edits, *triplets(8)], adapters=2)[0].input_ids  # each adapter has the same number of rows
    assert len(several) % 2 == 0
    assert {*several[: len(several) // 2].flatten().tolist()} <= {0, 1, 2, END}


def test_rows_of_long_edits_are_no_wider_than_their_mask_may_be() -> None:
    edits = [Triplet([1] * length, [1, END], [2, END]) for length in (1600, 900, 800, 700, 300)]
    (rows,) = pack(edits)
    assert rows.input_ids.shape[1] <= WIDEST
    (alone,) = pack([Triplet([1] * (2 * WIDEST), [1, END], [2, END])])
    assert alone.input_ids.shape[1] > WIDEST, "a single edit is as long as it is"


def test_an_answer_without_tokens_takes_none(model: Any) -> None:
    edits = triplets(4)
    new_alone = [replace(t, old=()) for t in edits]
    (rows,) = pack(new_alone)
    assert rows.keep.sum() == sum(len(t.new) for t in edits)
    expected = one_by_one(model, edits)[0]
    torch.testing.assert_close(answer_logprobs(model, [rows], 4)[0], expected, rtol=1e-5, atol=1e-4)
    assert answer_logprobs(model, [rows], 4)[1].tolist() == [0.0] * 4


def test_the_head_sees_the_answers_positions_alone(model: Any) -> None:
    seen: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.reshape(-1, output.shape[-1]).shape[0])
    )
    edits = mixed()
    answer_logprobs(model, pack(edits), len(edits))
    hook.remove()
    packed = [t for t in edits if t.packs]
    plain = [t for t in edits if not t.packs]
    # the last token of the prompt predicts both first tokens of a packed row
    assert seen == [sum(len(t.new) + len(t.old) - 1 for t in packed), sum(len(t.new) + len(t.old) for t in plain)]


def test_plain_rows_keep_the_causal_kernel() -> None:
    """Position ids that restart inside a row would make transformers build a dense mask."""
    (rows,) = pack(mixed(), packed=False)
    assert find_packed_sequence_indices(rows.position_ids) is None


def test_masks_can_be_half_precision() -> None:
    rows = pack(triplets(2), dtype=torch.bfloat16)[0]
    assert rows.mask is not None
    assert rows.mask.dtype == torch.bfloat16
    assert rows.mask.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_is_found_exact_in_bfloat16_too(family: str) -> None:
    model = tiny_model(family).to(torch.bfloat16)  # type: ignore[arg-type]
    assert packing_is_exact(model, mixed(), torch.bfloat16, CPU)


def test_packing_is_found_exact(model: Any) -> None:
    assert packing_is_exact(model, triplets(4), torch.float32, CPU)


@pytest.mark.parametrize("ignored", ["position_ids", "attention_mask"])
def test_a_family_that_ignores_positions_or_masks_is_detected(model: Any, ignored: str) -> None:
    def other(**inputs: Any) -> Any:
        return model(**{**inputs, ignored: None})

    assert not packing_is_exact(other, triplets(4), torch.float32, CPU)


def test_a_window_shorter_than_the_rows_is_detected() -> None:
    """A custom mask replaces the window's mask, so rows longer than the window cannot be packed."""
    model = tiny_model("gemma", **SLIDING)
    assert not packing_is_exact(model, triplets(4), torch.float32, CPU)
    found = answer_logprobs(model, pack(triplets(4), packed=False), 4)
    torch.testing.assert_close(found, one_by_one(model, triplets(4)), rtol=1e-5, atol=1e-4)


def test_the_workshop_falls_back_to_plain_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def place(group: WorkerGroup, config: Any) -> Any:
        model = tiny_model()
        model.register_forward_pre_hook(lambda m, args, kw: (args, {**kw, "position_ids": None}), with_kwargs=True)
        return model

    monkeypatch.setattr(WorkerGroup, "place", place)
    monkeypatch.setattr("corsa.training.worker_context.load_tokenizer", lambda config: None)
    context = WorkerContext(WorkerGroup(0, 1, CPU), Placement(), {})
    edits = triplets(5)
    loaded = context.open(round_config(), edits[:4])
    assert loaded.packed is False
    assert "random:tiny-llama treats packed rows differently" in capsys.readouterr().out
    batch = context.batch(loaded, [Share(edits, [edits])], unit=1)
    (part,) = batch.parts
    assert [rows.mask for rows in part.rows] == [None]
    found = answer_logprobs(loaded.model, part.rows, 5)
    in_order = sorted(edits, key=lambda t: len(t.prompt) + len(t.new) + len(t.old))
    torch.testing.assert_close(found, one_by_one(tiny_model(), in_order), rtol=1e-5, atol=1e-4)


def test_the_workshop_packs_where_it_is_exact(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("corsa.training.worker_context.load_tokenizer", lambda config: None)
    context = WorkerContext(WorkerGroup(0, 1, CPU), Placement(), {})
    loaded = context.open(round_config(), triplets(4))
    assert loaded.packed is True
    assert capsys.readouterr().out == ""
    assert context.open(round_config(), triplets(4)) is loaded, "a model is loaded once"


def test_rows_move_as_a_whole() -> None:
    rows = pack(triplets(2))[0].to("meta")
    assert all(getattr(rows, name).device.type == "meta" for name in Rows.__dataclass_fields__)
