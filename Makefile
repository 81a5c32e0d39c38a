# `make demo` and `make test` need nothing but a Python: everything else goes into .venv.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
FOLDERS := bridge adapters cli
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.installed-test
PINS := pyproject.toml constraints.txt
FUZZED := safetensors index_json ocdbt ocdbt_dump zarray zarr_json metadata chunk adapter_config record config_json norm_stats
SECONDS ?= 20
OLD_ORBAX := .venv-old-orbax
OLD_PINS := tests/orbax_0_11_13.txt
CHECK := import sys; v = sys.version_info; v >= (3, 11) or sys.exit("bridge needs Python 3.11 or newer; " + sys.executable + " is " + str(v[0]) + "." + str(v[1]) + ". Name another: make PYTHON=python3.12 ...")

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test slow bench lint types fuzz format clean old-orbax

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(TESTABLE) ## make .venv with bridge, editable, and all that the tests need

demo: $(INSTALLED) ## the whole tour on the small checkpoint that ships with bridge
	$(VENV)/bin/bridge demo

test: $(TESTABLE) ## run the tests; PYTEST_ARGS="-k name" picks
	$(VENV)/bin/python -m pytest -m 'not slow' $(PYTEST_ARGS)

slow: $(TESTABLE) ## run the tests that take long: crashes at system calls, executors of other processes
	$(VENV)/bin/python -m pytest -m slow $(PYTEST_ARGS)

bench: $(TESTABLE) ## measure at full size (half an hour, 40 GB below TMPDIR); BENCH_ARGS="--help" tells how to take less
	$(VENV)/bin/python -m tests.benchmarks.bench $(BENCH_ARGS)

old-orbax: $(OLD_ORBAX)/.installed ## make .venv-old-orbax with openpi's pinned Orbax, for the tests that restore with it

lint: $(TESTABLE) ## check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(TESTABLE) ## check types
	$(VENV)/bin/mypy $(FOLDERS)

fuzz: $(TESTABLE) ## fuzz every reader, SECONDS=20 each; needs atheris, and says so where it has no wheel
	@if ! $(VENV)/bin/python -c 'import atheris' 2>/dev/null && ! $(PIP) install -qq --only-binary :all: --constraint constraints.txt atheris; then \
		echo "not fuzzed: atheris has no wheel for this machine"; \
	else \
		mkdir -p build; \
		for target in $(FUZZED); do \
			echo "fuzzing $$target for $(SECONDS) s"; \
			$(VENV)/bin/python tests/fuzz/run.py $$target --seconds $(SECONDS) >build/fuzz.log 2>&1 || { cat build/fuzz.log; exit 1; }; \
			grep -E 'number_of_executed_units|peak_rss' build/fuzz.log; \
		done; \
	fi

format: $(TESTABLE) ## mend style and formatting
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) $(OLD_ORBAX) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(FOLDERS) tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# An unusable .venv (interrupted, or of an older Python) is made anew. setuptools comes first, pinned like
# the rest, so that nothing is built in an environment that pip resolves by itself.
define install
	@if ! $(VENV)/bin/python -c '$(CHECK)' 2>/dev/null || ! $(PIP) --version >/dev/null 2>&1; then \
		command -v $(PYTHON) >/dev/null || { echo "bridge needs Python 3.11 or newer: $(PYTHON) was not found. Name another: make PYTHON=python3.12 ..." >&2; exit 1; }; \
		$(PYTHON) -c '$(CHECK)' && echo "making $(VENV) with $$($(PYTHON) --version)" && $(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "installing bridge and what it needs into $(VENV) (minutes, the first time)"
	$(PIP) install -qq --constraint constraints.txt setuptools wheel
	$(PIP) install -qq --constraint constraints.txt --no-build-isolation --editable '$(1)'
endef

$(OLD_ORBAX)/.installed: $(OLD_PINS)
	$(PYTHON) -m venv --clear $(OLD_ORBAX)
	$(OLD_ORBAX)/bin/python -m pip --disable-pip-version-check install -qq --requirement $(OLD_PINS)
	@touch $@

$(INSTALLED): $(PINS)
	$(call install,.)
	@touch $@

$(TESTABLE): $(PINS)
	$(call install,.[test])
	@touch $(INSTALLED) $@
