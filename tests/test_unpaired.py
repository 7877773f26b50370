"""Edits without an old answer: L_SFT includes them; L_DPO omits them and is a mean over the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import END, Bench, round_config, triplets

from corsa.algorithm.packing import NO_OLD_ANSWER, Triplet
from corsa.algorithm.row_settings import RowSettings
from corsa.algorithm.step import Gradients, gradients
from corsa.config import Placement, StepConfig
from corsa.training.tokens import without_tokens
from corsa.training.worker_context import Share


def without_old(triplet: Triplet) -> Triplet:
    return replace(triplet, old=[], reference=(triplet.reference[0], NO_OLD_ANSWER))


def found(bench: Bench, edits: Sequence[Triplet], micro_batch: int = 16) -> Gradients:
    """Both gradients of a batch of these edits."""
    context = bench.context(Placement(micro_batch=micro_batch))
    phi = bench.loaded.lora.phi
    with torch.no_grad():
        phi.copy_(bench.start)
    batch = context.batch(bench.loaded, [Share(edits, [edits])], 1)
    return gradients(bench.loaded.model, phi, batch, RowSettings.of([StepConfig()], "cpu"), lambda t: t)


@pytest.mark.parametrize("micro_batch", [1, 16])
def test_dpo_is_a_mean_over_the_edits_with_an_old_answer(micro_batch: int) -> None:
    bench = Bench(triplets(4, long=(1, 3)))
    edits = [bench.edits[0], without_old(bench.edits[1]), without_old(bench.edits[2]), bench.edits[3]]
    mixed = found(bench, edits, micro_batch=micro_batch)
    whole = found(bench, bench.edits)
    paired = found(bench, [bench.edits[0], bench.edits[3]])
    torch.testing.assert_close(mixed.g[0], whole.g[0], rtol=1e-4, atol=1e-6)  # L_SFT: all edits
    torch.testing.assert_close(mixed.g[1], paired.g[1], rtol=1e-4, atol=1e-6)  # L_DPO: the pairs
    torch.testing.assert_close(mixed.sums[1], paired.sums[1], rtol=1e-5, atol=1e-6)


def test_without_any_old_answer_only_sft_teaches() -> None:
    bench = Bench(triplets(3))
    alone = found(bench, [without_old(t) for t in bench.edits])
    assert not alone.g[1].any()
    assert alone.sums[1] == 0
    torch.testing.assert_close(alone.g[0], found(bench, bench.edits).g[0], rtol=1e-4, atol=1e-6)


def test_a_round_of_unpaired_edits_is_the_same_as_without_dpo(tmp_path: Path) -> None:
    bench = Bench(triplets(3))
    edits = [without_old(t) for t in bench.edits]
    corsa = bench.train(round_config(), tmp_path / "corsa", edits=edits)
    sft = bench.train(round_config(step={"lambda": 0.0}), tmp_path / "sft", edits=edits)
    assert not any(row["skipped"] for row in corsa.curves)
    torch.testing.assert_close(corsa.phi, sft.phi, rtol=1e-4, atol=1e-6)


def test_an_old_answer_that_is_not_there_is_no_fault_of_the_data() -> None:
    assert without_tokens({"new": [5, END], "old": []}) is None
    assert without_tokens({"new": [5, END], "old": [END]}) == "target_old"
    assert without_tokens({"new": [END], "old": []}) == "target_new"
