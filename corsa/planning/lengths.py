"""Token lengths of the edits: counted on the benchmark, or the paper's average if no benchmark is named."""

from __future__ import annotations

from collections.abc import Sequence

from corsa.config import ModelConfig
from corsa.data.benchmarks import BENCHMARKS, read
from corsa.data.benchmarks.code_prompt import TEMPLATE
from corsa.data.benchmarks.programs import read_problems
from corsa.errors import CorsaError, unknown_name
from corsa.models.encoding import Encoder
from corsa.models.loading import load_tokenizer

Lengths = Sequence[tuple[int, int, int]]
"""(prompt, new answer, old answer) of each edit, in tokens."""

ASSUMED: Lengths = [(12, 4, 4)]
"""About 20 tokens per edit, as in CounterFact."""


def lengths(model: ModelConfig, benchmark: str, data: str | None, limit: int | None) -> tuple[Lengths, str]:
    """The lengths of a benchmark's edits, and the name of the tokenizer that counted them.

    If the model's own tokenizer is not available (no network), the embedded model's is used. Its vocabulary is smaller
    than those of larger models, so it tends to count too many tokens.

    Raises:
        CorsaError: the benchmark cannot be read, or no tokenizer can be had.
    """
    if benchmark not in BENCHMARKS:
        raise unknown_name("benchmark", benchmark, BENCHMARKS)
    edits = read(benchmark, data, limit=limit, on_bad_record="skip").edits
    found, whose = _counted(model, [(e.prompt, e.target_new, e.target_old) for e in edits])
    return found, f"{len(found)} edits of {benchmark}, counted with the tokenizer of {whose}"


def program_lengths(
    model: ModelConfig, data: str, limit: int | None, offset: int, template: str = TEMPLATE
) -> tuple[Lengths, str]:
    """The same for updates of the code domain, asked with a prompt template. The model itself writes the old answers:
    they are assumed to be as long as the new ones.

    Raises:
        CorsaError: the file cannot be read, or no tokenizer can be had.
    """
    problems = read_problems(data, limit=limit, offset=offset, template=template)
    taught = {p.update: p for p in reversed(problems)}  # the first problem of each update
    found, whose = _counted(model, [(p.prompt, p.solution, p.solution) for p in taught.values()])
    return found, f"{len(found)} updates, counted with the tokenizer of {whose}"


def _counted(model: ModelConfig, texts: Sequence[tuple[str, str, str]]) -> tuple[Lengths, str]:
    """The lengths of (prompt, new answer, old answer), and the name of the tokenizer."""
    try:
        tokenizer, whose = load_tokenizer(model), model.name
    except CorsaError:
        tokenizer, whose = load_tokenizer(ModelConfig(name="random:tiny-llama")), "the embedded model"
    encoder = Encoder(tokenizer, "qa" if whose != model.name else model.template)
    counted = [(len(encoder.prompt(x)), len(encoder.answer(new)), len(encoder.answer(old))) for x, new, old in texts]
    return counted, whose
