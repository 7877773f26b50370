# Two commands do everything on a bare machine (Python 3.11 or newer):
#   make demo   installs, then edits the embedded model over three rounds and writes a report
#   make test   installs, then lints, checks types and runs all tests

VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
INSTALL = requirements/install.sh $(BIN)/python
LOCKS = torch cuda base dev harness model

.PHONY: demo test check test-fast test-process test-ray test-long links lock audit clean

demo: $(VENV)/.demo
	$(BIN)/python pipelines/continual.py

test: check test-fast test-process test-ray

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

SPREAD = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-fast: $(VENV)/.test   ## in one process each, without Ray: about a minute on 2 cores
	$(SPREAD) -m "not process and not ray and not long"

test-process: $(VENV)/.test   ## with servers, drivers, browsers, sandboxes and commands, without Ray: about a minute
	$(SPREAD) -m "process and not ray and not long"

test-ray: $(VENV)/.test    ## on a local Ray cluster, with real processes
	$(BIN)/python -m pytest -m ray

test-long: $(VENV)/.test   ## experiments, faults, ZeRO stages on tiny models, MMLU beside its harness: not in `test`
	$(INSTALL) base dev harness
	$(BIN)/python -m pytest -m long

# Every file that is installed is checked against its hash; see requirements/renew.sh for what the lists are.
$(VENV)/.demo: pyproject.toml requirements/base.txt requirements/torch.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) base
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.test: $(VENV)/.demo requirements/dev.txt
	$(INSTALL) base dev
	$(BROWSER)
	touch $@

# The report page is looked at in Chromium. Without it, and without the right to install it, those tests skip and say so.
BROWSER = command -v chromedriver >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null; } \
	|| echo "no Chromium: the tests of the page in a browser will be skipped"

links: $(VENV)/.test       ## the line numbers in the documents, as the code stands now
	$(BIN)/python tests/documents.py

lock: $(VENV)/.demo        ## renews requirements/*.txt, after a change to pyproject.toml or constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check uv==0.13.9
	UV=$(BIN)/uv PYTHON=$(BIN)/python requirements/renew.sh

audit: $(VENV)/.demo       ## what is locked, against the advisories of the Python Package Index; needs the network
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	$(VENV)/audit/bin/pip-audit --disable-pip --require-hashes $(LOCKS:%=--requirement requirements/%.txt)

clean:
	rm -rf $(VENV) build dist *.egg-info
