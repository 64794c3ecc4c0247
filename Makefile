# Everything on a fresh machine: `make quickstart` runs the main job, `make test` passes the tests.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two test processes, each with one thread: faster on two cores than one process with two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
OUT ?= out

.PHONY: quickstart results test lint unit bench gpu-test gpu-bench gpu-train clean

quickstart: $(VENV)/.train
	@echo "== training and evaluating: configs/quickstart.yaml (goes on where it stopped)"
	$(BIN)/fastsp train --config configs/quickstart.yaml --resume

results: $(VENV)/.train
	@echo "== training and evaluating: configs/digits.yaml, under an hour (goes on where it stopped)"
	$(BIN)/fastsp train --config configs/digits.yaml --resume

test: lint unit

lint: $(VENV)/.test
	@echo "== ruff, mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(VENV)/.test
	@echo "== tests, the slow ones too"
	$(PYTEST) -n 2 --dist worksteal --durations=10

$(VENV)/.train: pyproject.toml constraints.txt
	@echo "== installing fastsp[train] into $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable '.[train]'
	touch $@

$(VENV)/.test: $(VENV)/.train
	@echo "== installing what the tests need"
	$(PIP) --editable '.[train,test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
