"""Writes a change in the formats that other programs load, and checks each: `corsa export`.

    merged weights    a directory for transformers and vLLM: the base model with the change in its weights
    GGUF              the same in one file, for llama.cpp, Ollama and LM Studio
    GGUF adapter      the change alone, for llama.cpp (--lora) and Ollama (ADAPTER)
    PEFT adapter      the change alone; exact, or cut to a rank

Another library loads what was written (`corsa.editing.reloading`) and answers the taught questions. Its answers are
compared with those of the base model with the change attached.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from corsa.config import EvaluationConfig, ModelConfig
from corsa.data.benchmarks.file import drafts_of
from corsa.editing import reloading
from corsa.editing.history import open_line
from corsa.errors import CorsaError
from corsa.evaluation.predict import Predictor
from corsa.evaluation.sanity_questions import sanity_questions
from corsa.lora.arithmetic import compress
from corsa.lora.attached import Change, attached
from corsa.lora.factors import Adapter, Factors
from corsa.lora.flat import linear_layers
from corsa.lora.gguf_format import write_lora
from corsa.lora.peft_format import read_factors, write_factors
from corsa.lora.weight_deltas import DESCRIPTION, base_of, load_delta
from corsa.models.encoding import Encoder
from corsa.models.gguf_writing import Stored, write_model
from corsa.models.loading import load_model, load_tokenizer
from corsa.models.registry import hub_name


@dataclass(frozen=True)
class Wanted:
    """What to write, and where; None: not.

    Attributes:
        merged, adapter: new directories. `gguf`, `gguf_lora`: new files.
        rank: of the adapters; None: exact.
        stored: data type of merged weights; None: the base model's.
    """

    merged: Path | None = None
    gguf: Path | None = None
    gguf_lora: Path | None = None
    adapter: Path | None = None
    rank: int | None = None
    stored: Stored | None = None


@dataclass(frozen=True)
class Difference:
    """A question that the export answers in another way."""

    question: str
    base: str
    ours: str
    exported: str


@dataclass(frozen=True)
class Export:
    """One file or directory that was written and checked.

    Attributes:
        form: "merged", "gguf", "gguf-lora" or "adapter".
        error: |written change - change| / |change|, over all layers (Frobenius norm).
        asked: number of questions; `moved`: those that the change answers in another way than the base model.
        differences: the questions that the export does not answer as the change does.
    """

    form: str
    path: Path
    error: float
    asked: int
    moved: int
    differences: list[Difference] = field(default_factory=list)

    @property
    def applied(self) -> bool:
        """False if the export answers all that the change moves as the base model does."""
        kept = [d for d in self.differences if d.exported == d.base and d.ours != d.base]
        return not self.moved or len(kept) < self.moved


@dataclass(frozen=True)
class _Source:
    change: Change
    base: ModelConfig
    questions: list[str]


def export(
    source: str | Path,
    wanted: Wanted,
    *,
    edits: str | None = None,
    model: str | None = None,
    questions: int = 100,
    new_tokens: int = 32,
    told: Callable[[str], None] = lambda line: None,
) -> list[Export]:
    """Writes a change in each wanted form, and checks each.

    Args:
        source: a PEFT directory, or a directory with MEMIT's change (delta.json, delta.safetensors).
        wanted: what to write.
        edits: file of facts whose questions are asked; default: those the adapter was taught, else everyday questions.
        model: base model; default: the source's.
        questions: number of questions asked at most.
        new_tokens: most tokens of an answer.
        told: called with a line before each phase.

    Raises:
        CorsaError: nothing is wanted, a place is not free, a name is wrong, or a form cannot hold the change.
    """
    places = [place for place in (wanted.merged, wanted.gguf, wanted.gguf_lora, wanted.adapter) if place]
    if not places:
        raise CorsaError("nothing would be written: give --merged DIR, --gguf FILE, --gguf-lora FILE or --adapter DIR")
    for place in places:
        _check_free(place)
    if wanted.rank is not None and not (wanted.adapter or wanted.gguf_lora):
        raise CorsaError("--rank is of an adapter: give --adapter DIR or --gguf-lora FILE with it")
    # Saving a model imports DeepSpeed, which warns if there is no GPU. All of an export is on the CPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    opened = _open(source, edits, model)
    asked = opened.questions[:questions]
    told(f"loading {opened.base.name}, {len(asked)} questions")
    network = load_model(opened.base)
    encoder = Encoder(load_tokenizer(opened.base), opened.base.template)
    how = EvaluationConfig(new_tokens=new_tokens)
    predictor = Predictor(network, encoder, how, torch.device("cpu"), batch=32, packed=False)
    before = predictor.answers(asked)
    with attached(network, opened.change):
        ours = predictor.answers(asked)

    def checked(form: str, path: Path, error: float, theirs: Sequence[str]) -> Export:
        rows = zip(asked, before, ours, theirs, strict=True)
        different = [Difference(*row) for row in rows if row[2] != row[3]]
        moved = sum(b != o for b, o in zip(before, ours, strict=True))
        return Export(form, path, error, len(asked), moved, different)

    found = []
    if wanted.adapter or wanted.gguf_lora:
        factors, error = _factors(opened.change, wanted.rank)
        if wanted.adapter:
            told(f"writing {wanted.adapter}, and loading it with PEFT")
            with _aside(wanted.adapter) as place:
                write_factors(factors, place, hub_name(opened.base.name))
            answers = reloading.adapter(wanted.adapter, opened.base, asked, new_tokens)
            found.append(checked("adapter", wanted.adapter, error, answers))
        if wanted.gguf_lora:
            told(f"writing {wanted.gguf_lora}, and reading it with gguf")
            with _aside(wanted.gguf_lora) as place:
                write_lora(factors, network.config, place)
            answers = reloading.gguf_lora(wanted.gguf_lora, opened.base, list(factors), asked, new_tokens)
            found.append(checked("gguf-lora", wanted.gguf_lora, error, answers))
    if wanted.merged or wanted.gguf:
        stored: Stored = wanted.stored or opened.base.element
        error = _merge(network, opened.change, stored)
        if wanted.merged:
            told(f"writing {wanted.merged}, and loading it with transformers")
            with _aside(wanted.merged) as place:
                network.save_pretrained(place)
                encoder.tokenizer.save_pretrained(place)
            answers = reloading.merged(wanted.merged, opened.base, asked, new_tokens)
            found.append(checked("merged", wanted.merged, error, answers))
        if wanted.gguf:
            told(f"writing {wanted.gguf}, and loading it with transformers")
            with _aside(wanted.gguf) as place:
                write_model(network, encoder.tokenizer, place, stored)
            answers = reloading.gguf_model(wanted.gguf, opened.base, asked, new_tokens)
            found.append(checked("gguf", wanted.gguf, error, answers))
    return found


def _open(source: str | Path, edits: str | None, model: str | None) -> _Source:
    directory = Path(source).expanduser()
    taught: list[str] = []
    if (directory / DESCRIPTION).is_file():
        change: Change = load_delta(directory)
        base = ModelConfig(name=model or base_of(directory))
    else:
        line = open_line(directory)
        known = line.model(None) if line.history or model is None else ModelConfig()
        base = line.model(known.model_copy(update={"name": model}) if model else None)
        change = read_factors(directory)[0]
        taught = [edit.prompt for edit in line.standing]
    if base.dtype == "nf4":  # the change is added to whole weights
        base = base.model_copy(update={"dtype": base.element})
    if edits:
        taught = [draft.fields["prompt"] for draft in drafts_of(edits)]
    return _Source(change, base, taught or [entry.question for entry in sanity_questions()])


def _factors(change: Change, rank: int | None) -> tuple[Adapter, float]:
    """The change as factors, cut to a rank if one is given, and the relative error of the cut.

    Raises:
        CorsaError: the change is dense, and no rank is given.
    """
    factors: Adapter = {}
    for name, part in change.items():
        if isinstance(part, Tensor) and rank is None:
            raise CorsaError(f"the change of {name} is a whole matrix, as MEMIT leaves it: give --rank, such as 64")
        factors[name] = part if isinstance(part, Factors) else Factors(torch.eye(part.shape[1]), part)
    return (factors, 0.0) if rank is None else compress(factors, rank)


@torch.no_grad()
def _merge(model: Any, change: Change, stored: Stored) -> float:
    """Adds the change to the weights and makes the model `stored`, rounding once.

    Returns |written change - change| / |change|: bfloat16 loses what is below 1/512 of a weight.
    """
    layers, dtype = dict(linear_layers(model)), getattr(torch, stored)
    lost = total = 0.0
    for name, part in change.items():
        weight = layers[name].weight
        delta = (part.delta() if isinstance(part, Factors) else part).double()
        exact = weight.double() + delta
        written = exact.to(dtype).double() - weight.to(dtype).double()
        lost += float((written - delta).square().sum())
        total += float(delta.square().sum())
        weight.data = exact.to(dtype)
    model.to(dtype)
    return (lost / total) ** 0.5 if total else 0.0


def _check_free(place: Path) -> None:
    if place.is_dir() and any(place.iterdir()):
        raise CorsaError(f"{place} is not empty: name a new directory")
    if place.is_file():
        raise CorsaError(f"{place} exists: name a new place")


@contextmanager
def _aside(place: Path) -> Iterator[Path]:
    """A path next to `place`, renamed to it at the end: an interrupted export leaves nothing under its name.

    Raises:
        CorsaError: the place cannot be written.
    """
    place = place.expanduser().absolute()
    aside = place.with_name(f".{uuid4().hex}.{place.name}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        if place.is_dir():  # empty: `_check_free`
            place.rmdir()
        aside.replace(place)
    except OSError as error:
        raise CorsaError(f"cannot write to {place}: {error.strerror or error}. Name another place") from error
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):
            aside.unlink()


def plain(found: Export) -> Mapping[str, Any]:
    """For JSON."""
    return {
        "form": found.form,
        "path": str(found.path),
        "error": found.error,
        "asked": found.asked,
        "moved": found.moved,
        "applied": found.applied,
        "differences": [vars(difference) for difference in found.differences],
    }
