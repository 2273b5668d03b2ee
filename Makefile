PYTHON ?= python
WORKERS ?= 2

# One thread per worker: the tests are many small models, and two workers that each take all cores are slower.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: test lint format quickstart

test:  ## all tests, with the examples as smoke tests
	$(PYTHON) -m pytest -n $(WORKERS)

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

quickstart:
	$(PYTHON) examples/quickstart.py
