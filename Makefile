# Everything on a fresh machine: `make quickstart` runs the main job, `make test` passes the tests.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two test processes, each with one thread: faster on two cores than one process with two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
OUT ?= out

.PHONY: quickstart results test test-all lint unit slow golden bench clean \
	gpu gpu-test gpu-test-kernels gpu-test-step gpu-test-data gpu-bench gpu-bench-kernels gpu-bench-step \
	gpu-graph gpu-data gpu-train

quickstart: $(VENV)/.train
	@echo "== training and evaluating: configs/quickstart.yaml (goes on where it stopped)"
	$(BIN)/fastsp train --config configs/quickstart.yaml --resume

results: $(VENV)/.train
	@echo "== training and evaluating: configs/digits.yaml, under an hour (goes on where it stopped)"
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
	@echo "== the golden record of losses and gradient norms: tests/golden/record.txt"
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/golden/record.py

bench: $(VENV)/.test
	@echo "== pytest-benchmark: kernels, data, training step, saving; into $(OUT)/bench.json"
	mkdir -p $(OUT)
	$(PYTEST) benchmarks/kernels benchmarks/data benchmarks/step benchmarks/checkpoint -s --benchmark-json=$(OUT)/bench.json

# On a machine with one NVIDIA GPU and its own Python: no .venv, nothing installed, each target by itself in less than
# nine minutes. What they write goes to OUT, the compilers' caches to CACHE: a second run with the same one compiles little.
# What is not installed is named, and only what needs it is left out. `make gpu` does everything, in three quarters of an hour at most.
PYTHON_GPU ?= python3
CACHE ?= $(abspath $(OUT))/cache
FASTSP_COMMIT ?= $(shell git describe --always --dirty --abbrev=10 2>/dev/null)
IMPORTS = PYTHONPATH=.:kernels$${PYTHONPATH:+:$$PYTHONPATH}
GPU_ENV = $(IMPORTS) FASTSP_COMMIT=$(FASTSP_COMMIT) FASTSP_CACHE=$(CACHE)/fastsp CUBLAS_WORKSPACE_CONFIG=:4096:8 \
	TORCHINDUCTOR_CACHE_DIR=$(CACHE)/inductor TRITON_CACHE_DIR=$(CACHE)/triton
NEED = $(IMPORTS) $(PYTHON_GPU) -m fastsp.bench.need
HAS_GPU = $(PYTHON_GPU) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'torch finds no GPU')"
KERNEL_PACKAGES = torch triton pytest
MODEL_PACKAGES = $(KERNEL_PACKAGES) diffusers transformers tokenizers pydantic yaml rich typer PIL
DATA_PACKAGES = $(MODEL_PACKAGES) nvidia.dali simplejpeg
GPU_PYTEST = $(GPU_ENV) timeout -s INT -k 20 $(1) $(PYTHON_GPU) -m pytest -p no:cacheprovider $(2)
# Compiling takes most of the time, and is done by the host.
PARALLEL = `$(NEED) xdist 2>/dev/null && printf -- "-n 4 --dist worksteal"`
# Only these files are read: others may need packages that the machine does not have.
GPU_TESTS = `grep -rl "mark\.gpu" tests --include="test_*.py" | grep -v "^tests/\(kernels\|data\)/"`

gpu:
	@$(MAKE) --keep-going gpu-test gpu-bench gpu-graph gpu-data gpu-train

gpu-test:
	@$(NEED) nvidia.dali simplejpeg xformers sklearn scipy peft accelerate webdataset || true
	@$(MAKE) --no-print-directory --keep-going gpu-test-kernels gpu-test-step gpu-test-data

gpu-test-kernels:
	@echo "== the kernels' tests that need a GPU; into $(OUT)/gpu-test-kernels.xml"
	@mkdir -p $(OUT)
	@if $(NEED) $(KERNEL_PACKAGES) && $(HAS_GPU); then $(call GPU_PYTEST,200,tests/kernels -m gpu $(PARALLEL) --durations=5 \
		--continue-on-collection-errors --junitxml=$(OUT)/gpu-test-kernels.xml); \
	else echo "gpu-test-kernels: skipped"; fi

gpu-test-step:
	@echo "== all other tests that need a GPU; into $(OUT)/gpu-test-step.xml"
	@mkdir -p $(OUT)
	@if $(NEED) $(MODEL_PACKAGES) && $(HAS_GPU); then $(call GPU_PYTEST,230,$(GPU_TESTS) -m gpu $(PARALLEL) --durations=10 \
		--continue-on-collection-errors --junitxml=$(OUT)/gpu-test-step.xml); \
	else echo "gpu-test-step: skipped"; fi

gpu-test-data:
	@echo "== the tests of decoding on a GPU; into $(OUT)/gpu-test-data.xml"
	@mkdir -p $(OUT)
	@if $(NEED) $(DATA_PACKAGES) && $(HAS_GPU); then $(call GPU_PYTEST,90,tests/data -m gpu --durations=5 \
		--junitxml=$(OUT)/gpu-test-data.xml); \
	else echo "gpu-test-data: skipped"; fi

gpu-bench:
	@$(MAKE) --no-print-directory --keep-going gpu-bench-kernels gpu-bench-step

gpu-bench-kernels:
	@echo "== the kernels' benchmarks; into $(OUT)/kernels-*.json"
	@mkdir -p $(OUT)
	@if $(NEED) $(KERNEL_PACKAGES) pytest_benchmark && $(HAS_GPU); then for file in benchmarks/kernels/bench_*.py; do \
		$(call GPU_PYTEST,30,$$file -s --benchmark-json=$(OUT)/kernels-`basename $$file .py`.json) || true; done; \
	else echo "gpu-bench-kernels: skipped"; fi

gpu-bench-step:
	@echo "== fastsp bench; into $(OUT)/step.json and $(OUT)/roofline.png"
	@mkdir -p $(OUT)
	@if $(NEED) $(MODEL_PACKAGES) && $(HAS_GPU); then $(GPU_ENV) timeout -s INT -k 20 350 $(PYTHON_GPU) -m fastsp bench \
		--time-limit 270 --force --json $(OUT)/step.json `$(NEED) matplotlib && echo --png $(OUT)/roofline.png`; \
	else echo "gpu-bench-step: skipped"; fi

# What of fastsp's own step is worth what: one CUDA graph or none, the teacher in one call or in two.
gpu-graph:
	@echo "== fastsp bench with and without a CUDA graph, teacher batched and split; into $(OUT)/step-*.json"
	@mkdir -p $(OUT)
	@if $(NEED) $(MODEL_PACKAGES) && $(HAS_GPU); then \
		$(GPU_ENV) timeout -s INT -k 20 290 $(BENCH_OWN) --json $(OUT)/step-graph.json; \
		$(GPU_ENV) timeout -s INT -k 20 220 $(BENCH_OWN) --no-cuda-graph --json $(OUT)/step-no-graph.json; \
	else echo "gpu-graph: skipped"; fi
BENCH_OWN = $(PYTHON_GPU) -m fastsp bench --time-limit 150 --force --no-sweep --rounds 4 \
	--only fastsp_sp --only fastsp_sp_split --only fastsp_mse

gpu-data:
	@echo "== pictures decoded a second, and what a step waits for them; into $(OUT)/data.json"
	@mkdir -p $(OUT)
	@if $(NEED) $(DATA_PACKAGES) pytest_benchmark webdataset && $(HAS_GPU); then \
		$(call GPU_PYTEST,500,benchmarks/data -s --benchmark-json=$(OUT)/data.json); \
	else echo "gpu-data: skipped"; fi

gpu-train:
	@echo "== about a minute of training: pictures in $(OUT)/train/samples"
	@mkdir -p $(OUT)
	@if $(NEED) $(DATA_PACKAGES) sklearn tensorboard && $(HAS_GPU); then \
		$(GPU_ENV) timeout 530 $(PYTHON_GPU) -m fastsp train --config configs/quickstart.yaml --resume \
		run_dir=$(OUT)/train evaluation.enabled=false samples.every=200 \
		stages.0.steps=800 stages.1.steps=200 stages.2.steps=200; \
	else echo "gpu-train: skipped"; fi

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
