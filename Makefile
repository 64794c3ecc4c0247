# Everything on a fresh machine: `make quickstart` runs the main job, `make test` passes the tests.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two test processes, each with one thread: faster on two cores than one process with two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
OUT ?= out

.PHONY: quickstart results test test-all lint unit slow golden bench gpu-test gpu-first gpu-bench clean

quickstart: $(VENV)/.train
	@echo "== training and evaluating: configs/quickstart.yaml (continues if it was interrupted)"
	$(BIN)/fastsp train --config configs/quickstart.yaml --resume

results: $(VENV)/.train
	@echo "== training and evaluating: configs/digits.yaml, under an hour (continues if it was interrupted)"
	$(BIN)/fastsp train --config configs/digits.yaml --resume

test: lint unit

test-all: lint unit slow

lint: $(VENV)/.test
	@echo "== ruff, mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(VENV)/.test
	@echo "== tests, without the slow ones"
	$(PYTEST) -n 2 --dist worksteal --durations=10 -m "not gpu and not slow"

slow: $(VENV)/.test
	@echo "== the slow tests"
	$(PYTEST) -n 2 --dist worksteal --durations=10 -m "slow and not gpu"

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

# Only where a change of the numbers is meant; the commit says why.
golden: $(VENV)/.test
	@echo "== the golden record of losses and gradient norms: tests/golden/record_*.txt"
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/golden/record.py

bench: $(VENV)/.test
	@echo "== pytest-benchmark: kernels, data, training step, saving; into $(OUT)/bench.json"
	mkdir -p $(OUT)
	$(PYTEST) benchmarks/kernels benchmarks/data benchmarks/step benchmarks/checkpoint -s --benchmark-json=$(OUT)/bench.json

# On a machine with an NVIDIA GPU and its own Python; nothing is installed. Each is one call, interrupted after LIMIT
# seconds with what was measured so far written to OUT. docs/performance.md says which calls to make first.
PYTHON_GPU ?= python3
LIMIT ?= 300
NAME ?= tests
TESTS ?= tests
MARK ?= gpu
ARGS ?=
GPU_ENV = PYTHONPATH=.:kernels$${PYTHONPATH:+:$$PYTHONPATH} CUBLAS_WORKSPACE_CONFIG=:4096:8 \
	FASTSP_COMMIT=$${FASTSP_COMMIT:-`git describe --always --dirty --abbrev=10 2>/dev/null`}
ON_GPU = mkdir -p $(OUT) && $(GPU_ENV) timeout -s INT -k 20 $(LIMIT) $(PYTHON_GPU) -m

gpu-test:
	$(ON_GPU) pytest -p no:cacheprovider -m "$(MARK)" $(TESTS) --continue-on-collection-errors --durations=10 \
		--junitxml=$(OUT)/$(NAME).xml $(if $(findstring benchmark,$(MARK)),--benchmark-json=$(OUT)/$(NAME).json) $(ARGS)

# What to run first, some five minutes: the tests in parallel, beside the compiling of the benchmark; then the kernels.
gpu-first:
	$(MAKE) gpu-test ARGS="-q -n 8" LIMIT=150 TESTS="tests/kernels tests/training tests/perceptual tests/models" & \
		$(MAKE) gpu-bench LIMIT=245; wait
	$(MAKE) gpu-test NAME=kernels TESTS=benchmarks/kernels MARK=benchmark LIMIT=60

# NETWORK: one of `fastsp bench --network`, into a file of its own; none: the default's.
gpu-bench:
	$(ON_GPU) fastsp bench --force $(if $(NETWORK),--network $(NETWORK)) --json $(OUT)/step$(addprefix -,$(NETWORK)).json $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
