# make demo    set up, check every kernel against its definition and time it against what you would use instead
# make test    set up and run all tests
# make help    the rest
.DEFAULT_GOAL := help
PY := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

.PHONY: setup
setup: ## make .venv, install, build (seconds when there is nothing to do)
	@bash tools/setup.sh

.PHONY: demo
demo: setup ## doctor, check, and a short bench
	@bash tools/demo.sh

.PHONY: test
test: setup ## lint and all tests
	@ruff check --quiet . && ruff format --quiet --check .
	@if [ -d .venv/triton-newest ]; then PYTHONPATH=.venv/triton-newest $(PY) -m pytest -q -n 2 tests/kernels/test_specs.py -k "interpreter and float16"; fi
	@$(PY) -m pytest -q -n 2

.PHONY: bench
bench: setup ## the pytest-benchmark suite
	@$(PY) -m pytest benchmarks --benchmark-enable

.PHONY: lint
lint: setup ## what pre-commit checks
	@ruff check . && ruff format --check . && clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh') && codespell $$(git ls-files)

.PHONY: format
format: setup ## format Python and C++
	@ruff check --fix --quiet . ; ruff format . && clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

.PHONY: peers
peers: setup ## install the libraries that bench compares with, pinned, into .peers
	@bash tools/peers.sh

.PHONY: budget
budget: setup ## compile every kernel for every target and compare with the committed budgets
	@rlhf-kernels budget

.PHONY: gpu
gpu: ## build, test, check, tune and time with the python3 found here (no pip, no network); results under $$OUT; PART=right or PART=fast: half
	@bash tools/gpu.sh $(PART)

.PHONY: gpu-bars
gpu-bars: ## time large shapes on a GPU, likewise
	@bash tools/gpu.sh bars

.PHONY: clean
clean: ## remove what was built, keep .venv
	@rm -rf build .cache rlhf_kernels/*.so rlhf_kernels/_build.json *.egg-info .venv/.built
