# make demo   serve the shipped 4-bit model and chat with it      make test   everything that CI checks but lint and types
# make lint   ruff and mypy                                       make format let ruff rewrite
.PHONY: demo test lint format protos setup
PY := .venv/bin/python

setup:
	@.ci/setup dev

demo:
	@.ci/setup run
	@$(PY) -m jqserve.demo

test: setup
	@$(PY) -m pytest -n 2 --dist loadfile -q --durations=15 tests

lint: setup
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy

format: setup
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .
