"""A line of updates: a PEFT directory that records the facts it was taught, so that later updates build on them.

    adapter_config.json, adapter_model.safetensors    the adapter, as PEFT, transformers and vLLM load it
    README.md                                         its model card
    report.html, metrics.json                         edit success, generality, side effects
    edits.parquet                                     every edit of the line; `round` is the update that taught it
    predictions.parquet                               every answer so far; forgetting is measured against them
    line.json                                         the base model, and one entry per update

Imports neither torch nor ray: planning an update needs only these files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, ValidationError
from safetensors import safe_open

from corsa.config import Frozen, LoraConfig, ModelConfig
from corsa.data.benchmarks.file import Draft
from corsa.data.edit import Edit, FieldError, from_table
from corsa.data.paraphrase_templates import wordings
from corsa.data.text import bare, folded, same_text
from corsa.errors import CorsaError, nearest
from corsa.experiments.runner import lasting
from corsa.lora.extensions import refuse_extensions
from corsa.lora.peft_settings import read_settings
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
    tuned: dict[str, float] | None = None  # the settings that --tune chose


class History(Frozen):
    """The contents of line.json."""

    model_config = ConfigDict(extra="ignore")

    model: ModelConfig
    lora: LoraConfig | None = None  # absent in older files: every linear layer
    updates: tuple[Update, ...]


@dataclass(frozen=True)
class Line:
    """An adapter to continue from. `history` is None for an adapter made elsewhere: its facts are unknown."""

    directory: Path
    settings: Mapping[str, Any]  # adapter_config.json
    history: History | None

    @property
    def updates(self) -> tuple[Update, ...]:
        return self.history.updates if self.history else ()

    @property
    def lora(self) -> LoraConfig:
        """Rank, alpha and target layers of the adapter."""
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
        """Whether the directory has the answers after each update (predictions.parquet).

        Raises:
            CorsaError: an earlier version of this project wrote these answers.
        """
        path = self.directory / "predictions.parquet"
        if not path.is_file():
            return False
        from corsa.evaluation.prepared_predictions import check_columns  # imports pandas: only if there are answers

        remedy = "teach these updates again, or remove the file (forgetting then begins to be counted with this update)"
        with suppress(pa.ArrowInvalid):  # a damaged file is found when it is read
            check_columns(pq.read_schema(path).names, str(path), remedy)
        return True

    @property
    def standing(self) -> list[Edit]:
        """The latest edit of each fact."""
        return list({edit.chain: edit for edit in self.edits}.values())

    def digest(self) -> str:
        """SHA-256 of the files that the next update depends on."""
        names = ("adapter_config.json", WEIGHTS, "edits.parquet", "predictions.parquet")
        sha = hashlib.sha256()
        for path in (self.directory / name for name in names):
            sha.update(f"{path.name} {file_digest(path) if path.is_file() else ''}\n".encode())
        return sha.hexdigest()

    def model(self, wanted: ModelConfig | None) -> ModelConfig:
        """The base model of the adapter. Checks it against `wanted` if that is given.

        Raises:
            CorsaError: the adapter has another base model, or `wanted` is None and the adapter does not name its own.
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
    """Reads the adapter in a PEFT directory, with its history if it has one.

    Raises:
        CorsaError: there is no adapter, or its files are not in the format of this project.
    """
    path = Path(directory).expanduser()
    path = path if path.exists() else Path(lasting(str(directory))).expanduser()  # written by an earlier job
    if not (path / "adapter_config.json").is_file() or not (path / WEIGHTS).is_file():
        what = "has no adapter_config.json and adapter_model.safetensors" if path.is_dir() else "does not exist"
        raise CorsaError(f"adapter {path} {what}: name a PEFT directory, such as the --out of an earlier `corsa edit`")
    try:
        history = History.model_validate_json(text) if (text := _read(path / FILE)) else None
    except (ValidationError, UnicodeDecodeError) as error:
        raise CorsaError(f"adapter {path}: {FILE} is damaged: {str(error).splitlines()[0]}") from error
    settings = read_settings(path)
    refuse_extensions({"peft_type": "LORA"} | settings, path / "adapter_config.json")
    _check_weights(path / WEIGHTS)
    return Line(path, settings, history)


