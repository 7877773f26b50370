"""How many tokens the edits have: counted on the benchmark itself, or the paper's average where none is named."""

from __future__ import annotations

from collections.abc import Sequence

from corsa.config import ModelConfig
from corsa.data.benchmarks import BENCHMARKS, read
from corsa.data.benchmarks.programs import read_problems
from corsa.errors import CorsaError, unknown_name
from corsa.models.encoding import Encoder
from corsa.models.loading import load_tokenizer

Lengths = Sequence[tuple[int, int, int]]
"""(prompt, new answer, old answer) of each edit, tokens."""

ASSUMED: Lengths = [(12, 4, 4)]
"""About 20 tokens an edit, as CounterFact's have."""


def lengths(model: ModelConfig, benchmark: str, data: str | None, limit: int | None) -> tuple[Lengths, str]:
    """The lengths of a benchmark's edits, and with whose tokenizer they were counted.

    Where the model's own tokenizer cannot be had (no network), the embedded model's counts: its vocabulary is smaller
    than those of larger models, so it counts rather too many.

    Raises:
        CorsaError: the benchmark cannot be read, or no tokenizer can be had.
    """
    if benchmark not in BENCHMARKS:
        raise unknown_name("benchmark", benchmark, BENCHMARKS)
    edits = read(benchmark, data, limit=limit, on_bad_record="skip").edits
    found, whose = _counted(model, [(e.prompt, e.target_new, e.target_old) for e in edits])
    return found, f"{len(found)} edits of {benchmark}, counted with the tokenizer of {whose}"


def program_lengths(model: ModelConfig, data: str, limit: int | None, offset: int) -> tuple[Lengths, str]:
    """The same of updates of the code domain, whose old answers, the model's own, are taken to be as long as the new.

    Raises:
        CorsaError: the file cannot be read, or no tokenizer can be had.
    """
    taught = {p.update: p for p in reversed(read_problems(data, limit=limit, offset=offset))}  # the first of each
    found, whose = _counted(model, [(p.prompt, p.solution, p.solution) for p in taught.values()])
    return found, f"{len(found)} updates, counted with the tokenizer of {whose}"


def _counted(model: ModelConfig, texts: Sequence[tuple[str, str, str]]) -> tuple[Lengths, str]:
    """The lengths of (prompt, new answer, old answer), and whose tokenizer counted."""
    try:
        tokenizer, whose = load_tokenizer(model), model.name
    except CorsaError:
        tokenizer, whose = load_tokenizer(ModelConfig(name="random:tiny-llama")), "the embedded model"
    encoder = Encoder(tokenizer, "qa" if whose != model.name else model.template)
    counted = [(len(encoder.prompt(x)), len(encoder.answer(new)), len(encoder.answer(old))) for x, new, old in texts]
    return counted, whose
