# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@# What else torchtitan asks for (wandb, an older datasets) it does not need to build and train a model.
	$(BIN)/pip install -q -c constraints.txt --no-deps torchtitan spmd_types torch_checkpointing torchdata
	touch $(STAMP)

demo: setup
	$(BIN)/loglinear demo --output out/demo

lint: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --durations=15

clean:
	rm -rf $(VENV) out build dist *.egg-info src/*.egg-info
