"""The training of one round: epochs over its edits, resumed from its last checkpoint, every edit once an epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from corsa.algorithm.learning_rate import learning_rate
from corsa.algorithm.objectives import update_loss
from corsa.algorithm.row_settings import RowSettings
from corsa.algorithm.sam import LookSam, random_direction
from corsa.algorithm.step import corsa_step
from corsa.config import StepConfig
from corsa.config.steps import RoundConfig
from corsa.errors import CorsaError
from corsa.flow.store import Store
from corsa.training.adamw import Moments, PackedAdamW, Stepping
from corsa.training.checkpoint import Position, WithLook, load_checkpoint, save_checkpoint
from corsa.training.mixing import Material
from corsa.training.preemption import PreemptionWatch
from corsa.training.worker_context import Loaded, Share, WorkerContext
from corsa.training.worker_group import WorkerGroup

CURVES = pa.schema(
    [
        ("method", pa.string()),  # null until a report sets it
        ("seed", pa.int32()),
        ("round", pa.int32()),
        ("step", pa.int32()),
        ("epoch", pa.int32()),
        ("loss_sft", pa.float64()),
        ("loss_dpo", pa.float64()),
        ("logp_new", pa.float64()),  # nats, mean over the batch's edits, before the update
        ("logp_old", pa.float64()),
        # Of g_SFT and g_DPO at phi, the smallest of all pairs if there are more objectives; null with one objective.
        # Scope microbatch: mean over micro-batches, weighted by edits.
        ("cosine", pa.float64()),
        # Whether the cosine is below 0; null with one objective. Scope microbatch: below 0 in at least one micro-batch.
        ("conflict", pa.bool_()),
        # L_Update(phi + e) - L_Update(phi); null if the step was not perturbed. Scope microbatch: each micro-batch has
        # its own e; mean weighted by edits.
        ("sharpness", pa.float64()),
        # |g_PC(phi + e) - g_PC(phi)| / |g_PC(phi)|; null if the step was not perturbed. Scope microbatch: as sharpness.
        ("gradient_change", pa.float64()),
        # Edits of the batch whose new answer was not above `training.stop_above`, at phi; null without that setting.
        ("below", pa.int32()),
        ("grad_norm", pa.float64()),
        ("learning_rate", pa.float64()),
        ("seconds", pa.float64()),
        ("skipped", pa.bool_()),
    ]
)
"""One row per optimizer step."""


def curves_table(curves: Sequence[dict[str, Any]]) -> pa.Table:
    """The table of these rows: `CURVES`, and a column `loss_NAME` of each further objective that was run."""
    found = {name: None for row in curves for name in row if name.startswith("loss_") and name not in CURVES.names}
    further = [(name, pa.float64()) for name in found]
    return pa.Table.from_pylist(list(curves), schema=pa.schema([*CURVES, *further]))


class RoundFailedError(CorsaError):
    """A round failed and would fail again on a retry. Every worker raises it at the same step."""


@dataclass(frozen=True)
class RoundRun:
    """A round to train, and where the store keeps its checkpoint."""

    config: RoundConfig
    checkpoint: tuple[Store, str]


AtEpoch = Callable[[int], None]
"""Called on every worker with the number of finished epochs."""


def train(
    config: RoundConfig,
    material: Material,
    loaded: Loaded,
    context: WorkerContext,
    checkpoint: tuple[Store, str],
    post: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Train one round, as `train_together`. Returns its curves, or raises the error that stopped it."""
    (found,) = train_together([RoundRun(config, checkpoint)], material, loaded, context, post)
    if isinstance(found, RoundFailedError):
        raise found
    return found


def train_together(
    round_runs: Sequence[RoundRun],
    material: Material,
    loaded: Loaded,
    context: WorkerContext,
    post: Callable[[dict[str, Any]], None],
    at_epoch: AtEpoch = lambda epochs: None,
) -> list[list[dict[str, Any]] | RoundFailedError]:
    """Train phi through all epochs, from its current values or each row from its round's last checkpoint.

    Args:
        round_runs: one round per row of phi. They may differ only in seed, lambda, beta, rho and learning rate.
        material: the edits to teach, with their reference, and those to teach again beside them.
        loaded: the model; its `phi` is trained in place.
        context: this worker's context.
        post: called with a line for the progress display.
        at_epoch: called at the end of every epoch trained here.

    Returns:
        For each round, its rows of the curves table without the method's name, rows before an interruption included;
        or the error that stopped it: too many steps had a non-finite gradient. The other rounds continue.

    Raises:
        RoundFailedError: the rounds have no edits.
        CorsaError: the rounds differ in a setting that rounds trained together must share.
    """
    group, phi = context.group, loaded.phi
    loaded.lora.trains_a = round_runs[0].config.training.ridge is None
    if not material.own:
        raise RoundFailedError(
            f"round {round_runs[0].config.round} has no edits to teach: lower --rounds, "
            "or give chains with as many updates"
        )
    _refuse_mixed([round_run.config for round_run in round_runs])
    optimizer, rows, kept = _optimizer(phi, group, len(round_runs))
    look, step = None, round_runs[0].config.step
    if step.sam and step.perturb_every > 1:
        look = LookSam(phi, step.perturb_every, step.reuse)
        kept = [WithLook(state, look) for state in kept]  # one round only: rounds with LookSAM are not trained together
    with closing(optimizer):
        row_states = [
            _RowState(round_run, row, state, load_checkpoint(*round_run.checkpoint, row, state, group))
            for round_run, row, state in zip(round_runs, rows, kept, strict=True)
        ]
        settings = RowSettings.of([row_state.config.step for row_state in row_states], phi.device)
        _Learning(row_states, material, loaded, context, optimizer, look, settings, post).run(at_epoch)
    context.notes += [note for row_state in row_states for note in row_state.position.notes]
    return [row_state.outcome for row_state in row_states]


