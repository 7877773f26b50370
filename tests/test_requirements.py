"""The lock files contain the declared packages, at the tested versions, with a hash for every file."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "requirements"
ENTRY = re.compile(
    r"^([\w.-]+)==([^ ;]+)(?: ; ([^\\]+))? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)
SETS = {"base": ("base",), "dev": ("base", "dev"), "harness": ("base", "dev", "harness"), "serve": ("base", "serve")}


def locked(*names: str, here: bool = False) -> dict[str, str]:
    """The packages of lock files, {name: version}; with `here` only those that are installed on this platform."""
    text = "".join((FOLDER / f"{name}.txt").read_text() for name in names)
    return {
        canonicalize_name(found[1]): found[2]
        for found in ENTRY.finditer(text)
        if not here or found[3] is None or Marker(found[3]).evaluate()
    }


def constrained() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("name", ["base", "dev", "harness", "serve", "torch", "cuda", "model"])
def test_a_lock_file_holds_pins_and_hashes_and_nothing_else(name: str) -> None:
    text = (FOLDER / f"{name}.txt").read_text()
    assert ENTRY.sub("", text) == ""  # no index URL, no option, no entry without a hash
    assert locked(name)


def test_what_is_locked_is_what_is_tested() -> None:
    every = locked("base", "dev", "harness", "serve", "torch", "model")
    known = constrained()
    assert {name: version for name, version in every.items() if known.get(name, version) != version} == {}
    only_elsewhere = {"httpx2-jsfetch"}  # what another platform needs
    assert sorted(set(every) - set(known) - only_elsewhere) == []


@pytest.mark.parametrize(("extra", "files"), SETS.items())
def test_everything_that_is_declared_and_all_that_it_needs_is_locked(extra: str, files: tuple[str, ...]) -> None:
    """The declared dependencies, and then those of each package as it is installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    extras = ["embedded", *(file for file in files if file != "base")]
    declared += [need for name in extras for need in project["project"]["optional-dependencies"][name]]
    versions, left, seen = locked(*files, "torch", here=True), [Requirement(text) for text in declared], set()
    while left:
        need = left.pop()
        name = canonicalize_name(need.name)
        if (name, frozenset(need.extras)) in seen:
            continue
        seen.add((name, frozenset(need.extras)))
        assert name in versions, f"{need} is in none of the lock files {files}: run `make lock`"
        assert need.specifier.contains(versions[name], prereleases=True), f"{need}, but {versions[name]} is locked"
        try:
            further = [Requirement(text) for text in requires(need.name) or ()]
        except PackageNotFoundError:
            continue
        for one in further:
            marks = [{"extra": e} for e in (*need.extras, "")]
            if one.marker is None or any(one.marker.evaluate(mark) for mark in marks):
                left.append(one)


@pytest.mark.process
def test_pip_refuses_a_file_that_is_not_the_one_that_was_locked(tmp_path: Path) -> None:
    """A package made here replaces one that was tampered with on the index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = folder / "harmless-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("harmless.py", "")
        file.writestr("harmless-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: harmless\nVersion: 1.0\n")
        file.writestr("harmless-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("harmless-1.0.dist-info/RECORD", "")
    target = tmp_path / "target"
    for digest, status in (("0" * 64, 1), (hashlib.sha256(wheel.read_bytes()).hexdigest(), 0)):
        (tmp_path / "lock.txt").write_text(f"harmless==1.0 \\\n    --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(folder), "--no-deps"]
        command += ["--require-hashes", "--target", str(target), "-r", str(tmp_path / "lock.txt")]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PIP_CONFIG_FILE": os.devnull})
        assert done.returncode == status, done.stderr
        assert (target / "harmless.py").exists() == (status == 0)
    options = re.search(r"^locked=\((.*)\)$", (FOLDER / "install.sh").read_text(), re.MULTILINE)
    assert options
    assert "--no-deps --require-hashes" in options[1]


def test_the_makefile_installs_from_the_lock_files_alone() -> None:
    text = (ROOT / "Makefile").read_text()
    installs = [line.strip() for line in text.splitlines() if "pip install" in line]
    assert len(installs) == 5  # the project itself; and with a pinned version two tools, for `lock` and `audit`, and
    # the two servers of `test-serving`
    assert [i for i in installs if "--no-deps --no-build-isolation -e ." in i or re.search(r"==[\d.]+$", i)] == installs
    used = {name for line in re.findall(r"\$\(INSTALL\) (.+)", text) for name in line.split()}
    assert used == {"base", "dev", "harness"}
