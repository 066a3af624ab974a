# make demo    install into .venv, then train, evaluate and forecast a real series
# make test    install into .venv, then run the tests
# make check   lint, format, types on the installed copy, layout
# make format  rewrite the sources the way `make check` wants them

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow check format clean

demo: $(INSTALLED)
	$(BIN)/trellis demo -o demo

test: $(INSTALLED)
	$(BIN)/pytest -m "not slow and not gpu and not network"

test-slow: $(INSTALLED)
	$(BIN)/pytest -m "slow and not gpu and not network"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types
	$(BIN)/pip install --quiet --no-deps --target build/types .
	rm -rf build/lib build/bdist.*
	MYPYPATH=build/types $(BIN)/mypy -p trellis_ts
	$(BIN)/pytest -q tests/test_layout.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build demo *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "trellis-ts needs Python 3.11 or later; $(PYTHON) is older. Name another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python's venv module is missing. On Debian or Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@
