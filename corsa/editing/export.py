"""Writes the directory of an adapter after an update (see `corsa.editing.history`).

The files are written to a temporary directory, which is then renamed.
"""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow.parquet as pq

from corsa.data.edit import from_table
from corsa.editing.card import card
from corsa.editing.history import FILE, WEIGHTS, History, Update, file_digest, open_line
from corsa.editing.options import EditOptions, Teaching, UndoOptions
from corsa.editing.plan import HEADLINES, Plan, check_free
from corsa.errors import CorsaError
from corsa.experiments.runner import lasting
from corsa.flow.store import Artifact, Store
from corsa.models.registry import hub_name


def write(options: Teaching, plan: Plan, page: Artifact, store: Store) -> Path:
    """Writes the directory `options.out`: adapter, card, report, edits, answers and history.

    Raises:
        CorsaError: the directory cannot be written.
    """
    out = Path(lasting(options.out)).expanduser().absolute()
    trained = store.artifact(plan.round.fingerprint)
    aside = out.with_name(f".{out.name}.{uuid4().hex}")
    try:
        aside.mkdir(parents=True)
        for name in ("adapter_config.json", WEIGHTS):
            shutil.copyfile(trained.local(f"adapter/{name}"), aside / name)
        for name in ("report.html", "metrics.json", "predictions.parquet"):
            shutil.copyfile(page.local(name), aside / name)
        edits = store.artifact(plan.edits.fingerprint)
        shutil.copyfile(edits.local("edits.parquet"), aside / "edits.parquet")
        _name_base(aside / "adapter_config.json", plan)
        history = _history(options, plan, trained, aside, out)
        (aside / FILE).write_text(history.model_dump_json(indent=1) + "\n")
        (aside / "README.md").write_text(_card(options, plan, aside, history), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)  # empty, or an earlier result of this update: `corsa.editing.plan.check_free`
        aside.replace(out)
    except OSError as error:
        raise CorsaError(
            f"cannot write to {error.filename or out}: {error.strerror}. Every step is kept: run the same command "
            "with another --out, and nothing is trained again"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def headline(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The main metrics of the edited model after the last round: {name: value entry with its label}."""
    row = metrics["rows"][-1]["metrics"]
    return {name: row[name] | {"label": metrics["definitions"][name]["label"]} for name in HEADLINES}


def _name_base(file: Path, plan: Plan) -> None:
    """Writes the hub name of the base model: PEFT and the hub do not know the aliases of this project."""
    settings = json.loads(file.read_text())
    settings["base_model_name_or_path"] = hub_name(settings["base_model_name_or_path"])
    file.write_text(json.dumps(settings, indent=2) + "\n")


def _history(options: Teaching, plan: Plan, trained: Artifact, aside: Path, out: Path) -> History:
    update = Update(
        number=plan.number,
        kind="edit" if isinstance(options, EditOptions) else "undo",
        facts=plan.facts,
        method=options.method,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=trained.fingerprint,
        sha256=file_digest(aside / WEIGHTS),
        directory=str(out),
        source=Path(options.edits).name if isinstance(options, EditOptions) else "",
        tuned=dict(plan.tuned.setting) if plan.tuned else None,
    )
    before = plan.line.updates if plan.line else ()
    return History(model=plan.experiment.model, lora=plan.experiment.lora, updates=(*before, update))


def _card(options: Teaching, plan: Plan, aside: Path, history: History) -> str:
    standing = {e.chain: e for e in from_table(pq.read_table(aside / "edits.parquet"))}
    metrics = json.loads((aside / "metrics.json").read_text())
    training, step = plan.experiment.training, plan.experiment.corsa
    settings = {
        "rule": metrics["rule"],
        "LoRA": f"rank {plan.experiment.lora.rank}, alpha {plan.experiment.lora.alpha:g}, every linear layer",
        "optimizer": f"AdamW, peak learning rate {training.learning_rate:g}, {training.epochs} epochs, batches of "
        f"{training.batch}, {training.own} of them the update's own facts",
    }
    if options.method.startswith("corsa"):
        settings["CoRSA"] = f"lambda {step.lambda_:g}, beta {step.beta:g}, rho {step.rho:g}"
    if plan.tuned:
        settings["chosen by"] = plan.tuned.told[0]
    return card(history.model, history.updates, list(standing.values()), headline(metrics), settings)


def roll_back(options: UndoOptions) -> Path:
    """Copies the adapter of an earlier update of the line, unchanged, to `options.out`.

    Raises:
        CorsaError: the line has no such update, or its directory is gone or its contents have changed.
    """
    line = open_line(options.adapter)
    if options.edit:
        raise CorsaError("give --edit or --to, not both")
    wanted = next((update for update in line.updates if update.number == options.to), None)
    if wanted is None:
        raise CorsaError(f"adapter {line.directory} has no update {options.to}: it has {len(line.updates)}")
    out, source = Path(lasting(options.out)).expanduser().absolute(), Path(wanted.directory)
    check_free(out, wanted.fingerprint)
    if not (source / WEIGHTS).is_file() or file_digest(source / WEIGHTS) != wanted.sha256:
        raise CorsaError(
            f"update {wanted.number} was written to {source}, where its adapter is no more: copy it there from a "
            "backup, or take its later facts back one by one with --edit"
        )
    shutil.copytree(source, out, dirs_exist_ok=True)
    return out
