"""MMLU (Hendrycks et al. 2021, arXiv 2009.03300): reads its files, words its questions as the EleutherAI evaluation
harness does (task `mmlu`, version 1), and computes the accuracy. It measures knowledge that an edit should not change.
"""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from corsa.data.benchmarks import Hub
from corsa.errors import CorsaError, unknown_name
from corsa.evaluation import specificity

HUB = Hub("cais/mmlu", "test")
LETTERS = "ABCD"
COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")

GROUPS = {
    "STEM": [
        "abstract_algebra",
        "anatomy",
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "electrical_engineering",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "machine_learning",
    ],
    "humanities": [
        "formal_logic",
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "international_law",
        "jurisprudence",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "prehistory",
        "professional_law",
        "world_religions",
    ],
    "social sciences": [
        "econometrics",
        "high_school_geography",
        "high_school_government_and_politics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "high_school_psychology",
        "human_sexuality",
        "professional_psychology",
        "public_relations",
        "security_studies",
        "sociology",
        "us_foreign_policy",
    ],
    "other": [
        "business_ethics",
        "clinical_knowledge",
        "college_medicine",
        "global_facts",
        "human_aging",
        "management",
        "marketing",
        "medical_genetics",
        "miscellaneous",
        "nutrition",
        "professional_accounting",
        "professional_medicine",
        "virology",
    ],
}
"""The subjects of each of the four usual groups."""
GROUP_OF = {subject: group for group, subjects in GROUPS.items() for subject in subjects}

QUESTIONS = pa.schema(
    [
        ("subject", pa.string()),
        ("index", pa.int32()),  # position in the subject's test file, from 0
        ("question", pa.string()),  # with its choices, up to "Answer:"
        ("answer", pa.int8()),  # 0 to 3
        ("shots", pa.list_(pa.string())),  # the subject's worked examples, in order
    ]
)
"""One row per question: subjects in alphabetical order, questions in the order of their file."""


@dataclass(frozen=True)
class Question:
    """A question with its choices as text, and the index of the right choice (0 to 3)."""

    index: int
    text: str
    answer: int


@dataclass(frozen=True)
class Subject:
    """The questions of one subject, and its worked examples."""

    name: str
    shots: tuple[str, ...]
    questions: tuple[Question, ...]

    def prompt(self, question: Question, shots: int) -> str:
        """The prompt: the description, the first `shots` worked examples, the question."""
        about = f"The following are multiple choice questions (with answers) about {self.name.replace('_', ' ')}."
        return "\n\n".join([about, *self.shots[:shots], question.text])


@dataclass(frozen=True)
class MmluQuestions:
    """The questions a model is asked, by subject."""

    subjects: tuple[Subject, ...]

    def share(self, part: int, parts: int) -> MmluQuestions:
        """The subjects of worker `part` of `parts`. Subjects are not split (their worked examples are computed once),
        and each worker gets about the same amount of text.
        """
        loads, shares = [0] * parts, [[] for _ in range(parts)]
        for subject in sorted(self.subjects, key=_length, reverse=True):
            least = loads.index(min(loads))
            loads[least] += _length(subject)
            shares[least].append(subject)
        return MmluQuestions(tuple(shares[part]))


def _length(subject: Subject) -> int:
    return sum(map(len, subject.shots)) + sum(len(q.text) for q in subject.questions)


# Reading


def read_mmlu(place: str | None, *, limit: int | None = None, shots: int = 5) -> pa.Table:
    """The questions under `place` (`QUESTIONS`): the first `limit` of each subject, with `shots` worked examples.

    `place` is a directory with test/<subject>_test.csv and dev/<subject>_dev.csv. The files have the header
    question,choice0,choice1,choice2,choice3,answer (0 to 3), or the format first published: the same six columns
    without a header, answers A to D. None: `cais/mmlu` of the Hugging Face hub, which has the same rows.

    Raises CorsaError if there is nothing to read, a column is missing, a row is invalid, or a subject is unknown.
    """
    if limit is not None and limit < 1:
        raise CorsaError(f"limit {limit}: nothing would be asked; give 1 or more, or leave it out to take all")
    if shots < 0:
        raise CorsaError(f"shots {shots}: give 0 or more worked examples; MMLU has 5 a subject")
    rows = []
    for subject, test, dev in _hub_subjects(limit, shots) if place is None else _file_subjects(place, limit, shots):
        if len(dev) < shots:
            raise CorsaError(
                f"{place or HUB}: {subject} has {len(dev)} worked examples (dev); give {shots}, or ask with fewer shots"
            )
        examples = [f"{text} {LETTERS[answer]}" for text, answer in dev]
        rows += [
            {"subject": subject, "index": i, "question": text, "answer": answer, "shots": examples}
            for i, (text, answer) in enumerate(test)
        ]
    return pa.Table.from_pylist(rows, schema=QUESTIONS)


