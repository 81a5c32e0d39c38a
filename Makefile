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
LEROBOT := .venv-lerobot
LEROBOT_PINS := tests/lerobot_0_6_1.txt
LEROBOT_PYTHONS ?= python3.12 python3.13 $(HOME)/.pyenv/versions/3.1[23].*/bin/python
CHECK := import sys; v = sys.version_info; v >= (3, 11) or sys.exit("bridge needs Python 3.11 or newer; " + sys.executable + " is " + str(v[0]) + "." + str(v[1]) + ". Name another: make PYTHON=python3.12 ...")

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test slow bench lint types fuzz format clean old-orbax lerobot

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

lerobot: $(LEROBOT)/.installed ## make .venv-lerobot with LeRobot, for the tests that run it; needs Python 3.12 or 3.13, and says so

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
	rm -rf $(VENV) $(OLD_ORBAX) $(LEROBOT) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
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

# The pins are the whole of it and nothing is resolved: PyPI's torch would bring gigabytes of CUDA, for which
# stand-ins are compiled. Where this cannot be made, it says why, and the tests that need it are skipped.
$(LEROBOT)/.installed: $(LEROBOT_PINS) tests/kit/without_cuda.py
	@for python in $(LEROBOT_PYTHONS); do \
		if $$python -c 'import sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' 2>/dev/null; then break; fi; \
		python=; \
	done; \
	if [ -z "$$python" ]; then \
		echo "no $(LEROBOT): LeRobot needs Python 3.12 or 3.13. Name one: make lerobot LEROBOT_PYTHONS=python3.12" >&2; \
	elif ! { cc --version && nm --version && readelf --version; } >/dev/null 2>&1; then \
		echo "no $(LEROBOT): it needs a C compiler (cc, nm, readelf)" >&2; \
	else \
		set -e; \
		echo "making $(LEROBOT) with $$($$python --version) (2.3 GB, a minute or two)"; \
		$$python -m venv --clear $(LEROBOT); \
		$(LEROBOT)/bin/python -m pip --disable-pip-version-check install -qq --no-deps --requirement $(LEROBOT_PINS); \
		$(LEROBOT)/bin/python tests/kit/without_cuda.py; \
		touch $@; \
	fi

$(INSTALLED): $(PINS)
	$(call install,.)
	@touch $@

$(TESTABLE): $(PINS)
	$(call install,.[test])
	@touch $(INSTALLED) $@
