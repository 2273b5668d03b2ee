# Commands run in .venv, which is made when first needed; PYTHON=python uses the environment that is active.
PYTHON ?= .venv/bin/python
WORKERS ?= 2
SETUP := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/ready)

# One thread per worker: the tests are many small models, and two workers that each take all cores are slower.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo docs test fuzz hf-tests test-integrations lint format quickstart wheel-test

demo: $(SETUP)  ## answers about a bundled scene with and without merging, and pictures of the merging
	$(PYTHON) -m illava_hooks ask --question "how many triangles are there ?" --compare
	$(PYTHON) -m illava_hooks visualize --question "how many triangles are there ?" --output merge-pictures

test: $(SETUP)  ## all tests, with the examples as smoke tests
	$(PYTHON) -m pytest -n $(WORKERS) $(TESTS)

fuzz: $(SETUP)  ## 2,000 random settings on random prompts
	ILLAVA_FUZZ_CASES=2000 $(PYTHON) -m pytest -n $(WORKERS) tests/test_fuzz.py

hf-tests: $(SETUP)  ## transformers' own model tests on stock and patched models; HF_TESTS=--write fills docs/COMPATIBILITY.md
	PYTHONPATH="tests$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m transformers_suite.run --workers $(WORKERS) $(HF_TESTS)

.venv/ready: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

docs: $(SETUP)  ## the site, into build/site
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

lint: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: $(SETUP)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

quickstart: $(SETUP)
	$(PYTHON) examples/quickstart.py

wheel-test: $(SETUP)  ## the built wheel, in an environment of its own, answers with its embedded model
	rm -rf build/wheel build/clean
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	python3 -m venv build/clean
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build/wheel/*.whl
	cd build && clean/bin/illava-hooks ask --question "how many triangles are there ?" --compare
