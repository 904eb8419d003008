# Every target makes the environment it needs. PYTHON=/path/to/python3.12 chooses the interpreter.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
WORKERS ?= 2
GPU_WORKERS ?= 8
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest
ARGS ?=

.PHONY: help venv demo test test-gpu test-e2e lint bench-smoke clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## the environment alone, in .venv
	@echo "ready: source $(BIN)/activate"

demo: $(STAMP) ## fit, evaluate and stream a small model (at most 3 minutes); ARGS="--dataset etth1"
	@$(BIN)/python -m tsgdn demo $(ARGS)

test: $(STAMP) ## lint, types, import contracts and the fast tests
	@$(MAKE) --no-print-directory lint
	$(PYTEST) -n $(WORKERS) -m "not slow and not gpu" $(ARGS)

test-gpu: $(STAMP) ## tests that need a CUDA device (GPU_WORKERS=8 processes: compiling takes most of the time)
	$(PYTEST) -n $(GPU_WORKERS) -m gpu $(ARGS)

test-e2e: $(STAMP) ## the slow tests: whole fits, process groups, published numbers
	$(PYTEST) -n $(WORKERS) -m "slow and not gpu" $(ARGS)

lint: $(STAMP) ## ruff, format, types, import contracts, tables that fit their rows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/basedpyright --level error
	$(BIN)/python experiments/render.py --check

bench-smoke: $(STAMP) ## the accuracy benchmark on two training steps: it runs and writes its rows; needs TSGDN_DATA
	rm -rf runs/bench-smoke
	$(BIN)/python -m tsgdn bench gluonts --tasks etth1 --mixers gated_deltanet --seeds 0 \
	  --root runs/bench-smoke --results runs/bench-smoke/results.csv --set trainer.max_epochs=1 --set trainer.limit_train_batches=2 $(ARGS)

clean: ## removes the environment and everything that was built; keeps runs and data
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and exactly as pinned: a range, or another package's wish, may bring a newer and far larger build.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
	  found=; why=; \
	  for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.12 python3.11); do \
	    version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || { why="$$why$(if $(PYTHON),; $(PYTHON) does not run)"; continue; }; \
	    case $$version in 3.11|3.12) ;; *) why="$$why; $$python is Python $$version"; continue ;; esac; \
	    if "$$python" -c 'import ensurepip, venv' 2>/dev/null; then found=$$python; break; fi; \
	    why="$$why; $$python lacks ensurepip (Debian: apt-get install python$$version-venv)"; \
	  done; \
	  if [ -z "$$found" ]; then \
	    why=$${why#; }; \
	    echo "tsgdn needs Python 3.11 or 3.12 ($${why:-none was found}); or say make PYTHON=/path/to/python3.12" >&2; exit 1; \
	  fi; \
	  echo "creating $(VENV) with $$found (Python $$version)" >&2; \
	  "$$found" -m venv --clear $(VENV); \
	fi
	@echo "installing into $(VENV) (the first time takes some minutes)" >&2
	@$(BIN)/python -m pip install -qq "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev,plot]'
	@touch $@
