# make demo   serve the shipped 4-bit model and chat with it      make test        the tests
# make lint   ruff and mypy                                       make integration whole commands, gateways, small benches
# make format let ruff rewrite                                    .ci/run          all three, as CI does
.PHONY: demo test integration lint format protos setup
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q --durations=15
PY := .venv/bin/python

setup:
	@.ci/setup dev

demo:
	@.ci/setup run
	@$(PY) -m jqserve.demo

test: setup
	@$(PY) $(PYTEST) -m "not integration" tests

integration: setup
	@$(PY) $(PYTEST) -m integration tests

lint: setup
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy

format: setup
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .
