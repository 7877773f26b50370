"""Benchmarks: published files, rows of the Hugging Face hub, a user's file, and `world_facts`, which ships with the
project.

Each module has one reader, `facts(source, rounds)`: an iterator over the facts of a source in their order. A fact is a
list of edits: one edit, or the first `rounds` updates of a chain (all if None; an empty list if the chain has
fewer). An unusable record is a `BadRecord`. This module finds the readers by name and selects facts. It imports nothing
heavy, so that planning a pipeline is fast.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from corsa.errors import CorsaError, unknown_name

if TYPE_CHECKING:
    from corsa.data.benchmarks.cases import Contradiction, OnContradiction, Repeats
    from corsa.data.edit import Edit

OnBadRecord = Literal["skip", "stop"]

REQUIRED = ("prompt", "target_new", "target_old")
COLUMNS = (
    *REQUIRED,
    *("id", "subject", "relation", "aliases_new", "aliases_old", "paraphrases", "neighbors", "chain", "round"),
)
"""The columns of a user's file (`corsa.data.benchmarks.file`)."""


class Hub(NamedTuple):
    """A data set of the Hugging Face hub."""

    id: str
    split: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"hub:{self.id}@{self.revision}:{self.split}"


class BadRecord(NamedTuple):
    """A record that cannot become an edit: its position in the file, the wrong field, the reason, and the remedy."""

    where: str
    field: str
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.field}: {self.reason}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Benchmark:
    """What is known about a benchmark before it is read."""

    name: str
    description: str
    module: str
    signatures: tuple[frozenset[str], ...] = ()
    """Sets of keys that identify its records. Every record has one of these sets (published file, rows of the hub)."""
    needs_data: bool = True
    """The benchmark does not ship with the project. It is read from the file of `--data`, or from the hub."""
    hub: Hub | None = None
    """The data set to read if `--data` is not given."""
    on_bad_record: OnBadRecord = "skip"
    """skip: list the bad records and continue; stop: report them and refuse the file."""
    repeats: bool = False
    """Cases share edits. A shared edit is taught once, with the questions of all its cases."""


@dataclass(frozen=True)
class Source:
    """Where a benchmark is read from (a local file or the hub), and the prefix of its edits' ids."""

    benchmark: Benchmark
    prefix: str
    path: Path | None = None

    def __str__(self) -> str:
        from corsa.data.benchmarks.files import name_of

        return name_of(self.path) if self.path else str(self.benchmark.hub)

    def digest(self) -> str:
        """Identifies the input: the prefix of the ids and the SHA-256 of the file, or the data set of the hub."""
        if self.path is None:
            return str(self.benchmark.hub)
        try:
            with self.path.open("rb") as file:
                return f"{self.prefix}:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        except OSError as error:
            raise CorsaError(f"{self} cannot be read: {error.strerror}; check the path and its permissions") from error


class Reading(NamedTuple):
    """What was read."""

    edits: list[Edit]
    """In file order. The edits of a chain are together, sorted by round."""
    skipped: list[BadRecord]
    """Bad records found before `limit` was reached."""
    source: str
    """Path or hub id."""
    repeats: Repeats
    """How many questions are not asked, because they are taught or already asked."""
    short: int = 0
    """Number of chains left out because they have fewer updates than `rounds`."""
    contradictions: Sequence[Contradiction] = ()
    """Questions with different new answers."""


def _keys(*names: str) -> frozenset[str]:
    return frozenset(names)


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "world_facts",
            "real facts that changed three times (heads of companies and states, host cities, records); shipped",
            "corsa.data.benchmarks.world_facts",
            needs_data=False,
            on_bad_record="stop",
        ),
        Benchmark(
            "counterfact",
            "CounterFact (Meng et al. 2022): counterfactual edits of Wikidata facts, with paraphrases and neighbors",
            "corsa.data.benchmarks.counterfact",
            signatures=(_keys("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"),),
            hub=Hub("azhx/counterfact", "test"),
        ),
        Benchmark(
            "zsre",
            "ZsRE (Levy et al. 2017) in MEND's format: questions with counterfactual answers",
            "corsa.data.benchmarks.zsre",
            signatures=(_keys("src", "alt", "answers"), _keys("input", "output", "alternatives")),
            hub=Hub("wangzn2001/zsre", "test"),
        ),
        Benchmark(
            "mquake",
            "MQuAKE (Zhong et al. 2023) or MQuAKE-Remastered: cases of one to four edits, with multi-hop questions",
            "corsa.data.benchmarks.mquake",
            signatures=(_keys("requested_rewrite", "single_hops", "questions"),),
            hub=Hub("henryzhongsc/MQuAKE-Remastered", "CF3k"),
            repeats=True,
        ),
        Benchmark(
            "atoke",
            "AToKe (Yin et al. 2024), ME or SE: chains of successive updates of YAGO facts",
            "corsa.data.benchmarks.atoke",
            signatures=(_keys("requested_rewrite", "history_evaluation"),),
        ),
        Benchmark(
            "file",
            "your own edits: JSONL, CSV or Parquet with the columns prompt, target_new, target_old, or in the format "
            "of EasyEdit, UnKE or WikiBigEdit",
            "corsa.data.benchmarks.file",
            signatures=(_keys("prompt", "target_new", "target_old"),),
            on_bad_record="stop",
        ),
    )
}


