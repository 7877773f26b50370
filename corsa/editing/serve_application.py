"""Runs the served models on a Ray cluster by Ray Serve."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from corsa.config import ModelConfig
from corsa.errors import CorsaError


def run(model: ModelConfig, adapters: Mapping[str, str], *, host: str, port: int, gpu: bool) -> None:
    """Starts the server on the cluster that this process has joined, and returns when it answers.

    Args:
        model: the base model.
        adapters: {name: PEFT directory}.
        host: address to listen on.
        port: port to listen on.
        gpu: whether the model runs on a GPU.

    Raises:
        CorsaError: the models cannot be loaded.
    """
    serve = ray_serve()

    def build() -> Any:
        from corsa.editing.openai_interface import interface
        from corsa.editing.serving import ServedModels
        from corsa.evaluation.side_by_side import SideBySide

        loaded = SideBySide(model, list(adapters.values()), "cuda" if gpu else "cpu")
        return interface(ServedModels(loaded, adapters))

    needs: dict[str, Any] = {"num_cpus": 1, "num_gpus": int(gpu)}
    deployment = serve.deployment(name="corsa", ray_actor_options=needs, max_ongoing_requests=64)
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(deployment(serve.ingress(build)()).bind(), name="corsa", route_prefix="/")
    except RuntimeError as error:
        cause = getattr(error, "cause", None) or error  # a failure in one of Ray's processes comes with a traceback
        raise CorsaError(f"the server could not be started: {str(cause).splitlines()[0]}") from error


def stop() -> None:
    """Ends the server if one was started. A cluster that was joined keeps running."""
    if serve := sys.modules.get("ray.serve"):
        serve.shutdown()


def ray_serve() -> Any:
    """Ray Serve. Call it after `corsa.flow.cluster.connect`, which sets what Ray reads at import.

    Raises:
        CorsaError: Ray Serve is not installed.
    """
    try:
        from ray import serve
    except ModuleNotFoundError as error:  # its own text gives other advice
        raise CorsaError(f"corsa serve needs Ray Serve: pip install 'corsa[serve]' (no module {error.name})") from error
    if not os.environ.get("CORSA_VERBOSE"):
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return serve
