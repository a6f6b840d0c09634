# make serve: everything from nothing to a running service.   make test: the same for the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt

.PHONY: serve test fleets rehearsal families device-sim exact chaos mutants check format types lint audit bench clean

serve: $(VENV)/.serve ## set up, then serve on http://127.0.0.1:8000 until Ctrl+C
	@$(BIN)/weft serve

# one thread per process: threads that share a core wait for each other busily
SUITE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 \
  --dist loadfile --no-loadscope-reorder --durations 25

test: $(VENV)/.test ## set up, then the suite; `make fleets`, `make rehearsal` and `make device-sim` run what it leaves out
	@$(SUITE) -m "not fleet and not rehearsal and not device_sim_long"

fleets: $(VENV)/.test ## the shipped fleet, clusters of several nodes, a batch as a Ray job (15 minutes on two cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m fleet tests/graph

rehearsal: $(VENV)/.test ## every tiny model trained for a few steps, compiled, in two processes (half an hour on a busy machine)
	@$(BIN)/python -m pytest -m rehearsal --timeout 7200 tests/tools

families: $(VENV)/.test ## every family of docs/families.md in a mixed batch (two minutes on a busy machine)
	@FAMILIES=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/inference/pipelines/test_families.py

device-sim: $(VENV)/.test ## every model at real size on a simulated GPU, videos too (5 minutes on two cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/device_sim

exact: $(VENV)/.test ## 1,000 random schedules against each request alone (nine minutes of two cores)
	@$(BIN)/python benchmarks/exact.py --processes 2

chaos: $(VENV)/.test ## 2,000 random schedules of the job store, then processes killed at random (5 minutes)
	@CHAOS_EXAMPLES=2000 CHAOS_SEEDS=1,2,3,4,5 CHAOS_JOBS=120 $(BIN)/python -m pytest --timeout 0 --session-timeout 86400 \
	  tests/serving/jobs/test_job_store_properties.py tests/chaos

mutants: $(VENV)/.test ## which changes of the engine and the jobs no test notices (hours); MODULES=deployments/engine/call.py
	@$(PIP) --editable '.[dev,mutants]'
	@$(BIN)/python -m tools.mutants $(MODULES)

check: lint types test fleets ## what a change must pass

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/vulture

types: $(VENV)/.test
	$(BIN)/mypy

audit: $(VENV)/.test ## known weaknesses of everything in constraints.txt; fails when one cannot be looked up
	$(BIN)/python -m pip --disable-pip-version-check install --quiet pip-audit==2.10.1
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test ## serving tax and engine overhead, into benchmarks/results.jsonl
	$(BIN)/python benchmarks/engine_overhead.py
	$(BIN)/python benchmarks/serving_tax.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Weft needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Weft and its dependencies (a few minutes the first time)"
	@$(PIP) --editable .
	@$(BIN)/python -m tools.bytecode
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Weft with its test tools (a few minutes the first time)"
	@$(PIP) --editable '.[dev]'
	@$(BIN)/python -m tools.bytecode
	@touch $@ $(VENV)/.serve

clean: ## remove the environment; jobs and pictures in data/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
