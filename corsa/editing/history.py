"""A line of updates: a PEFT directory that carries what it was taught, so that next month's facts go on top of it.

    adapter_config.json, adapter_model.safetensors    the adapter, as PEFT, transformers and vLLM load it
    README.md                                         its model card
    report.html, metrics.json                         what took, what generalises, what else changed
    edits.parquet                                     every edit of the line; `round` is the update that taught it
    predictions.parquet                               every answer so far: what was right when it was learnt
    line.json                                         the base model, and one entry an update

Imports neither torch nor ray: an update is planned from what is read here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from pydantic import ConfigDict, ValidationError

from corsa.config import Frozen, LoraConfig, ModelConfig
from corsa.data.benchmarks.file import Draft
from corsa.data.edit import Edit, FieldError, from_table, normalise
from corsa.data.paraphrase_templates import wordings
from corsa.errors import CorsaError
from corsa.models.registry import hub_name

WEIGHTS = "adapter_model.safetensors"
FILE = "line.json"


class Update(Frozen):
    """One update of a line. Fields that a later version adds are ignored."""

    model_config = ConfigDict(extra="ignore")

    number: int
    kind: Literal["edit", "undo"]
    facts: int  # taught by this update
    method: str
    created: str  # UTC, ISO 8601
    fingerprint: str  # of the step that trained it
    sha256: str  # of adapter_model.safetensors
    directory: str  # where it was written
    source: str = ""  # the file of facts


class History(Frozen):
    """What line.json holds."""

    model_config = ConfigDict(extra="ignore")

    model: ModelConfig
    lora: LoraConfig | None = None  # written since LoRA's targets can be chosen; before, every linear layer
    updates: tuple[Update, ...]


@dataclass(frozen=True)
class Line:
    """An adapter to go on from. `history` is None for one that was made elsewhere: nothing is known of its facts."""

    directory: Path
    settings: Mapping[str, Any]  # adapter_config.json
    history: History | None

    @property
    def updates(self) -> tuple[Update, ...]:
        return self.history.updates if self.history else ()

    @property
    def lora(self) -> LoraConfig:
        """The shape of the adapter and the layers that it adds to."""
        shape = {"rank": self.settings.get("r", 8), "alpha": self.settings.get("lora_alpha", 8)}
        if self.history:
            return (self.history.lora or LoraConfig()).model_copy(update=shape)
        targets = self.settings.get("target_modules")
        if isinstance(targets, list) and targets:
            shape["targets"] = tuple(map(str, targets))
        if isinstance(layers := self.settings.get("layers_to_transform"), list):
            shape["layers"] = tuple(layers)
        return LoraConfig(**shape)

    @cached_property
    def edits(self) -> list[Edit]:
        """Every edit of the line, in the order they were taught."""
        path = self.directory / "edits.parquet"
        if not path.is_file():
            if self.history:
                raise CorsaError(f"{path} is gone: without it the earlier facts of the line cannot be asked again")
            return []
        return from_table(pq.read_table(path))

    @property
    def answered(self) -> bool:
        """Whether it carries what was answered after each of its updates."""
        return (self.directory / "predictions.parquet").is_file()

    @property
    def standing(self) -> list[Edit]:
        """Of each fact the latest edit."""
        return list({edit.chain: edit for edit in self.edits}.values())

    def digest(self) -> str:
        """What an update that goes on from here depends on."""
        names = ("adapter_config.json", WEIGHTS, "edits.parquet", "predictions.parquet")
        sha = hashlib.sha256()
        for path in (self.directory / name for name in names):
            sha.update(f"{path.name} {file_digest(path) if path.is_file() else ''}\n".encode())
        return sha.hexdigest()

    def model(self, wanted: ModelConfig | None) -> ModelConfig:
        """The base model of the adapter: `wanted`, if that is it.

        Raises:
            CorsaError: the adapter is of another base model, or none is wanted and the adapter does not say which.
        """
        own = str(self.settings.get("base_model_name_or_path") or "")
        if wanted is None:
            if self.history:
                return self.history.model
            if own:
                return ModelConfig(name=own)
            raise CorsaError(f"{self.directory / 'adapter_config.json'} does not say its base model: give --model")
        if own and hub_name(wanted.name) != hub_name(own):
            raise CorsaError(
                f"adapter {self.directory} is of base model {own!r}, not of {wanted.name!r}: "
                f"leave --model out, or name an adapter of {wanted.name!r}"
            )
        if self.history and wanted.template != self.history.model.template:
            raise CorsaError(
                f"adapter {self.directory} was taught with template {self.history.model.template!r}: "
                f"leave --template {wanted.template} out"
            )
        return wanted


def open_line(directory: str | Path) -> Line:
    """The adapter in a PEFT directory, with what it was taught if it carries that.

    Raises:
        CorsaError: there is no adapter, or its files are not what this project writes.
    """
    path = Path(directory).expanduser()
    if not (path / "adapter_config.json").is_file() or not (path / WEIGHTS).is_file():
        what = "has no adapter_config.json and adapter_model.safetensors" if path.is_dir() else "does not exist"
        raise CorsaError(f"adapter {path} {what}: name a PEFT directory, such as the --out of an earlier `corsa edit`")
    try:
        settings = json.loads((path / "adapter_config.json").read_text())
        history = History.model_validate_json(text) if (text := _read(path / FILE)) else None
    except (json.JSONDecodeError, ValidationError, UnicodeDecodeError) as error:
        raise CorsaError(f"adapter {path}: a file of it is damaged: {str(error).splitlines()[0]}") from error
    return Line(path, settings, history)


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# What is taught next


def matched(before: Sequence[Edit], draft: Draft) -> Edit | None:
    """The standing edit that a draft revises: of the same chain, or else of the same question."""
    chain, prompt = draft.fields["chain"], normalise(draft.fields["prompt"])
    named = [e for e in before if chain is not None and normalise(e.chain) == normalise(chain)]
    return next(iter(named or [e for e in before if normalise(e.prompt) == prompt]), None)


def unanswered(before: Sequence[Edit], drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts whose old answer neither their file nor the line knows: the model has to be asked."""
    return [draft for draft in drafts if not draft.fields["target_old"] and matched(before, draft) is None]


