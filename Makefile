# One virtual environment for everything, installed once, and again when its inputs change.
PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
FUZZ ?= 100000
MUTANTS_ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help test fuzz mutants demo bench bench-gpu peers lint format clean

help:  ## say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

test: $(VENV)/.dev  ## install what the tests need, then run all of them
	$(RUN) -m pytest -n $(JOBS) $(PYTEST_ARGS)

fuzz: $(VENV)/.dev  ## try 100,000 random cases of each mechanism, an hour or two; FUZZ=1000 for so many
	$(RUN) -m pytest -n $(JOBS) tests/test_fuzz.py -k random_cases --fuzz $(FUZZ)

mutants: $(VENV)/.dev  ## break the package on purpose, one mistake at a time, half an hour: tests must notice each
	PYTHONPATH=tests $(RUN) -m mutants --jobs $(JOBS) $(MUTANTS_ARGS)

demo: $(VENV)/.demo  ## install what the demo needs, then run examples/long_context_lm.py
	$(RUN) examples/long_context_lm.py

bench: $(VENV)/.bench  ## measure this CPU, an hour or two, and write benchmarks/README.md; BENCH_ARGS=--quick for a trial
	$(RUN) benchmarks/cpu.py $(BENCH_ARGS)
	$(if $(findstring --quick,$(BENCH_ARGS)),,$(RUN) benchmarks/page.py --summary README.md)

bench-gpu: $(VENV)/.bench-gpu  ## measure this GPU, hours, and add it to benchmarks/README.md; BENCH_ARGS=--quick, --judged, --tune
	$(RUN) benchmarks/gpu.py $(BENCH_ARGS)
	$(if $(findstring --quick,$(BENCH_ARGS)),,$(RUN) benchmarks/page.py)

# Its build wants CUDA wherever it finds nvcc, so it must not find one.
peers: $(VENV)/.bench  ## build one more peer of the benchmarks, pytorch-fast-transformers: minutes, and a C++ compiler
	PATH=/usr/bin:/bin $(INSTALL) --no-build-isolation --no-deps pytorch-fast-transformers

lint: $(VENV)/.dev  ## check style, types and the direction of imports
	$(RUN) -m pytest tests/test_tooling.py tests/test_architecture.py

format: $(VENV)/.dev  ## rewrite the code in the one style
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:  ## remove the virtual environment and every cache
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp of an extra: pip leaves what is already satisfied, torch above all, as it is. timm comes alone: it asks for
# torchvision, whose build for another torch breaks transformers, and which the models that are tested do without.
$(VENV)/.%: pyproject.toml constraints.txt | $(RUN)
	$(INSTALL) --editable '.[$*]'
	$(if $(filter dev,$*),$(INSTALL) --no-deps timm)
	@touch $@

$(RUN):
	$(PYTHON) -m venv $(VENV)
