# Needs Python >= 3.11, git and make; everything else is installed into .venv on first use.
# Another interpreter: make test PYTHON=python3.12.
# No type checker: what goes wrong here is shapes and dtypes, which mypy does not see. Tried on core, it gave 36
# reports, nearly all about records made by our decorators; ruff and the tests carry the load.
# loadscope: the tests of one module share compiled functions, so they stay on one worker; in order, because modules of one
# long test would come last otherwise.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
WORKERS ?= 2
TESTS ?= tests

# The environment holds TPU's compiler; without a TPU, JAX would look for one first.
export JAX_PLATFORMS ?= cpu

.PHONY: demo test lint systems clean

demo: $(STAMP)
	$(PY) -m benchmarks demo

test: lint
	$(PY) -m pytest -q -n $(WORKERS) --dist loadscope --no-loadscope-reorder $(TESTS)

lint: $(STAMP)
	$(PY) -m ruff check .

systems: $(STAMP)
	$(PY) -m jaxattn.systems --markdown

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; jaxattn needs 3.11 or newer: make PYTHON=/path/to/python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
