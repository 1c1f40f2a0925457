# The environment that README's second command makes; another one: make quick PYTHON=python
PYTHON ?= .venv/bin/python

.PHONY: test quick lint format schemas docs bench

test:  ## everything, as .ci/run does: ranks, the compiler, the wheel and every command of README take many minutes
	$(PYTHON) -m pytest -n 2

quick:  ## the unit and trainer layers: under two minutes on two cores
	$(PYTHON) -m pytest -n 2 tests/unit tests/trainer

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

schemas:  ## after a signature, or a class that a YAML under conf/ uses, has changed
	$(PYTHON) scripts/generate_schemas.py

docs:  ## the site, with warnings as errors, in site/
	$(PYTHON) -m mkdocs build --strict

bench:
	$(PYTHON) benchmarks/run.py
