# Everything a fresh machine needs is set up by the target itself: Python 3.11 and make are enough.
#   make study   the built-in study: table and report in study/
#   make test    linters, types and tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: study test slow-test benchmarks clean

study: $(VENV)/.installed
	$(BIN)/bitlaw study --out study

test: $(VENV)/.installed-dev $(VENV)/.browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

slow-test: $(VENV)/.installed-dev $(VENV)/.browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow

benchmarks: $(VENV)/.installed-dev
	for name in fid packing sampling; do $(BIN)/python benchmarks/$$name.py || exit 1; done

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bitlaw needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: a later range would otherwise bring the newest CUDA build.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The report is tested in the system's Chromium.
$(VENV)/.browser: | $(VENV)/bin/python
	command -v chromium >/dev/null || { \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq --no-install-recommends chromium >/dev/null; }
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
