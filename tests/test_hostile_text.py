"""Malicious YAML files and chat templates that try to exhaust time and memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from corsa.config.bounded_yaml import read_yaml
from corsa.config.command_line import _from_file
from corsa.data.benchmarks import world_facts
from corsa.errors import CorsaError
from corsa.experiments.base import Experiment
from corsa.models.encoding import Encoder
from corsa.models.templates import render

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "aliases of aliases": BOMB,
    "aliases under a known field": BOMB.replace("i: &i", "methods: &i"),
    "aliases in keys": "a: &a {" + ", ".join(f"k{i}: 1" for i in range(1000)) + "}\nb: [" + "*a, " * 100 + "*a]",
    "merged aliases": "a: &a {x: 1, y: 2}\n" + "".join(f"k{i}:\n  <<: [{'*a, ' * 200}*a]\n" for i in range(300)),
    "an alias of itself": "methods: &a [*a]",
    "an alias of its mapping": "model: &a {name: *a}",
    "deep lists": "a: " + "[" * 200_000,
    "deep closed lists": "a: " + "[" * 5_000 + "]" * 5_000,
    "deep mappings": "a: " + "{a: " * 5_000 + "1" + "}" * 5_000,
    "deep blocks": "".join(f"{' ' * i}a:\n" for i in range(1_000)),
    "dashes": "- " * 100_000 + "a",
    "many values": "a: [" + "1, " * 300_000 + "1]",
    "many keys": "\n".join(f"k{i}: 1" for i in range(80_000)),
    "large": "a: " + "x" * (2 << 20),
    "a long number": "seeds: [" + "9" * 5_000 + "]",
    "no such day": "a: 2026-99-99",
    "an object": "a: !!python/object/apply:os.system ['touch ran']",
    "an unknown tag": "a: !x 1",
    "no such anchor": "a: *nothing",
    "tabs": "a:\n\t- b",
    "a null byte": "a: \x00",
    "quotes": "a: '" + "''" * 200_000,
    "question marks": "? " * 50_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_configuration_file_is_refused_within_a_second(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    began = time.perf_counter()
    with pytest.raises(CorsaError) as caught:
        _from_file(Experiment, file)
    assert time.perf_counter() - began < 1
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert str(file) in str(caught.value)
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["aliases of aliases", "deep lists", "many values", "an alias of itself"])
def test_a_file_of_facts_is_refused_as_soon(tmp_path: Path, name: str) -> None:
    from corsa.data.benchmarks import read

    file = tmp_path / "facts.yaml"
    file.write_text(HOSTILE[name])
    began = time.perf_counter()
    with pytest.raises(CorsaError, match=r"facts\.yaml"):
        read("world_facts", str(file))
    assert time.perf_counter() - began < 1


def test_sound_yaml_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    for text in ("a: &x [1, 2]\nb: *x\nc: {d: e, <<: {f: g}}", "", "null", "- 2026-01-02\n- 1.5\n- yes", "a: 'é'"):
        file.write_text(text)
        assert read_yaml(file) == yaml.safe_load(text)
    packaged = Path(world_facts.__file__).with_name("world_facts.yaml")
    assert read_yaml(packaged) == yaml.safe_load(packaged.read_text())


REPEATED = {
    "at the top": ("limit: 3\nseeds: [1]\nlimit: 4\n", 3, "limit"),
    "below": ("training: {epochs: 1, batch: 2, epochs: 3}\n", 1, "epochs"),
    "in a list": ("seeds:\n- {a: 1}\n- b: 1\n  b: 2\n", 4, "b"),
    "written in another way": ("lora:\n  'rank': 1\n  rank: 2\n", 3, "rank"),
    "a number in two forms": ("a: {16: 1, 0x10: 2}\n", 1, "0x10"),
    "in what is taken in": ("a: &a {b: 1, b: 2}\nc: {<<: *a}\n", 1, "b"),
    "with controls": ('"a\\e[2J": 1\n"a\\e[2J": 2\n', 2, "a\\x1b[2J"),
}


@pytest.mark.parametrize(("text", "line", "key"), REPEATED.values(), ids=REPEATED)
def test_a_key_that_occurs_twice_is_named_with_its_line(tmp_path: Path, text: str, line: int, key: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(CorsaError) as caught:
        read_yaml(file)
    assert str(caught.value).startswith(f"{file}, line {line}: the key '{key}' occurs twice, first in line ")


def test_a_key_that_overrides_one_taken_in_is_no_repetition(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("a: &a {b: 1, c: 2}\nd: &d {<<: *a, b: 3}\ne: [{<<: *d, c: 4}, *d, {b: 1}]\n1: x\n'1': y\n")
    assert read_yaml(file) == yaml.safe_load(file.read_text())
    assert read_yaml(file)["d"] == {"b": 3, "c": 2}


class Tokenizer:
    """Renders as transformers does: compiled from a string by Jinja's sandbox."""

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def apply_chat_template(self, conversations: list[Any], **_: Any) -> list[str]:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        compiled = environment.from_string(self.chat_template)
        return [compiled.render(messages=messages, add_generation_prompt=True) for messages in conversations]


LONG, LOOP, END = "{% for a in range(999) %}", "{% for b in range(99999) %}", "{% endfor %}"
LOOPS = {
    "loops": 3 * LOOP + 3 * END,
    "loops that set": 2 * LOOP + "{% set x = b %}" + 2 * END,
    "loops that write": 2 * LOOP + "x" * 1000 + 2 * END,
    "recursion": "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "macros": "{% macro m() %}" + LONG + "x" + END + "{% endmacro %}" + LOOP + "{{ m() }}" + END,
    "one question alone": "{% if 'evil' in messages[0]['content'] %}" + 2 * LOOP + 2 * END + "{% endif %}",
    "a long output": "{{ 'x' * 10000000 }}",
    "an error": "{{ raise_exception('no') }}",
    "no file": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "broken": "{% for %}",
    "long": "x" * (1 << 19),
}


def turns(*questions: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": question}] for question in questions]


@pytest.mark.parametrize("template", LOOPS.values(), ids=LOOPS)
def test_a_template_that_does_too_much_is_stopped(template: str) -> None:
    began = time.perf_counter()
    with pytest.raises(CorsaError, match="chat template") as caught:
        render(Tokenizer(template), turns("sound", "evil"), add_generation_prompt=True)
    assert time.perf_counter() - began < 5
    assert "\n" not in str(caught.value)


def test_the_tokenizers_of_transformers_are_stopped_too() -> None:
    """The real library; its compiled templates must be recognised."""
    from corsa.config import ModelConfig
    from corsa.models.loading import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(name="smollm2-135m"))
    questions = [f"Who leads {i}?" for i in range(50)]
    plain: Any = tokenizer.apply_chat_template(turns(*questions), tokenize=False, add_generation_prompt=True)
    assert render(tokenizer, turns(*questions), add_generation_prompt=True) == plain
    assert Encoder(tokenizer, "chat").prompts(questions) == tokenizer(plain, add_special_tokens=False)["input_ids"]
    tokenizer.chat_template = LOOPS["loops"]
    began = time.perf_counter()
    with pytest.raises(CorsaError, match="was stopped: it does more than"):
        Encoder(tokenizer, "chat").prompt("Who?")
    assert time.perf_counter() - began < 5
