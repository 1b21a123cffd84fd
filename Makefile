# Everything happens in .venv; each target does the set-up that it needs.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
SEEDS  ?= 1
DEVICE ?= cpu
SECONDS ?= 600
WORKERS ?= 2
RESULTS := benchmarks/results
LOWEST := build/lowest
CLAIMS  := $(patsubst benchmarks/test_%.py,%,$(filter-out %/test_gpu.py,$(wildcard benchmarks/test_*.py)))
PIP    := $(BIN)/python -m pip --disable-pip-version-check
LOCK   := -c requirements/constraints.txt

.PHONY: setup demo test test-lowest lint sanitize bench bench-cpu bench-cuda $(CLAIMS:%=bench-%) soak gpu-check clean
# Benchmarks beside each other would measure each other.
.NOTPARALLEL:
.DELETE_ON_ERROR:

setup: $(VENV)/.built

# The packages: slow to install, so apart from the native build.
$(VENV)/.packages: requirements/constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(LOCK) torch torchvision setuptools wheel pybind11 ninja numpy
	FINO_BUILD=0 $(PIP) install -q $(LOCK) --no-build-isolation -e '.[all,demo,test,lint,bench]'
	touch $@

# The native build, again when a source changes.
$(VENV)/.built: $(VENV)/.packages setup.py $(shell find csrc -type f)
	FINO_BUILD=1 $(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

demo: setup
	$(BIN)/fino-fast demo --seeds $(SEEDS)

# Files of tests side by side: many of them wait for processes of their own.
test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# With the oldest packages that pyproject.toml allows, on a copy of what is committed. By uv, which
# reads UV_INDEX and not pip's settings: pip's resolver does not end.
test-lowest:
	rm -rf $(LOWEST)/tree && mkdir -p $(LOWEST)/tree
	git archive HEAD | tar x -C $(LOWEST)/tree
	$(PYTHON) -m venv --clear $(LOWEST)/venv
	$(LOWEST)/venv/bin/python -m pip --disable-pip-version-check install -q uv
	$(PYTHON) requirements/lowest.py > $(LOWEST)/lowest.txt
	cd $(LOWEST)/tree && export VIRTUAL_ENV="$$PWD/../venv" \
	  && install="../venv/bin/uv pip install -q -c ../lowest.txt" \
	  && $$install torch torchvision 'setuptools>=77' wheel pybind11 ninja numpy \
	  && FINO_BUILD=1 $$install --no-build-isolation -e '.[all,demo,test]' \
	  && ../venv/bin/python -m pytest -n $(WORKERS) --dist loadfile -W ignore::DeprecationWarning

# The kernels alone under the sanitizers of addresses, undefined behaviour and threads; part of `make test`.
sanitize: setup
	$(BIN)/python -m pytest tests/csrc

# One quiet machine, nothing else running; the README's table is rewritten from the result.
# On a GPU: make bench DEVICE=cuda
bench: bench-$(DEVICE)

bench-cpu: $(CLAIMS:%=bench-%)
	$(BIN)/python benchmarks/report.py $(CLAIMS:%=$(RESULTS)/%.json)

# A process for each file: the allocator gives back, or keeps, what earlier steps taught it to.
$(CLAIMS:%=bench-%): bench-%: setup
	mkdir -p $(RESULTS)
	$(BIN)/python -m pytest benchmarks/test_$*.py -o timeout=0 --benchmark-only --benchmark-json=$(RESULTS)/$*.json

# The peers are large: installed only where there is a device to measure them on.
bench-cuda: setup
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else f"bench DEVICE=cuda: PyTorch {torch.__version__} finds no CUDA device; nothing was installed or measured")'
	$(PIP) install -q $(LOCK) --no-build-isolation -e '.[bench-gpu]'
	mkdir -p $(RESULTS)
	$(BIN)/python -m pytest benchmarks/test_gpu.py -o timeout=0 --benchmark-only --benchmark-json=$(RESULTS)/gpu.json

# Ten minutes of loading with breaks and kills; fails where memory or open files grow.
soak: setup
	$(BIN)/python benchmarks/soak.py --seconds $(SECONDS)

# Compiles the GPU kernels for chips that are not there, and writes the tables of docs/gpu.md.
gpu-check: setup
	TRITON_INTERPRET=0 $(BIN)/python -m fino_fast.kernels.check --write docs/gpu.md
	$(BIN)/python -m fino_fast.kernels.roofline --write docs/gpu.md

clean:
	rm -rf $(VENV) build *.egg-info fino_fast/*.so
