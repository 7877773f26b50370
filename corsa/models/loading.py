"""Loading a base model and its tokenizer, from the hub, a directory, a GGUF file, or with random weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from corsa.config import ModelConfig
from corsa.errors import CorsaError
from corsa.models.embedded import embedded_model, embedded_tokenizer
from corsa.models.four_bit import quantization, refuse_without_gpu
from corsa.models.gguf_file import converted, described
from corsa.models.recomputed_norms import recompute_norms
from corsa.models.registry import ARCHITECTURES, Source, gguf_revision, locate
from corsa.models.shapes import first_line, read_architecture

logging.disable_progress_bar()


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. A `random:` architecture uses the embedded model's (its vocabulary is large enough).

    Raises:
        CorsaError: it cannot be loaded, with the cause.
    """
    source = locate(config.name)
    if source.kind == "random" and Path(source.place).is_dir():
        place: str | Path = source.place
    elif source.kind in ("random", "embedded"):
        place = embedded_tokenizer()
    elif source.kind == "gguf":
        place = described(_gguf(source, config))
    else:
        place = source.place
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place, revision=_hub_revision(source, config), trust_remote_code=False
        )
    except Exception as e:  # transformers and tokenizers raise any exception on invalid files
        raise _not_loaded("tokenizer", config, e) from e
    if tokenizer.eos_token_id is None:
        raise CorsaError(
            f"the tokenizer of {config.name} has no end-of-text token: an answer could not end; set eos_token"
        )
    return tokenizer


Whole = Callable[[nn.Parameter], AbstractContextManager[Any]]
"""A context in which a sharded parameter is whole and can be written."""


def load_model(config: ModelConfig, device: torch.device | str = "cpu", whole: Whole | None = None) -> PreTrainedModel:
    """The frozen base model in evaluation mode, on `device`.

    `whole`: required if parameters are sharded among workers at creation (`corsa.training.sharding`). The model is then
    already on its devices and is not moved.

    Raises:
        CorsaError: it cannot be loaded, with the cause.
    """
    source = locate(config.name)
    if config.dtype == "nf4":
        refuse_without_gpu(device, sharded=whole is not None, random=source.kind == "random")
    if source.kind == "random":
        model = _random_model(source.place, config, whole)
    else:
        place = _directory(source, config)
        in_4_bits: dict[str, Any] = {}
        if config.dtype == "nf4":
            in_4_bits = {"quantization_config": quantization(), "device_map": {"": torch.device(device)}}
        _refuse_pickles(Path(place))
        try:
            revision = _hub_revision(source, config)
            model = AutoModelForCausalLM.from_pretrained(
                place,
                config=read_architecture(str(place), revision),
                revision=revision,
                dtype=getattr(torch, config.element),
                attn_implementation="sdpa",
                use_safetensors=True,  # a pickle can run any code
                trust_remote_code=False,  # explicit, because transformers would ask at the terminal
                **in_4_bits,
            )
        except CorsaError:
            raise
        except Exception as e:  # ImportError of a quantization library, RuntimeError of sizes, and more
            raise _not_loaded("weights", config, e) from e
    model.requires_grad_(False).eval()
    recompute_norms(model)
    return model if whole or config.dtype == "nf4" else model.to(device)  # type: ignore[arg-type]


def files_of(config: ModelConfig) -> tuple[str, str | None]:
    """The directory of the files of a base that has some, or its name on the hub, with the revision there."""
    source = locate(config.name)
    return str(_directory(source, config)), _hub_revision(source, config)


def _directory(source: Source, config: ModelConfig) -> str | Path:
    """The directory of a model, converted if it comes from a GGUF file; or its name on the hub."""
    if source.kind == "embedded":
        return embedded_model()
    return converted(_gguf(source, config)) if source.kind == "gguf" else source.place


def _gguf(source: Source, config: ModelConfig) -> Path:
    gguf_revision(config)  # a worker's file is the one that was planned with
    return Path(source.place)


def _random_model(shape: str, config: ModelConfig, whole: Whole | None) -> PreTrainedModel:
    if shape in ARCHITECTURES:
        entries: dict[str, Any] = dict(ARCHITECTURES[shape])
        architecture = AutoConfig.for_model(entries.pop("model_type"), **entries)
    else:
        try:
            architecture = read_architecture(shape)
        except CorsaError:
            raise
        except Exception as e:
            raise _not_loaded("architecture", config, e) from e
    with torch.random.fork_rng(devices=[]):
        dtype = getattr(torch, config.element)
        try:
            model = AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation="sdpa")
        except Exception as e:
            raise _not_loaded("architecture", config, e) from e
    # Draw each matrix again with a separate generator: transformers' values depend on how the model was created.
    generator = torch.Generator().manual_seed(0)
    deviation = getattr(architecture.get_text_config(), "initializer_range", 0.02)
    with torch.no_grad():
        for parameter in model.parameters():
            with whole(parameter) if whole else nullcontext():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(deviation))
    return model


def _refuse_pickles(directory: Path) -> None:
    pickles = sorted(path.name for path in directory.glob("*.bin")) if directory.is_dir() else []
    if pickles and not list(directory.glob("*.safetensors")):
        raise CorsaError(
            f"model directory {directory} has its weights in {pickles[0]}, a pickle, which can run any code when it is "
            "read; only safetensors are loaded. If you trust it: load it once with transformers and save_pretrained it"
        )


def _hub_revision(source: Source, config: ModelConfig) -> str:
    return config.revision or "main" if source.kind == "hub" else "main"


def _not_loaded(what: str, config: ModelConfig, cause: Exception) -> CorsaError:
    first = first_line(cause)
    if "custom code" in first:
        return CorsaError(
            f"model {config.name!r} comes with code of its own, which is never run (trust_remote_code is off): "
            "use a model whose architecture transformers itself knows"
        )
    if config.name.lower().endswith("gguf"):
        return CorsaError(
            f"the {what} of model {config.name!r} could not be loaded: {first}. To use one of its GGUF files, download "
            f"it (hf download {config.name} FILE.gguf --local-dir DIR) and give --model DIR/FILE.gguf"
        )
    return CorsaError(
        f"the {what} of model {config.name!r} could not be loaded: {first}. "
        "Name a directory written by save_pretrained, or make the hub reachable (HF_TOKEN for gated models)"
    )