def _refuse_mixed(configs: Sequence[RoundConfig]) -> None:
    """Raise `CorsaError` if these rounds cannot be trained together. `RowSettings.of` compares their steps."""
    for name in RoundConfig.model_fields:
        values = [getattr(config.shared, name) for config in configs]
        if name != "step" and any(value != values[0] for value in values):
            raise CorsaError(f"rounds trained together must have the same {name}: train them apart (--pack 1)")


def _optimizer(phi: nn.Parameter, group: WorkerGroup, rows: int) -> tuple[Stepping, list[Tensor], list[Moments]]:
    """A new optimizer over phi, its rows, and the state of each row for checkpoints."""
    if rows == 1:
        whole = group.optimizer(phi)
        return whole, [phi], [whole]
    packed = PackedAdamW(phi)
    return packed, packed.rows, [packed.of(row) for row in range(rows)]


@dataclass
class _Learning:
    """The steps of the rounds that are trained together. `settings` are those of the step, one row a round."""

    row_states: Sequence[_RowState]
    material: Material
    loaded: Loaded
    context: WorkerContext
    optimizer: Stepping
    look: LookSam | None
    settings: RowSettings
    post: Callable[[dict[str, Any]], None]

    def __post_init__(self) -> None:
        self.configs = [row_state.config for row_state in self.row_states]
        self.training = self.configs[0].training
        self.per_epoch = -(-len(self.material.own) // self.training.own)
        self.steps = self.per_epoch * self.training.epochs
        self._preemption = PreemptionWatch()
        for row_state in self.row_states:  # an interrupted round may have had enough already
            row_state.stop_if_enough(row_state.position.step // self.per_epoch, self.per_epoch)
        running = [row_state.position.step for row_state in self.row_states if not row_state.ended]
        self._began, self._resumed_at = time.monotonic(), min(running, default=self.steps)

    @property
    def over(self) -> bool:
        """Whether every round has ended."""
        return all(row_state.ended for row_state in self.row_states)

    def run(self, at_epoch: AtEpoch) -> None:
        """Run all remaining steps."""
        for epoch in range(self._resumed_at // self.per_epoch, self.training.epochs):
            self._epoch(epoch)
            if self.over:  # all rounds failed
                return
            at_epoch(epoch + 1)
            for row_state in self.row_states:
                row_state.stop_if_enough(epoch + 1, self.per_epoch)
            if self.over:
                return

    def _epoch(self, epoch: int) -> None:
        """Run the steps of an epoch that no checkpoint includes, until every round has failed."""
        group, edits = self.context.group, self.material.all
        seen = np.zeros((len(self.row_states), len(edits)), dtype=np.int64)  # by this worker
        orders = [self.material.batches(config, epoch) for config in self.configs]
        for number, chosen in enumerate(zip(*orders, strict=True), start=epoch * self.per_epoch + 1):
            own = [_own_parts(whole, self.configs[0].step, group) for whole in chosen]
            for counts, parts in zip(seen, own, strict=True):
                for part in parts:
                    np.add.at(counts, part, 1)
            if number <= self._resumed_at:
                continue
            shares = [
                Share([edits[i] for i in whole], [[edits[i] for i in part] for part in parts])
                for whole, parts in zip(chosen, own, strict=True)
            ]
            logs = self._step(number, epoch, shares)
            if self.over:
                return
            self._save(number)
            if group.leads:
                self._report(number, epoch, logs)
        _check_every_edit_once(seen[:, : len(self.material.own)], group, epoch + 1)

    def _step(self, number: int, epoch: int, shares: Sequence[Share]) -> list[dict[str, Any]]:
        """Take step `number` and record it. Returns one row of the learning curves per round."""
        start, training, step = time.monotonic(), self.training, self.configs[0].step
        for row_state, param_group in zip(self.row_states, self.optimizer.param_groups, strict=True):
            rate = row_state.config.training.learning_rate
            param_group["lr"] = learning_rate(rate, number - 1, self.steps, training.warmup, training.first_rate)
            param_group["waits"] = row_state.waits(number)
        unit = step.microbatch if step.scope == "microbatch" else 1
        batch = self.context.batch(self.loaded, shares, unit, training.stop_above)
        if self.look:
            self.look.begin(number)
        model, phi, add = self.loaded.model, self.loaded.phi, self.context.group.sum
        where = self._direction(number) if step.sam and step.perturbation == "random" else None
        logs = corsa_step(model, phi, batch, self.settings, self.optimizer, training.clip, add, self.look, where)
        seconds = (time.monotonic() - start) / len(self.row_states)
        for row_state, log, param_group in zip(self.row_states, logs, self.optimizer.param_groups, strict=True):
            if not param_group["waits"]:
                more = {"epoch": epoch + 1, "learning_rate": param_group["lr"], "seconds": seconds}
                if training.stop_above is None:
                    more["below"] = None
                row_state.learnt({"step": number} | log | more)
        return logs

    def _direction(self, number: int) -> Tensor:
        """The random direction (K, P) of the perturbation in step `number`; it follows from seed, round and step."""
        keys = [[config.seed, config.round, number] for config in self.configs]
        seeds = [int(np.random.SeedSequence(key).generate_state(1)[0]) for key in keys]
        return random_direction(self.loaded.phi, seeds)

    def _save(self, number: int) -> None:
        """Save a checkpoint of each round at every few steps, at the last, and when the node is to be preempted."""
        warned = self._preemption.new_warning()
        if not (warned or number % self.context.placement.checkpoint_every == 0 or number == self.steps):
            return
        for row_state in self.row_states:
            if row_state.position.step == number and not row_state.ended:
                if warned:
                    row_state.position.notes.append(f"{warned}: checkpoint taken after step {number}")
                saved = row_state.row, row_state.state, row_state.position
                with self.context.timed("checkpoints"):
                    save_checkpoint(*row_state.round_run.checkpoint, *saved, self.context.group)

    def _report(self, number: int, epoch: int, logs: Sequence[dict[str, Any]]) -> None:
        """Post the line of the progress display."""
        per_step = (time.monotonic() - self._began) / (number - self._resumed_at)
        self.post(
            {"epoch": epoch + 1, "epochs": self.training.epochs, "step": number, "steps": self.steps}
            | {"loss": _mean_loss(self.configs, logs), "eta_s": per_step * (self.steps - number)}
        )


@dataclass
class _RowState:
    """One row of phi, and the progress of its round."""

    round_run: RoundRun
    row: Tensor
    state: Moments
    position: Position
    failed: RoundFailedError | None = None
    enough: bool = False  # the last epoch found every answer learnt

    def __post_init__(self) -> None:
        self._skipped = sum(c["skipped"] for c in self.position.curves)

    @property
    def config(self) -> RoundConfig:
        return self.round_run.config

    @property
    def outcome(self) -> list[dict[str, Any]] | RoundFailedError:
        return self.failed or self.position.curves

    @property
    def ended(self) -> bool:
        """Whether the round takes no more steps: it failed, or stopped early."""
        return self.failed is not None or self.enough

    def waits(self, number: int) -> bool:
        """Whether this row skips step `number`: its round has ended, or its checkpoint already includes the step."""
        return self.ended or number <= self.position.step

    def stop_if_enough(self, epoch: int, per_epoch: int) -> None:
        """End the round if every new answer was above `stop_above` when epoch `epoch` (from 1) taught it."""
        if self.config.training.stop_above is not None:
            rows = [c for c in self.position.curves if c["epoch"] == epoch]
            self.enough |= len(rows) == per_epoch and not any(c["below"] or c["skipped"] for c in rows)

    def learnt(self, log: dict[str, Any]) -> None:
        """Record one finished step."""
        self.position.add({"seed": self.config.seed, "round": self.config.round} | log)
        self._skipped += log["skipped"]
        if self._skipped > self.config.training.max_skipped:
            self.failed = RoundFailedError(
                f"round {self.config.round}: {self._skipped} of {self.position.step} steps had a non-finite gradient, "
                f"the last being step {self.position.step}. Lower --training.learning-rate "
                f"(now {self.config.training.learning_rate:g}) or --corsa.rho, or use --dtype float32"
            )


def _mean_loss(configs: Sequence[RoundConfig], logs: Sequence[dict[str, Any]]) -> float:
    """Mean over the rounds of L_Update."""
    losses = [update_loss(config.step, log) for config, log in zip(configs, logs, strict=True)]
    return sum(losses) / len(losses)


def _own_parts(chosen: np.ndarray, step: StepConfig, group: WorkerGroup) -> list[np.ndarray]:
    """This worker's positions of a global batch, as the parts that perturbations are computed from."""
    if step.scope == "microbatch":  # workers get whole parts, so the result does not depend on their number
        parts = [chosen[i : i + step.microbatch] for i in range(0, len(chosen), step.microbatch)]
        return parts[group.rank :: group.size]
    own = chosen[group.rank :: group.size]
    return [own] if len(own) else []


def _check_every_edit_once(seen: np.ndarray, group: WorkerGroup, epoch: int) -> None:
    counts = group.sum(torch.from_numpy(seen).to(group.device))
    if not bool((counts == 1).all()):
        raise AssertionError(f"epoch {epoch}: {int((counts != 1).sum())} edits were not seen exactly once")