def from_questions_table(table: pa.Table) -> MmluQuestions:
    """The questions of a table made by `read_mmlu`."""
    subjects: dict[str, tuple[tuple[str, ...], list[Question]]] = {}
    for row in table.to_pylist():
        _, questions = subjects.setdefault(row["subject"], (tuple(row["shots"]), []))
        questions.append(Question(row["index"], row["question"], row["answer"]))
    return MmluQuestions(tuple(Subject(name, shots, tuple(found)) for name, (shots, found) in subjects.items()))


def digest(place: str | None) -> str:
    """Identifies the questions in a step: `mmlu:<sha256 of the files' names and content>`, or
    `hub:<id>@<revision>:<split>`. Cheap. Raises CorsaError if there is no file.
    """
    if place is None:
        return str(HUB)
    sha = hashlib.sha256()
    for part in ("test", "dev"):
        for subject, path in sorted(_files(place, part).items()):
            content = path.read_bytes()
            sha.update(f"{part}/{subject} {len(content)}\n".encode() + content)
    return f"mmlu:{sha.hexdigest()}"


Asked = tuple[str, int]
"""A question with its choices as text, and the index of the right choice."""


def _file_subjects(place: str, limit: int | None, shots: int) -> Iterator[tuple[str, list[Asked], list[Asked]]]:
    dev = _files(place, "dev") if shots else {}
    for subject, path in sorted(_files(place, "test").items()):
        if subject not in GROUP_OF:
            raise unknown_name("MMLU subject", subject, GROUP_OF)
        if shots and subject not in dev:
            raise CorsaError(f"{path} has no {Path(place) / 'dev' / subject}_dev.csv beside it for its worked examples")
        yield subject, _read(path, limit), _read(dev[subject], shots) if shots else []


def _files(place: str, part: str) -> dict[str, Path]:
    """The file of each subject in test/ or dev/."""
    folder = Path(place).expanduser() / part
    files = {path.stem.removesuffix(f"_{part}"): path for path in folder.glob("[!.]*.csv")}
    if not files:
        raise CorsaError(
            f"{folder} holds no CSV file: MMLU is a directory with test/<subject>_test.csv and dev/<subject>_dev.csv "
            f"(seen from {Path.cwd()})"
        )
    return files


def _read(path: Path, limit: int | None) -> list[Asked]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            asked = list(islice(_asked(path, csv.reader(file, strict=True)), limit))
    except UnicodeDecodeError as error:
        raise CorsaError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from error
    except csv.Error as error:
        raise CorsaError(f"{path} is not CSV: {error}; check its quotes") from error
    except OSError as error:
        raise CorsaError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    if not asked:
        raise CorsaError(f"{path} holds no question")
    return asked


def _asked(path: Path, lines: Iterable[list[str]]) -> Iterator[Asked]:
    rows = ((number, cells) for number, cells in enumerate(lines, start=1) if any(cells))
    number, first = next(rows, (1, list(COLUMNS)))
    places, width = list(range(len(COLUMNS))), len(COLUMNS)
    if len(set(COLUMNS) & set(first)) > 1:  # a header, possibly incomplete
        missing = [column for column in COLUMNS if column not in first]
        if missing:
            raise CorsaError(
                f"{path}: column {', '.join(missing)} is missing; its header is {','.join(first)}, expected "
                f"{','.join(COLUMNS)} (answer: 0 to 3), or no header and the answers A to D"
            )
        places, width = [first.index(column) for column in COLUMNS], len(first)
    else:
        yield _question(f"{path}, record {number}", first, width, places)
    for number, cells in rows:
        yield _question(f"{path}, record {number}", cells, width, places)


