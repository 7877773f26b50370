"""Sends a finished run to an experiment tracker through the tracker's own library. Each library is an optional extra.

pip install 'corsa[tensorboard]'    tensorboard:DIR      an event file below DIR
pip install 'corsa[mlflow]'         mlflow[:URI]         MLFLOW_TRACKING_URI, or ./mlruns
pip install 'corsa[wandb]'          wandb[:PROJECT]      offline unless WANDB_MODE says otherwise; `wandb sync` sends it
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from corsa.errors import CorsaError, unknown_name
from corsa.flow.store import Artifact
from corsa.terminal import without_user

_CURVES = ("logp_new", "logp_old", "cosine", "sharpness", "gradient_change", "grad_norm", "learning_rate")
"""Columns of the curves that are sent, besides the loss of each objective (`loss_NAME`)."""


def check(where: Sequence[str]) -> None:
    """Raises `CorsaError` if a tracker is unknown or its library is not installed. Called before the run starts."""
    for one in where:
        name, _, place = one.partition(":")
        if name not in TRACKERS:
            raise unknown_name("tracker", name, TRACKERS)
        if without_user(place) != place:
            raise CorsaError(
                f"--track {name}:{without_user(place)}: credentials do not belong in an address. Set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or WANDB_API_KEY, in the environment"
            )
        library = _LIBRARIES.get(name, name)
        if find_spec(library) is None:
            raise _absent(name, f"No module named {library!r}")


def track_run(where: Sequence[str], page: Artifact) -> list[str]:
    """Send a finished run (the result of a report step) to each tracker. Returns the locations."""
    if not where:
        return []
    about = json.loads(page.read("run.json"))
    told = {"title": about["title"], "config": about.get("config") or {}}
    metrics = json.loads(page.read("metrics.json"))
    curves = pd.read_parquet(page.local("curves.parquet")) if "curves.parquet" in page.record.files else pd.DataFrame()
    return [track(one, **told, metrics=metrics, curves=curves) for one in where]


def track(where: str, *, title: str, config: Mapping[str, Any], metrics: dict[str, Any], curves: pd.DataFrame) -> str:
    """Log a run: its configuration, each method's metrics after every round, and the training curves.

    Args:
        where: `tensorboard:DIR`, `mlflow[:URI]` or `wandb[:PROJECT]`.
        title: name of the run.
        config: the resolved configuration, nested.
        metrics: the result of `corsa.evaluation.metrics.compute`.
        curves: one row per optimizer step, may be empty.

    Returns:
        The location of the run.

    Raises:
        CorsaError: an unknown tracker, or one whose library is not installed.
    """
    name, _, place = where.partition(":")
    if name not in TRACKERS:
        raise unknown_name("tracker", name, TRACKERS)
    rows = [*_rounds(metrics), *_steps(curves)]
    return TRACKERS[name](place, title, dict(_flat(config)), rows)


Row = tuple[int, dict[str, float]]
"""A position on the tracker's axis (round or optimizer step), and its values."""


def _rounds(metrics: dict[str, Any]) -> Iterator[Row]:
    for row in metrics.get("series", []):
        values = {f"{row['method']}/{k}": v["value"] for k, v in row["metrics"].items() if v["value"] is not None}
        yield row["round"], values


def _steps(curves: pd.DataFrame) -> Iterator[Row]:
    if curves.empty:
        return
    for (method, seed), rows in curves.groupby(["method", "seed"], sort=False):
        for step, row in enumerate(rows.sort_values(["round", "step"]).to_dict("records"), start=1):
            found = {name: row[name] for name in row if name in _CURVES or str(name).startswith("loss_")}
            named = {f"training/{method}/seed{seed}/{name}": value for name, value in found.items()}
            yield step, {name: float(value) for name, value in named.items() if pd.notna(value)}


def _tensorboard(place: str, title: str, config: dict[str, Any], rows: list[Row]) -> str:
    folder = Path(place or "tensorboard").absolute() / _slug(title)
    writer = _library("tensorboardX", "tensorboard").SummaryWriter(str(folder))
    writer.add_text("configuration", "\n".join(f"    {name}: {value}" for name, value in config.items()))
    for step, values in rows:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    writer.close()
    return f"{folder} (tensorboard --logdir {folder.parent})"


def _mlflow(place: str, title: str, config: dict[str, Any], rows: list[Row]) -> str:
    mlflow = _library("mlflow", "mlflow")
    if place:
        mlflow.set_tracking_uri(place)
    mlflow.set_experiment("corsa")
    with mlflow.start_run(run_name=title) as run:
        mlflow.log_params({name: str(value)[:6000] for name, value in config.items()})
        for step, values in rows:
            mlflow.log_metrics(values, step=step)
        return f"{without_user(mlflow.get_tracking_uri())}, run {run.info.run_id}"


def _wandb(place: str, title: str, config: dict[str, Any], rows: list[Row]) -> str:
    wandb = _library("wandb", "wandb")
    mode = os.environ.get("WANDB_MODE", "offline")
    run = wandb.init(project=place or "corsa", name=title, config=config, mode=mode)
    # Rounds and optimizer steps have separate counts, and W&B's own step may only grow: each row names its position.
    for step, values in rows:
        run.log({**values, "position": step})
    where = run.dir
    run.finish()
    return f"{Path(where).parent} (wandb sync sends it)" if mode == "offline" else str(run.url)


TRACKERS: dict[str, Callable[[str, str, dict[str, Any], list[Row]], str]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}


def _library(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise _absent(extra, str(error)) from error


_LIBRARIES = {"tensorboard": "tensorboardX"}


def _absent(extra: str, why: str) -> CorsaError:
    return CorsaError(f"{extra} is not installed ({why}): pip install 'corsa[{extra}]'")


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-")
