"""The training of a round: alone and in a group, in parts of any size, with interruptions and failures."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from tiny import CPU, EDITS, ROUNDS, Bench, Mortal, Trained, round_config, triplets, with_one_bad_reference
from torch import nn
from worker_processes import two_workers

from corsa.algorithm.packing import TAUGHT
from corsa.algorithm.step import corsa_step
from corsa.config import Placement, StepConfig
from corsa.flow import Store
from corsa.training import checkpoint
from corsa.training.adamw import PlainAdamW
from corsa.training.checkpoint import Position, load_checkpoint, save_checkpoint
from corsa.training.loop import CURVES, RoundFailedError, _own_parts
from corsa.training.tokens import REFERENCE, TokenTable, batch_order, token_rows, without_tokens
from corsa.training.worker_context import Share
from corsa.training.worker_group import WorkerGroup

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[subprocess.Popen[str]]]:
    """Two workers of a gloo group, started before they are needed."""
    folder = tmp_path_factory.mktemp("group")
    with two_workers(tiny, folder) as workers:
        yield workers


@pytest.fixture(scope="module")
def found(group: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """The final state of each of the two workers."""
    for worker in group:
        said = worker.communicate(timeout=240)[0]
        assert worker.returncode == 0, said
    folder = Path(str(group[0].args[-1]))  # type: ignore[index]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def bench(group: list[subprocess.Popen[str]]) -> Bench:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Bench(triplets(EDITS))
    torch.set_num_threads(threads)
    return made


@pytest.fixture(scope="module")
def alone(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """The results of the same rounds on one process."""
    return {name: bench.train(config, tmp_path_factory.mktemp("alone")) for name, config in ROUNDS.items()}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def without_seconds(curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in curves]


# Batches


@pytest.mark.parametrize(("edits", "batch"), [(1, 16), (7, 4), (16, 16), (17, 16), (33, 4)])
def test_every_edit_is_seen_once_an_epoch(edits: int, batch: int) -> None:
    for epoch in range(3):
        batches = batch_order(edits, batch, seed=1, round_=2, epoch=epoch)
        assert sorted(i for chosen in batches for i in chosen) == list(range(edits))
        assert [len(b) for b in batches[:-1]] == [batch] * (len(batches) - 1)
        assert 1 <= len(batches[-1]) <= batch


def test_order_follows_from_seed_round_and_epoch() -> None:
    def order(seed: int = 0, round_: int = 1, epoch: int = 0) -> list[int]:
        return np.concatenate(batch_order(50, 16, seed=seed, round_=round_, epoch=epoch)).tolist()

    assert order() == order()
    different = [order(), order(seed=1), order(round_=2), order(epoch=1)]
    assert len({tuple(o) for o in different}) == 4


@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_workers_share_a_batch_out_and_nothing_twice(scope: str) -> None:
    """The parts of any number of workers together are the unchanged batch. A perturbation's edits stay together."""
    step = StepConfig.model_validate({"scope": scope, "microbatch": 3})
    for chosen in batch_order(33, 16, seed=1, round_=1, epoch=0):
        units = {tuple(part) for part in _own_parts(chosen, step, WorkerGroup(0, 1, CPU))}
        for size in (2, 3, 5, 40):
            parts = [part for rank in range(size) for part in _own_parts(chosen, step, WorkerGroup(rank, size, CPU))]
            assert sorted(i for part in parts for i in part) == sorted(chosen)
            if scope == "microbatch":
                assert {tuple(part) for part in parts} == units


# One process and two