def _question(where: str, cells: Sequence[str], width: int, places: Sequence[int]) -> Asked:
    """A question from the cells of its row. `places` gives the position of each column."""
    if len(cells) != width:
        raise CorsaError(
            f"{where} has {len(cells)} columns instead of {width}; expected {', '.join(COLUMNS)}: is one missing, or a "
            "cell with a comma not quoted?"
        )
    values = [cells[place] for place in places]
    for column, value in zip(COLUMNS, values, strict=True):
        if not value.strip():
            raise CorsaError(f"{where}: {column} is blank; complete the question or take it out")
    *texts, answer = values
    right = {"0": 0, "1": 1, "2": 2, "3": 3, "A": 0, "B": 1, "C": 2, "D": 3}.get(answer.strip())
    if right is None:
        raise CorsaError(f"{where}: answer is {answer!r}; expected 0 to 3, or A to D")
    return _worded(texts[0], texts[1:]), right


def _worded(question: str, choices: Sequence[str]) -> str:
    """The harness's `doc_to_text`."""
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=True))
    return f"{question.strip()}\n{listed}Answer:"


def _hub_subjects(limit: int | None, shots: int) -> Iterator[tuple[str, list[Asked], list[Asked]]]:
    import datasets

    parts: dict[str, dict[str, list[Asked]]] = {"test": defaultdict(list), "dev": defaultdict(list)}
    try:
        for part, asked in parts.items():
            rows: Any = datasets.load_dataset(HUB.id, "all", split=part, revision=HUB.revision)
            for row in rows:
                asked[row["subject"]].append((_worded(row["question"], row["choices"]), int(row["answer"])))
    except Exception as error:  # the library passes on any error of its transport
        raise CorsaError(
            f"{HUB.id} could not be had from the Hugging Face hub: {error}; where there is no network, give a "
            "directory with its test/<subject>_test.csv and dev/<subject>_dev.csv"
        ) from error
    for subject, test in sorted(parts["test"].items()):
        yield subject, test[:limit], parts["dev"][subject][:shots]


# Counting


def accuracy(
    runs: Mapping[int, Sequence[Mapping[str, Any]]], base: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """The share of questions answered right, over seeds, and its difference from the unedited model.

    Overall and by group, every question has the same weight (as in the paper and the harness), so large subjects weigh
    more.

    Args:
        runs: {seed: rows of `multiple_choice.ANSWERS`}. Every seed has answered the same questions.
        base: the unedited model's rows, for the same questions. None: no difference is computed.

    Returns:
        {overall, groups, subjects, shortened}. An entry is as `corsa.evaluation.specificity.share` returns it.
        `shortened`: how many questions were asked with fewer worked examples.
    """
    import numpy as np

    first = next(iter(runs.values()))
    right = np.stack([_right(first, rows) for rows in runs.values()], axis=1)  # (questions, seeds)
    before = None if base is None else _right(first, base)[:, None]
    subjects, groups = defaultdict(list), {group: [] for group in GROUPS}
    for place, row in enumerate(first):
        subjects[row["subject"]].append(place)
        groups[GROUP_OF[row["subject"]]].append(place)

    def share(places: list[int]) -> dict[str, Any]:
        return specificity.share(right[places], None if before is None else before[places])

    return {
        "overall": share(list(range(len(first)))),
        "groups": {group: share(places) for group, places in groups.items() if places},
        "subjects": {subject: share(places) for subject, places in sorted(subjects.items())},
        "shortened": sum(row["shots_dropped"] > 0 for row in first),
    }


def _right(asked: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> Any:
    """1.0 for right rows, in the order of `asked`. Raises CorsaError if `rows` has other questions."""
    import numpy as np

    found = {(row["subject"], row["index"]): row["correct"] for row in rows}
    questions = [(row["subject"], row["index"]) for row in asked]
    if found.keys() != set(questions):
        raise CorsaError("two models answered different MMLU questions, so they cannot be compared; ask both the same")
    return np.array([found[question] for question in questions], dtype=float)
