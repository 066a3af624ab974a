# make demo    install into .venv, then train, evaluate and forecast a real series
# make test    install into .venv, then run the tests
# make check   lint, format, types on the installed copy, layout
# make format  rewrite the sources the way `make check` wants them
# make test-oldest, test-newest   the tests that touch a dependency, with the ends of the ranges in pyproject.toml
# make wheel   build the wheel twice, and see that it is the same byte for byte
# make audit   known vulnerabilities of the pinned versions; make sbom  what is installed, as CycloneDX (build/sbom.json)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow test-oldest test-newest check format wheel audit sbom clean

# What a dependency's version can break: reading and writing, the command line, training, model files, the adapters.
TOUCHED := tests/test_config.py tests/test_public_api.py tests/test_imports.py tests/golden tests/datasets \
  tests/integrations tests/kernels/test_operator.py tests/model/test_distributions.py tests/streaming/test_states.py \
  tests/training/test_training.py tests/training/test_checkpoints.py tests/training/test_recovery.py \
  tests/training/test_plots.py tests/training/test_statistical.py tests/commands/test_train.py \
  tests/commands/test_options.py tests/commands/test_forecast.py tests/commands/test_evaluate.py

demo: $(INSTALLED)
	$(BIN)/trellis demo -o demo

test: $(INSTALLED)
	$(BIN)/pytest -m "not slow and not gpu and not network"

test-slow: $(INSTALLED)
	$(BIN)/pytest -m "slow and not gpu and not network"

test-oldest test-newest: test-%:
	$(PYTHON) -m venv --clear build/$*
	$(PYTHON) .ci/bounds.py $* > build/$*.txt
	build/$*/bin/pip install --quiet --constraint build/$*.txt --editable . pytest hypothesis polars
	build/$*/bin/pip freeze --exclude-editable > build/$*.frozen.txt
	build/$*/bin/pytest -q -W default -m "not slow and not gpu and not network" $(TOUCHED)

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

wheel:
	rm -rf build/wheels build/lib build/bdist.*
	for copy in one two; do \
	  SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir build/wheels/$$copy . && \
	  rm -rf build/lib build/bdist.* || exit 1; done
	cmp build/wheels/one/*.whl build/wheels/two/*.whl

audit sbom: $(INSTALLED)
	$(PYTHON) -m venv build/tools
	build/tools/bin/pip install --quiet pip-audit cyclonedx-bom
	$(if $(filter audit,$@),build/tools/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt,\
	  build/tools/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml -o build/sbom.json $(BIN)/python)

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
