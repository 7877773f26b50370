"""Benchmarks: published files, rows of the Hugging Face hub, a user's file, and `world_facts`, which ships with the
project.

One reader a module, each with `facts(source, rounds)`, an iterator over the facts of a source in their order. A fact is
the list of its edits: one, or for a chain of updates the first `rounds` (all, if None), and an empty list if the chain
has fewer. A record that cannot be used is a `BadRecord`. This module knows the readers by name and picks facts; it
imports nothing heavy, so that a pipeline can be planned from it.
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
    from corsa.data.benchmarks.cases import Contradiction, OnContradiction
    from corsa.data.edit import Edit

OnBadRecord = Literal["skip", "stop"]


class Hub(NamedTuple):
    """A data set of the Hugging Face hub."""

    id: str
    split: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"hub:{self.id}@{self.revision}:{self.split}"


class BadRecord(NamedTuple):
    """A record that cannot be an edit: where it stands in its file, which field is wrong, why, and the remedy."""

    where: str
    field: str
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.field}: {self.reason}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Benchmark:
    """What is known of a benchmark before it is read."""

    name: str
    description: str
    module: str
    signatures: tuple[frozenset[str], ...] = ()
    """Keys by which a record of it is recognised: one of these sets is in every record (published file, hub's rows)."""
    needs_data: bool = True
    """It does not ship with the project: read from the file given by `--data`, or from the hub."""
    hub: Hub | None = None
    """Read from here when no `--data` is given."""
    on_bad_record: OnBadRecord = "skip"
    """skip: list the record and go on; stop: raise at the first one."""
    repeats: bool = False
    """Cases share edits: each is taught once, and asks what all of them ask."""


@dataclass(frozen=True)
class Source:
    """Where a benchmark is read from: a local file or the hub; and the first part of its edits' ids."""

    benchmark: Benchmark
    prefix: str
    path: Path | None = None

    def __str__(self) -> str:
        return str(self.path or self.benchmark.hub)

    def digest(self) -> str:
        """What the edits depend on: the bytes of the file and the first part of the ids; or the data set of the hub."""
        if self.path is None:
            return str(self.benchmark.hub)
        try:
            with self.path.open("rb") as file:
                return f"{self.prefix}:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        except OSError as error:
            raise CorsaError(
                f"{self.path} cannot be read: {error.strerror}; check the path and its permissions"
            ) from error


class Reading(NamedTuple):
    """What was read."""

    edits: list[Edit]
    """In file order, the edits of a chain together and by round."""
    skipped: list[BadRecord]
    """Bad records met before `limit` was reached."""
    source: str
    """Path or hub id."""
    short: int = 0
    """Chains left out for having fewer updates than `rounds`."""
    contradictions: Sequence[Contradiction] = ()
    """Edits that give one question different new answers."""


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
            "your own edits: JSONL, CSV or Parquet with the columns prompt, target_new, target_old",
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
    on_contradiction: OnContradiction = "report",
    whole_cases: bool = True,
) -> Reading:
    """The edits of benchmark `name`, from the file `data` (else the hub, or the copy that ships with the project).

    `rounds`: of a chain only the first `rounds` updates are kept, and chains with fewer are left out; it does not touch
    facts without a chain. `limit`: the number of facts (chains, cases), taken in file order from those that are left,
    after the first `offset`. `whole_cases`: all edits of a case, or its first alone (as the paper counts MQuAKE).

    Raises CorsaError if nothing would be left, if the file is absent or not the benchmark's, with
    `on_bad_record="stop"` at the first bad record, and with `on_contradiction="refuse"` if edits contradict each other.
    """
    if limit is not None and limit < 1:
        raise CorsaError(f"limit {limit}: nothing would be edited; give 1 or more, or leave it out to take every fact")
    if rounds is not None and rounds < 1:
        raise CorsaError(
            f"rounds {rounds}: nothing would be edited; give 1 or more, or leave it out to take every update"
        )
    from corsa.data.benchmarks.cases import resolved, without_repeats

    source = locate(name, data)
    stop = (on_bad_record or source.benchmark.on_bad_record) == "stop"
    facts: Callable[[Source, int | None], Iterator[list[Edit] | BadRecord]]
    facts = import_module(source.benchmark.module).facts

    chosen: list[list[Edit]] = []
    skipped: list[BadRecord] = []
    taken, short = 0, 0
    for fact in facts(source, rounds):
        if isinstance(fact, BadRecord):
            if stop:
                raise CorsaError(f"{source}, {fact}")
            skipped.append(fact)
        elif not fact:
            short += 1
        else:
            taken += 1
            if taken > offset:
                chosen.append(fact if whole_cases else fact[:1])
            if limit is not None and taken == offset + limit:
                break
    if not chosen:
        raise CorsaError(_nothing_left(source, skipped, short, rounds, taken))
    taught, contradicting = resolved(chosen, on_contradiction)
    edits = [edit for fact in (without_repeats(taught) if source.benchmark.repeats else taught) for edit in fact]
    return Reading(edits, skipped, str(source), short, contradicting)


def _nothing_left(source: Source, skipped: list[BadRecord], short: int, rounds: int | None, passed: int) -> str:
    if passed:
        return f"{source} has {passed} facts, and all of them are passed over (offset); pass over fewer"
    if short:
        return f"{source}: none of its {short} chains has {rounds} updates or more; ask for fewer rounds"
    if skipped:
        return f"{source}: none of its {len(skipped)} records can be used; the first: {skipped[0]}"
    return f"{source} is empty: it holds no record; give a file with at least one"


def digest(name: str, data: str | None = None) -> str:
    """What identifies the data of a benchmark in a step: `<first part of the ids>:<sha256 of the file's bytes>`, or
    `hub:<id>@<revision>:<split>`. Cheap. Raises CorsaError if the file is absent.
    """
    return locate(name, data).digest()


def locate(name: str, data: str | None = None) -> Source:
    """Where benchmark `name` is read from. Raises CorsaError if the name is unknown, the file absent or not given."""
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
    path = Path(data).expanduser()
    if not path.is_file():
        kind = "is a directory, not a file" if path.is_dir() else "does not exist"
        raise CorsaError(f"data file {path} {kind}; --data takes the path of the {name} file (seen from {Path.cwd()})")
    return Source(benchmark, _prefix(name, path), path)


def _prefix(name: str, path: Path) -> str:
    if name == "file":
        return path.stem
    part = re.search(r"(?<![a-z])(me|se)(?![a-z])", path.stem.lower()) if name == "atoke" else None
    return f"{name}-{part[1]}" if part else name
