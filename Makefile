# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint docs docs-serve clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@# What else torchtitan asks for (wandb, an older datasets) it does not need to build and train a model.
	$(BIN)/pip install -q -c constraints.txt --no-deps torchtitan spmd_types torch_checkpointing torchdata
	touch $(STAMP)

demo: setup
	$(BIN)/loglinear demo --output out/demo

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'The site is in out/site: open out/site/index.html.'

docs-serve: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

lint: setup
	$(BIN)/ruff check src tests benchmarks docs/site.py
	$(BIN)/ruff format --check src tests benchmarks docs/site.py
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --durations=15

clean:
	rm -rf $(VENV) out build dist *.egg-info src/*.egg-info
