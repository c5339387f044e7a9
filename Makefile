# `make demo` and `make test` set up all they need; see `make help`.
SHELL := /bin/bash
PORT ?= 8000
venv := .venv/bin
oldest_vllm := 0.27.1
pytest := $(venv)/python -m pytest --numprocesses 2
# A file of tests shares a server. The files with the fewest tests take longest, and would come last.
by_file := --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test unit check oldest clean
.NOTPARALLEL:
# Many images set it: each process would compile all of vLLM and PyTorch again, and a server is three.
unexport PYTHONDONTWRITEBYTECODE

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## the environment in .venv/ and the embedded model; quick when nothing changed
	@deploy/local/setup.sh

demo: setup ## several adapters served as one, on the embedded model
	@$(venv)/python -m vllm_lego.cli demo

serve: setup ## a server that stays up, on the embedded model (PORT=8000)
	@$(venv)/vllm-lego demo --serve --port "$(PORT)"

test: check unit ## everything: check, unit, the tests of deploy/ and end to end, oldest
	@deploy/local/deploy_tools.sh
	$(pytest) $(by_file) tests --ignore tests/core --ignore tests/plugin
	@$(MAKE) --no-print-directory oldest

oldest: ## what matters most of the tests, on the oldest vLLM that runs beside the same torch
	@deploy/local/setup.sh $(oldest_vllm)
	PYTHONPATH=$(CURDIR)/.venv/oldest-vllm$${PYTHONPATH:+:$$PYTHONPATH} $(pytest) $(by_file) \
		tests/plugin/test_vllm_patches.py tests/plugin/test_cli.py \
		tests/e2e/test_cli.py tests/e2e/test_serving.py tests/e2e/test_errors.py \
		'tests/e2e/test_merge_is_right.py::test_served_tokens_are_those_of_the_offline_merge[weighted]'

unit: setup ## the unit tests alone
	$(pytest) --dist worksteal tests/core tests/plugin

check: setup ## lint, formatting and types
	$(venv)/ruff check .
	$(venv)/ruff format --check .
	$(venv)/mypy

clean: ## remove .venv/ and all caches of the tools; the model in the user's cache stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
