# Each target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test smoke slow survive lint types docs sanitize clean

demo: $(READY)  ## train dense and MID-L on real handwritten digits and print the table
	$(BIN)/midl compare digits

test: $(READY)  ## pass the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

smoke: $(READY)  ## every data set present and every method on a few rows, and the report
	rm -rf build/smoke
	$(BIN)/midl reproduce --profile smoke --workers 2 --threads 1 --out build/smoke
	$(BIN)/midl report build/smoke --out build/smoke/report.html

slow: $(READY)  ## the tests that take longer
	$(BIN)/python -m pytest -m slow

survive: $(READY)  ## the longer tests that CI runs: a sweep killed twenty times, two processes as one, a Ray cluster
	$(BIN)/pip install --quiet ray
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -p no:xdist \
		tests/lab/reproduce/test_sweep.py::test_a_sweep_that_is_killed_twenty_times_ends_as_the_undisturbed_one \
		tests/lab/reproduce/test_distributed.py tests/lab/reproduce/test_launch.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

sanitize:  ## the native kernels' self test under AddressSanitizer and UBSan; needs cmake and a C++20 compiler
	native/sanitize.sh

docs: $(READY)  ## build the documentation into site/
	$(BIN)/pip install --quiet -e '.[docs]'
	$(BIN)/mkdocs build --strict

$(READY): pyproject.toml constraints.txt $(shell find native -type f 2>/dev/null)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
