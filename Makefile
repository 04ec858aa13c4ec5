PYTHON ?= python3
PY := .venv/bin/python

.PHONY: setup demo test test-faults bench

setup: .venv/lib/installed

.venv/lib/installed: requirements.txt requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt -c requirements.lock
	$(PY) -m pip install -q ".[dev,plots]" -c requirements.lock
	touch $@

demo: setup
	$(PY) reproduce.py --recipe demo --out runs/demo

test: setup
	$(PY) -m ruff check .
	$(PY) -m pytest -n 2 --dist loadfile

test-faults: setup
	$(PY) -m pytest -m faults

bench: setup
	$(PY) -m benchmarks.suite cpu