def _check_weights(file: Path) -> None:
    """Raises CorsaError if the header of a file of weights is damaged, or the file does not have their size."""
    try:
        with safe_open(file, "numpy") as tensors:
            names = list(tensors.keys())
    except Exception as error:  # of Rust, and of the operating system
        raise CorsaError(f"{file} is damaged: {str(error).splitlines()[0]}") from error
    if not names:
        raise CorsaError(f"{file} holds no weights")


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The next update


class Standing:
    """The current edits of a line, found by chain and by question: a line may have thousands of them."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        self._chains: dict[str, Edit] = {}
        self._questions: dict[str, Edit] = {}
        for edit in edits:
            self._chains.setdefault(folded(edit.chain), edit)
            self._questions.setdefault(bare(edit.prompt), edit)

    def matched(self, draft: Draft) -> Edit | None:
        """The current edit that a draft revises: the one with the same chain, else with the same question."""
        chain = draft.fields["chain"]
        named = None if chain is None else self._chains.get(folded(chain))
        return named or self._questions.get(bare(draft.fields["prompt"]))


def unanswered(before: Sequence[Edit], drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts whose old answer is neither in their file nor in the line; the model must be asked for it."""
    known = Standing(before)
    return [draft for draft in drafts if not draft.fields["target_old"] and known.matched(draft) is None]


def reworded(draft: Draft) -> bool:
    """Whether a draft has a wording that differs from its prompt."""
    return any(bare(wording) != bare(draft.fields["prompt"]) for wording in draft.fields["paraphrases"])


def join(before: Sequence[Edit], drafts: Sequence[Draft], update: int, answers: Mapping[str, str]) -> list[Edit]:
    """Makes the edits that an update teaches.

    Args:
        before: the latest edit of each fact of the line. A draft with the same question revises that edit: it takes
            its chain, its answer as the old answer, and its wordings and neighbors if the draft has none.
        drafts: the new facts.
        update: its number, used as the `round` of its edits and as the prefix of their ids.
        answers: the model's answer to each prompt whose old answer is not known otherwise.

    Raises:
        CorsaError: a fact changes nothing, or is not a valid edit.
    """
    edits, current = [], Standing(before)
    for draft in drafts:
        given, known = draft.fields, current.matched(draft)
        change: dict[str, Any] = {"id": f"{update}/{given['id']}", "round": update}
        change["chain"] = known.chain if known else given["chain"] or change["id"]
        own = given["paraphrases"] if reworded(draft) else _paraphrases(known)
        change["paraphrases"] = own or wordings(given["prompt"])
        if known:
            change["neighbors"] = given["neighbors"] or _neighbors(known)
            again = same_text(known.target_new, given["target_new"])  # taught once more
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
    """Makes edits that teach the old answers again. `wanted` names current edits by id, chain or question.

    Raises:
        CorsaError: no current edit has such a name.
    """
    edits = []
    for name in dict.fromkeys(wanted):
        edit = next((e for e in reversed(before) if folded(name) in _names(e)), None)
        if edit is None:
            known = "; ".join(f"{e.id} ({e.prompt})" for e in before[:5]) + ("; ..." if len(before) > 5 else "")
            near = nearest(name, [n for e in before for n in (e.id, e.chain, e.prompt)])
            hint = f"did you mean {near!r}? " if near else ""
            raise CorsaError(
                f"no standing edit is called {name!r}: {hint}Give an id or the whole question. Known: {known}"
            )
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
    """The names that select an edit: its id, its id in the file, its chain, its question."""
    return {folded(name) for name in (edit.id, edit.id.partition("/")[2], edit.chain, edit.prompt)}


def _paraphrases(edit: Edit | None) -> tuple[str, ...]:
    return next((p.prompts for p in edit.probes if p.kind == "paraphrase"), ()) if edit else ()


def _neighbors(edit: Edit) -> list[tuple[str, str, Sequence[str]]]:
    return [(p.prompts[0], p.answer, p.aliases) for p in edit.probes if p.kind == "neighbor"]
