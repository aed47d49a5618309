# Requires Python 3.11 or later and make. PIP_ARGS is passed to pip, e.g. to choose a different build of torch.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
# Number of parallel test processes, each with one torch thread. PYTEST_ARGS is passed to pytest.
WORKERS ?= 2
PYTEST_ARGS ?=
VENV := .venv
PINS :=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PLUGINS := $(wildcard plugins/*/pyproject.toml)

# Without bytecode, every test process compiles the package and the tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-reliability test-transformers4 test-lowest test-wheel check format docs bench bench-check gpu-wheels

setup: $(STAMP)

$(STAMP): pyproject.toml $(PLUGINS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[dev]' $(PINS)
	for plugin in $(dir $(PLUGINS)); do $(BIN)/python -m pip install $(PIP_ARGS) --no-deps -e $$plugin || exit 1; done
	touch $@

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/longalign demo --output runs/demo

# Without tests that start several processes or run the documents, which `make check` runs.
test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests $(wildcard plugins/*/tests) -m 'not (processes or docs or reliability)' $(PYTEST_ARGS)

# Slow robustness tests; docs/reliability.md lists the results.
test-reliability: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests -m reliability $(PYTEST_ARGS)

# In its own environment: transformers 4 needs huggingface_hub 0, which later versions of diffusers do not support.
test-transformers4:
	$(MAKE) test VENV=.venv-transformers4 PINS="'transformers<5' 'diffusers<0.40'"

# The lowest versions in pyproject.toml, except for torch.
test-lowest:
	$(MAKE) test VENV=.venv-lowest PINS="$$($(PYTHON) -c 'import tomllib; requirements = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; print(*(r.split(",")[0].replace(">=", "==") for r in requirements if not r.startswith("torch")))')"

# Builds sdist and wheel, installs the wheel in its own environment and runs the sdist's tests with it (-P: not with the tree).
test-wheel: $(STAMP)
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install $(PIP_ARGS) "$$(ls dist/*.whl)[dev]" $(foreach plugin,$(PLUGINS),./$(dir $(plugin)))
	rm -rf dist/tree && mkdir -p dist/tree && tar -xzf dist/*.tar.gz -C dist/tree --strip-components 1
	cd dist/tree && ../../.venv-wheel/bin/python -P -m pytest -n $(WORKERS) --dist worksteal tests plugins/*/tests $(PYTEST_ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site in site/; a broken link, a docstring that does not fit its function or a cell of the notebook that fails is an error.
docs: $(STAMP)
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/mkdocs build

# Takes from minutes to an hour of a machine that does nothing else; `make bench BENCH=reward_step` runs one.
bench: $(STAMP)
	$(BIN)/python benchmarks $(BENCH)

# Compares a few ratios of CPU time with benchmarks/check.json, in a minute, also beside other programs.
bench-check: $(STAMP)
	$(BIN)/python benchmarks/_check.py runs/check.json
	$(BIN)/python benchmarks/compare.py --ratios --slower 1.25 benchmarks/check.json runs/check.json

# Packages that benchmarks/gpu.sh needs on a machine with only torch, transformers, accelerate and peft: GPU_PYTHON on x86-64.
GPU_PYTHON ?= 3.12
gpu-wheels: $(STAMP)
	rm -rf .whl
	$(BIN)/python -m pip download --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --implementation cp \
	  $(addprefix --platform manylinux,_2_28_x86_64 _2_17_x86_64 2014_x86_64) -d .whl 'importlib-metadata<9' \
	  $$($(BIN)/python -m pip freeze | grep -iE '^(diffusers|open.clip.torch|catalogue|pydantic(.core)?|typing.(inspection|extensions)|annotated-types|ftfy|wcwidth)==')

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n $(WORKERS) tests -m 'processes or docs'
	GPU_SMOKE=1 GPU_LINES=0 GPU_OUTPUT=runs/gpu-smoke PYTHON=$(BIN)/python benchmarks/gpu.sh