def join(before: Sequence[Edit], drafts: Sequence[Draft], update: int, answers: Mapping[str, str]) -> list[Edit]:
    """The edits that an update teaches.

    Args:
        before: the standing edits of the line. A draft that asks what one of them asks revises it: it takes over its
            chain, its wordings and neighbors where it brings none, and its answer as the old one.
        drafts: the new facts.
        update: its number, which becomes the `round` of its edits and the start of their ids.
        answers: the model's own answer to each prompt whose old answer is not known otherwise.

    Raises:
        CorsaError: a fact is no change, or not a valid edit.
    """
    edits = []
    for draft in drafts:
        given, known = draft.fields, matched(before, draft)
        change: dict[str, Any] = {"id": f"{update}/{given['id']}", "round": update}
        change["chain"] = known.chain if known else given["chain"] or change["id"]
        change["paraphrases"] = given["paraphrases"] or _paraphrases(known) or wordings(given["prompt"])
        if known:
            change["neighbors"] = given["neighbors"] or _neighbors(known)
            again = normalise(known.target_new) == normalise(given["target_new"])  # taught once more
            old = (known.target_old, known.aliases_old) if again else (known.target_new, known.aliases_new)
        else:
            old = (answers.get(given["prompt"], ""), ())
        if not given["target_old"]:
            change |= {"target_old": old[0], "aliases_old": [*given["aliases_old"], *old[1]]}
        try:
            edits.append(draft.edit(**change))
        except FieldError as error:
            raise CorsaError(f"{draft.where}: {error}") from None
    return edits


def taken_back(before: Sequence[Edit], wanted: Sequence[str], update: int) -> list[Edit]:
    """The edits that teach the old answers of standing edits again, each named by its id, chain or question.

    Raises:
        CorsaError: no standing edit has such a name.
    """
    edits = []
    for name in dict.fromkeys(wanted):
        edit = next((e for e in reversed(before) if normalise(name) in _names(e)), None)
        if edit is None:
            known = "; ".join(f"{e.id} ({e.prompt})" for e in before[:5]) + ("; ..." if len(before) > 5 else "")
            raise CorsaError(f"no standing edit is called {name!r}: give an id or the whole question. Known: {known}")
        edits.append(
            Edit.build(
                id=f"{update}/undo/{edit.id}",
                chain=edit.chain,
                round=update,
                prompt=edit.prompt,
                subject=edit.subject,
                relation=edit.relation,
                target_new=edit.target_old,
                target_old=edit.target_new,
                aliases_new=edit.aliases_old,
                aliases_old=edit.aliases_new,
                paraphrases=_paraphrases(edit),
                neighbors=_neighbors(edit),
            )
        )
    return edits


def _names(edit: Edit) -> set[str]:
    """What an edit can be called by: its id, that of its file, its chain, its question."""
    return {normalise(name) for name in (edit.id, edit.id.partition("/")[2], edit.chain, edit.prompt)}


def _paraphrases(edit: Edit | None) -> tuple[str, ...]:
    return next((p.prompts for p in edit.probes if p.kind == "paraphrase"), ()) if edit else ()


def _neighbors(edit: Edit) -> list[tuple[str, str, Sequence[str]]]:
    return [(p.prompts[0], p.answer, p.aliases) for p in edit.probes if p.kind == "neighbor"]
