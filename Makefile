# `make demo` and `make test` set up all they need; see `make help`.
SHELL := /bin/bash
PORT ?= 8000
venv := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test unit check clean
.NOTPARALLEL:

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## the environment in .venv/ and the embedded model; quick when nothing changed
	@deploy/local/setup.sh

demo: setup ## several adapters served as one, on the embedded model
	@$(venv)/python -m vllm_lego.cli demo

serve: setup ## a server that stays up, on the embedded model (PORT=8000)
	@$(venv)/vllm-lego demo --serve --port "$(PORT)"

test: check unit ## everything: check, unit, then the end-to-end tests
	$(venv)/python -m pytest tests --ignore tests/core --ignore tests/plugin

unit: setup ## the unit tests alone
	$(venv)/python -m pytest tests/core tests/plugin

check: setup ## lint, formatting and types
	$(venv)/ruff check .
	$(venv)/ruff format --check .
	$(venv)/mypy

clean: ## remove .venv/ and all caches of the tools; the model in the user's cache stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