@pytest.mark.process
@pytest.mark.parametrize("name", ROUNDS)
def test_one_and_two_workers_end_with_the_same_adapter(
    name: str, alone: dict[str, Trained], found: list[dict[str, Any]], bench: Bench
) -> None:
    phi, curves = found[0][name]
    assert distance(phi, alone[name].phi) <= TOLERANCE
    assert distance(phi, bench.start) > 50 * TOLERANCE, "nothing was learnt, so nothing was compared"
    assert torch.equal(phi, found[1][name][0])
    assert len(curves) == len(alone[name].curves)
    for ours, theirs in zip(curves, alone[name].curves, strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss_sft"] == pytest.approx(theirs["loss_sft"], rel=1e-4)
        assert ours["conflict"] == theirs["conflict"]


def test_the_compared_rounds_have_conflicts_and_odd_batches(alone: dict[str, Trained]) -> None:
    assert sum(row["conflict"] for row in alone["corsa"].curves) >= 4
    assert sum(row["conflict"] for row in alone["authors, summed over tokens"].curves) >= 4
    assert [row["step"] for row in alone["fewer edits than workers"].curves] == list(range(1, 10))  # 3 + 3 + 1 edits
    phis = [trained.phi for trained in alone.values()]
    assert min(distance(a, b) for i, a in enumerate(phis) for b in phis[:i]) > 10 * TOLERANCE


def test_a_bad_gradient_on_one_worker_skips_the_step_on_all(
    found: list[dict[str, Any]], bench: Bench, tmp_path: Path
) -> None:
    trained = bench.train(ROUNDS["corsa"], tmp_path, edits=with_one_bad_reference(bench.edits))
    for worker in found:
        phi, curves = worker["nan"]
        assert [row["skipped"] for row in curves] == [row["skipped"] for row in trained.curves]
        assert distance(phi, trained.phi) <= TOLERANCE
        assert "2 of " in worker["failed"]
    assert sum(row["skipped"] for row in trained.curves) == 3  # once an epoch


def test_two_workers_go_on_from_a_checkpoint(found: list[dict[str, Any]]) -> None:
    for worker in found:
        assert torch.equal(worker["resumed"][0], worker["corsa"][0])
    assert without_seconds(found[0]["resumed"][1]) == without_seconds(found[0]["corsa"][1])


def test_the_leader_collects_and_shares(found: list[dict[str, Any]]) -> None:
    assert found[0]["collected"] == ["row of 0", "row of 1"]
    assert found[1]["collected"] == []
    assert [worker["shared"] for worker in found] == ["text of 0"] * 2


# Accumulation


def test_accumulation_does_not_change_the_result(tmp_path: Path, bench: Bench) -> None:
    several = Bench(triplets(16, seed=5, long=(3,)))
    config = round_config(batch=16, epochs=3)
    phis = {size: several.train(config, tmp_path / str(size), micro_batch=size).phi for size in (1, 4, 16)}
    assert distance(phis[1], phis[16]) <= TOLERANCE
    assert distance(phis[4], phis[16]) <= TOLERANCE
    assert distance(phis[16], several.start) > 30 * TOLERANCE


def test_a_perturbation_s_edits_are_never_cut(bench: Bench, tmp_path: Path) -> None:
    context = bench.context(Placement(micro_batch=1))
    edits = bench.edits
    parts = [edits[:4], edits[4:]]
    batch = context.batch(bench.loaded, [Share(edits, parts)], unit=4)
    assert [part.edits for part in batch.parts] == [4, 3]
    assert (batch.edits, batch.counts[TAUGHT].tokens) == (7, sum(len(t.new) for t in edits))
    assert [part.edits for part in context.batch(bench.loaded, [Share(edits, [edits])], unit=1).parts] == [1] * 7
    config = round_config(step={"scope": "microbatch", "microbatch": 2})
    small, large = (bench.train(config, tmp_path / str(size), micro_batch=size).phi for size in (1, 16))
    assert torch.equal(small, large)


def test_a_micro_batch_holds_neighbours_in_length(bench: Bench) -> None:
    edits = triplets(8, seed=2)
    batch = bench.context(Placement(micro_batch=4)).batch(bench.loaded, [Share(edits, [edits])], unit=1)
    tokens = [int(part.rows[0].input_ids.count_nonzero()) for part in batch.parts]
    lengths = sorted(len(t.prompt) + len(t.new) + len(t.old) for t in edits)
    assert tokens == [sum(lengths[:4]), sum(lengths[4:])]


# Checkpoints


class LostError(Exception):
    """The exception that interrupts a round."""


def interrupted(bench: Bench, folder: Path, at: int, every: int) -> None:
    """Trains until step `at` has been posted, with a checkpoint after every `every` steps."""

    def post(line: dict[str, Any]) -> None:
        if line["step"] == at:
            raise LostError

    with pytest.raises(LostError):
        bench.train(ROUNDS["fewer edits than workers"], folder, post=post, checkpoint_every=every)


@pytest.mark.parametrize(("at", "every"), [(5, 2), (3, 3), (8, 1), (1, 2)])
def test_an_interrupted_round_ends_as_an_undisturbed_one(
    bench: Bench, alone: dict[str, Trained], tmp_path: Path, at: int, every: int
) -> None:
    """Interrupts in the middle of an epoch, at its end, after the second-last checkpoint, and before the first one."""
    undisturbed = alone["fewer edits than workers"]
    interrupted(bench, tmp_path, at, every)
    steps: list[int] = []
    resumed = bench.train(ROUNDS["fewer edits than workers"], tmp_path, post=lambda line: steps.append(line["step"]))
    assert steps == list(range(at // every * every + 1, 10))
    assert torch.equal(resumed.phi, undisturbed.phi)
    assert without_seconds(resumed.curves) == without_seconds(undisturbed.curves)


@pytest.mark.parametrize("at", [2, 5])
def test_what_is_used_again_of_a_perturbed_step_is_in_the_checkpoint(
    bench: Bench, alone: dict[str, Trained], tmp_path: Path, at: int
) -> None:
    """Steps 1, 4 and 7 are perturbed."""
    config = ROUNDS["perturbed in every third step"]

    def post(line: dict[str, Any]) -> None:
        if line["step"] == at:
            raise LostError

    with pytest.raises(LostError):
        bench.train(config, tmp_path, post=post, checkpoint_every=1)
    resumed = bench.train(config, tmp_path)
    undisturbed = alone["perturbed in every third step"]
    assert torch.equal(resumed.phi, undisturbed.phi)
    assert without_seconds(resumed.curves) == without_seconds(undisturbed.curves)
    assert [row["step"] for row in resumed.curves if row["sharpness"] is not None] == [1, 4, 7]


def test_a_finished_round_is_not_trained_again(bench: Bench, alone: dict[str, Trained], tmp_path: Path) -> None:
    first = bench.train(ROUNDS["corsa"], tmp_path)
    steps: list[Any] = []
    again = bench.train(ROUNDS["corsa"], tmp_path, post=steps.append)
    assert steps == []
    assert torch.equal(again.phi, alone["corsa"].phi)
    assert again.curves == first.curves


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "zeros", "one bit"])
def test_a_damaged_checkpoint_starts_over_and_says_so(
    bench: Bench, alone: dict[str, Trained], tmp_path: Path, damage: str
) -> None:
    interrupted(bench, tmp_path, 5, 2)
    file = tmp_path / "partial" / "x"
    whole = file.read_bytes()
    contents = {
        "empty": b"",
        "garbage": b"no checkpoint" * 100,
        "truncated": whole[: len(whole) // 2],
        "zeros": bytes(len(whole)),
        "one bit": whole[:500]
        + bytes([whole[500] ^ 1])
        + whole[501:],  # in the data: the file is still valid safetensors
    }
    file.write_bytes(contents[damage])
    steps: list[int] = []
    resumed = bench.train(ROUNDS["fewer edits than workers"], tmp_path, post=lambda line: steps.append(line["step"]))
    assert resumed.notes == [
        f"the checkpoint {file} is not what was written (SHA-256): the round was started again",
    ]
    assert steps[0] == 1
    assert torch.equal(resumed.phi, alone["fewer edits than workers"].phi)


def test_a_checkpoint_holds_all_that_a_step_depends_on(tmp_path: Path) -> None:
    store, group = Store(tmp_path), WorkerGroup(0, 1, CPU)
    phi = nn.Parameter(torch.randn(1, 50))
    optimizer = PlainAdamW(phi)
    for _ in range(3):
        phi.grad = torch.randn(1, 50)
        optimizer.step()
    position = Position(3, [{"step": 1, "loss_sft": math.nan, "cosine": None}])
    save_checkpoint(store, "partial/x", phi, optimizer, position, group)
    other = nn.Parameter(torch.zeros(1, 50))
    fresh = PlainAdamW(other)
    found = load_checkpoint(store, "partial/x", other, fresh, group)
    assert found.step == 3
    assert math.isnan(found.curves[0].pop("loss_sft"))
    assert found.curves == [{"step": 1, "cosine": None}]
    for p in (phi, other):
        p.grad = torch.ones(1, 50)
    optimizer.step()
    fresh.step()
    assert torch.equal(phi.detach(), other.detach())


def test_without_a_checkpoint_a_round_starts_where_phi_is(tmp_path: Path) -> None:
    phi = nn.Parameter(torch.ones(1, 5))
    optimizer = PlainAdamW(phi)
    assert load_checkpoint(Store(tmp_path), "partial/x", phi, optimizer, WorkerGroup(0, 1, CPU)) == Position()
    assert torch.equal(phi.detach(), torch.ones(1, 5))
    assert not optimizer.state


def test_a_worker_lost_in_the_middle_of_a_step_leaves_phi_to_the_checkpoint(
    bench: Bench, alone: dict[str, Trained], tmp_path: Path
) -> None:
    with pytest.raises(ConnectionError):  # between the two phases of a step: phi is perturbed
        bench.train(ROUNDS["corsa"], tmp_path, group=Mortal(0, 1, CPU, sums=4 * 3 + 2), checkpoint_every=1)
    assert torch.equal(bench.train(ROUNDS["corsa"], tmp_path).phi, alone["corsa"].phi)


def test_each_round_has_a_fresh_optimizer_with_the_stated_settings(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.optim.Optimizer, bool, float]] = []

    def spy(
        model: Any, phi: Any, batch: Any, step: Any, optimizer: Any, clip: float, reduce: Any, *more: Any
    ) -> list[dict[str, Any]]:
        seen.append((optimizer, bool(optimizer.state), clip))
        return corsa_step(model, phi, batch, step, optimizer, clip, reduce, *more)

    monkeypatch.setattr("corsa.training.loop.corsa_step", spy)
    for name in ("first", "second"):
        bench.train(round_config(epochs=1, clip=0.7), tmp_path / name)
    assert [begun for _, begun, _ in seen] == [False, True] * 2
    for optimizer, _, clip in seen:
        assert isinstance(optimizer, torch.optim.AdamW)
        (settings,) = optimizer.param_groups
        assert (settings["betas"], settings["eps"], settings["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.0)
        assert clip == 0.7


# Curves of the loop


def test_curves_fit_their_table_and_tell_of_every_step(alone: dict[str, Trained]) -> None:
    for trained in alone.values():
        table = pa.Table.from_pylist(trained.curves, schema=CURVES)
        assert set(CURVES.names) == {"method", *trained.curves[0]}
        assert table["step"].to_pylist() == list(range(1, len(trained.curves) + 1))
        assert set(table["seed"].to_pylist()) == {3}
        assert not any(table["skipped"].to_pylist())
    assert [row["epoch"] for row in alone["corsa"].curves] == [1, 1, 2, 2, 3, 3]
    rates = [row["learning_rate"] for row in alone["corsa"].curves]
    assert rates == pytest.approx([1e-4, 2e-4, 2e-4, 1.5e-4, 1e-4, 0.5e-4])
    assert all(row["cosine"] is None and row["loss_dpo"] is None for row in alone["lora"].curves)
    assert all(row["sharpness"] is None for row in alone["lora"].curves)


def test_progress_is_posted_after_every_step(bench: Bench, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    bench.train(ROUNDS["corsa"], tmp_path, post=lines.append)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 1), (1, 2), (2, 3), (2, 4), (3, 5), (3, 6)]
    assert {(line["epochs"], line["steps"]) for line in lines} == {(3, 6)}
    assert lines[-1]["eta_s"] == 0
    assert all(line["eta_s"] > 0 and math.isfinite(line["loss"]) for line in lines[:-1])


# Failures


def test_steps_that_are_not_finite_are_skipped_and_counted(bench: Bench, tmp_path: Path) -> None:
    bad = [replace(t, reference=(math.nan, 0.0)) for t in bench.edits]
    trained = bench.train(round_config(max_skipped=6), tmp_path, edits=bad)
    assert torch.equal(trained.phi, bench.start)
    assert [row["skipped"] for row in trained.curves] == [True] * 6
    pa.Table.from_pylist(trained.curves, schema=CURVES)
    again = bench.train(round_config(max_skipped=6), tmp_path, edits=bad)  # its checkpoint has no moments
    assert torch.equal(again.phi, bench.start)


def test_a_round_stops_after_too_many_of_them(bench: Bench, tmp_path: Path) -> None:
    bad = [replace(t, reference=(math.nan, 0.0)) for t in bench.edits]
    with pytest.raises(RoundFailedError) as caught:
        bench.train(round_config(max_skipped=2), tmp_path, edits=bad)
    said = str(caught.value)
    assert said.startswith("round 1: 3 of 3 steps had a non-finite gradient, the last being step 3.")
    for remedy in ("--training.learning-rate (now 0.0002)", "--corsa.rho", "--dtype float32"):
        assert remedy in said
    assert torch.equal(bench.loaded.lora.phi.detach(), bench.start)


def test_one_bad_step_leaves_no_trace_in_the_others(bench: Bench, tmp_path: Path) -> None:
    """A skipped step changes neither the moments nor phi."""
    seen: list[torch.Tensor] = []
    bench.train(
        round_config(),
        tmp_path,
        edits=with_one_bad_reference(bench.edits),
        post=lambda line: seen.append(bench.loaded.lora.phi.detach().clone()),
    )
    phis = [bench.start, *seen]
    trained = bench.train(round_config(), tmp_path, edits=with_one_bad_reference(bench.edits))
    for row, before, after in zip(trained.curves, phis[:-1], phis[1:], strict=True):
        assert torch.equal(before, after) is row["skipped"]
        assert after.isfinite().all()


def test_a_round_without_edits_is_refused(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(RoundFailedError, match="round 1 has no edits to teach: lower --rounds"):
        bench.train(round_config(), tmp_path, edits=[])


def test_an_edit_that_would_be_missed_is_an_error(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corsa.training.loop._own_parts", lambda chosen, step, group: [chosen[1:]])
    with pytest.raises(AssertionError, match="epoch 1: 2 edits were not seen exactly once"):
        bench.train(round_config(), tmp_path)


# The token table


def rows() -> list[dict[str, Any]]:
    return [
        {"id": f"x/{i}", "prompt": [i, 1], "new": [2] * (i + 1), "old": [3]}
        | {"reference_new": -1.0 - i, "reference_old": -2.0}
        for i in range(7)
    ]


def test_token_table_gives_back_what_was_put_in() -> None:
    whole = pa.Table.from_pylist(rows(), schema=REFERENCE)
    tables = {
        "one": TokenTable([whole]),
        "slices": TokenTable([whole.slice(0, 3), whole.slice(3, 3), whole.slice(6)]),
        "batches": TokenTable(whole.to_batches(max_chunksize=2)),
        "part": TokenTable([whole.slice(2, 4)]),
    }
    for name, table in tables.items():
        expected = rows()[2:6] if name == "part" else rows()
        assert len(table) == len(expected)
        for row in expected:
            t = table.triplet(row["id"])
            assert (t.prompt, t.new, t.old) == (row["prompt"], row["new"], row["old"])
            assert t.reference == (row["reference_new"], row["reference_old"])
    assert "x/6" in tables["one"]
    assert "x/6" not in tables["part"]


def test_token_table_without_edits() -> None:
    table = TokenTable([])
    assert len(table) == 0
    assert "x/0" not in table


def test_token_table_is_compact() -> None:
    """An edit of a hundred tokens takes at most half of 1 KB in the arrays; the other half is for its id."""
    many = [{"id": f"counterfact/{i}", "prompt": [1] * 60, "new": [2] * 20, "old": [3] * 20} for i in range(500)]
    many = [row | {"reference_new": 0.0, "reference_old": 0.0} for row in many]
    table = TokenTable([pa.Table.from_pylist(many, schema=REFERENCE)])
    arrays = [array for pair in table._tokens.values() for array in pair] + [table._reference]
    assert sum(array.nbytes for array in arrays) / 500 < 512


def test_token_row_marks_answers_without_tokens(encoder: Any) -> None:
    (row,) = token_rows(encoder, [{"id": "x", "prompt": "Who leads Acme?", "target_new": "Bo", "target_old": "Al Ahn"}])
    assert encoder.tokenizer.decode(row["prompt"]) == "Q: Who leads Acme?\nA:"
    assert encoder.tokenizer.decode(row["new"]).startswith(" Bo")
    assert without_tokens(row) is None
    assert without_tokens({**row, "new": row["new"][-1:]}) == "target_new"
    assert without_tokens({**row, "old": row["old"][-1:]}) == "target_old"


def test_all_checkpoints_of_a_round_grow_with_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with their square: the rows of finished segments are written once."""
    monkeypatch.setattr(checkpoint, "SEGMENT", 50)
    phi, group = torch.nn.Parameter(torch.zeros(1, 4)), WorkerGroup(0, 1, CPU)

    def written(steps: int) -> int:
        store, position, total = Store(tmp_path / str(steps)), Position(), 0
        replace_file = store.files.replace

        def counted(path: str, content: bytes) -> None:
            nonlocal total
            total += len(content)
            replace_file(path, content)

        store.files.replace = counted  # type: ignore[method-assign]
        for step in range(1, steps + 1):
            position.add({"step": step, "loss_sft": step / 7})
            if step % 10 == 0:
                save_checkpoint(store, "partial/x", phi, PlainAdamW(phi), position, group)
        found = load_checkpoint(store, "partial/x", phi, PlainAdamW(phi), group)
        assert found.curves == position.curves
        assert found.step == steps
        return total

    small, large = written(500), written(2000)
    assert large < 4.2 * small  # 13 times as much if every checkpoint held all rows

    (tmp_path / "2000/partial/x.curves3").write_bytes(b"[]")
    again = load_checkpoint(Store(tmp_path / "2000"), "partial/x", phi, PlainAdamW(phi), group)
    assert (again.step, again.curves) == (0, [])
    assert "curves of the checkpoint" in again.notes[0]