def read(
    name: str,
    data: str | None = None,
    *,
    limit: int | None = None,
    offset: int = 0,
    rounds: int | None = None,
    on_bad_record: OnBadRecord | None = None,
    on_contradiction: OnContradiction | None = None,
    whole_cases: bool = True,
) -> Reading:
    """The edits of benchmark `name`, from the file `data`, else from the hub or the copy in the project.

    `rounds`: keeps the first `rounds` updates of a chain and leaves out shorter chains; facts without a chain are not
    affected. `limit`: the number of facts (chains, cases), counted in file order among the remaining facts after the
    first `offset`. `whole_cases`: takes all edits of a case, else only its first (as the paper counts MQuAKE).
    `on_contradiction`: by default, contradictions in a user's file are refused, and those in a benchmark are reported.
    Each question is asked once (`corsa.data.benchmarks.cases.asked_once`).

    Raises CorsaError if no edit is left, if the file is absent or belongs to another benchmark, if records are bad
    (with `on_bad_record="stop"`), and if edits contradict each other (with `on_contradiction="refuse"`).
    """
    if limit is not None and limit < 1:
        raise CorsaError(f"limit {limit}: nothing would be edited; give 1 or more, or leave it out to take every fact")
    if rounds is not None and rounds < 1:
        raise CorsaError(
            f"rounds {rounds}: nothing would be edited; give 1 or more, or leave it out to take every update"
        )
    from corsa.data.benchmarks.cases import asked_once, resolved, without_repeats

    source = locate(name, data)
    stop = (on_bad_record or source.benchmark.on_bad_record) == "stop"
    facts: Callable[[Source, int | None], Iterator[list[Edit] | BadRecord]]
    facts = import_module(source.benchmark.module).facts

    chosen: list[list[Edit]] = []
    skipped: list[BadRecord] = []
    taken, short = 0, 0
    for fact in facts(source, rounds):
        if isinstance(fact, BadRecord):
            skipped.append(fact)
        elif not fact:
            short += 1
        else:
            taken += 1
            if taken > offset:
                chosen.append(fact if whole_cases else fact[:1])
            if limit is not None and taken == offset + limit:
                break
    if skipped and stop:
        raise refused(source, skipped)
    if not chosen:
        raise CorsaError(_nothing_left(source, skipped, short, rounds, taken))
    taught, contradicting = resolved(chosen, on_contradiction or contradiction_rule(name))
    once = [edit for fact in (without_repeats(taught) if source.benchmark.repeats else taught) for edit in fact]
    edits, repeats = asked_once(once)
    return Reading(edits, skipped, str(source), repeats, short, contradicting)


def contradiction_rule(name: str) -> OnContradiction:
    """The default for contradictions: refuse them in a user's file, report them in a benchmark."""
    return "refuse" if BENCHMARKS[name].on_bad_record == "stop" else "report"


def refused(source: Source, bad: Sequence[BadRecord]) -> CorsaError:
    """The error for the bad records of a source: their number and the first few."""
    if len(bad) == 1:
        return CorsaError(f"{source}, {bad[0]}")
    more = f", and {len(bad) - 4} more" if len(bad) > 4 else ""
    others = ", ".join(f"{b.where}: {b.field}: {b.reason}" for b in bad[1:4])
    return CorsaError(f"{source}, {bad[0]} ({len(bad)} bad records in all: also {others}{more})")


def _nothing_left(source: Source, skipped: list[BadRecord], short: int, rounds: int | None, passed: int) -> str:
    if passed:
        return f"{source} has {passed} facts, and all of them are passed over (offset); pass over fewer"
    if short:
        return f"{source}: none of its {short} chains has {rounds} updates or more; ask for fewer rounds"
    if skipped:
        return f"{source}: none of its {len(skipped)} records can be used; the first: {skipped[0]}"
    return f"{source} is empty: it holds no record; give a file with at least one"


def digest(name: str, data: str | None = None) -> str:
    """Identifies the data of a benchmark in a step: `<prefix of the ids>:<sha256 of the file's bytes>`, or
    `hub:<id>@<revision>:<split>`. Cheap. Raises CorsaError if the file is absent.
    """
    return locate(name, data).digest()


def locate(name: str, data: str | None = None) -> Source:
    """Where benchmark `name` is read from. Raises CorsaError if the name is unknown or the file absent or not given."""
    if name not in BENCHMARKS:
        raise unknown_name("benchmark", name, BENCHMARKS)
    benchmark = BENCHMARKS[name]
    if data is None:
        if not benchmark.needs_data:
            return Source(benchmark, name, Path(__file__).with_name(f"{name}.yaml"))
        if benchmark.hub is None:
            raise CorsaError(
                f"benchmark {name!r} is not on the hub and does not ship with the project: give its file with --data"
            )
        return Source(benchmark, name)
    from corsa.data.benchmarks.files import regular

    path = regular(data)
    if not path.is_file():
        kind = "is a directory, not a file" if path.is_dir() else "does not exist"
        what = "facts" if name == "file" else name
        raise CorsaError(f"data file {path} {kind}; --data takes the path of a file of {what} (seen from {Path.cwd()})")
    return Source(benchmark, _prefix(name, path), path)


def _prefix(name: str, path: Path) -> str:
    from corsa.data.benchmarks.files import stem

    if name == "file":
        return stem(path)
    part = re.search(r"(?<![a-z])(me|se)(?![a-z])", stem(path).lower()) if name == "atoke" else None
    return f"{name}-{part[1]}" if part else name
