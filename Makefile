# make train and make test set up everything they need: Python 3.11 or newer and make are enough.
PYTHON ?= python3
BIN := .venv/bin
# How many test files run side by side; each starts ranks of its own.
WORKERS ?= 2
# CUDA's version, 12 or 13, and whether there is a card at all: without one nothing is installed for it.
CUDA ?= 12
CARD := $(shell command -v nvidia-smi)

.PHONY: train test lessons check-lessons check-faults parity lint types mutations benchmark gpu clean

train: .venv/installed
	$(BIN)/minipar run -n 2 --timeout 600 train gpt --data docs --out runs/gpt
	$(BIN)/minipar run -n 2 --timeout 300 verify gpt

test: .venv/installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lessons: .venv/installed-lessons
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --notebook-dir lessons

check-lessons: .venv/installed-lessons .venv/installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m lessons tests/lessons

check-faults: .venv/installed-lessons .venv/installed-test
	$(BIN)/python -m pytest -m faults

parity: .venv/installed-parity
	$(BIN)/python -m pytest -m 'parity or benchmarks'

lint: .venv/installed-test
	$(BIN)/ruff check .

types: .venv/installed-test
	$(BIN)/mypy

mutations: .venv/installed-test
	$(BIN)/python -m tests.mutations.run

benchmark: .venv/installed-parity
	$(BIN)/python benchmarks/gpt_step.py

gpu: $(if $(CARD),.venv/installed-gpu,.venv/installed-test)
	$(BIN)/python -m pytest -m gpu -rs tests/gpu
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "minipar needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,dev]'
	touch $@ .venv/installed

.venv/installed-lessons: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[lessons]'
	touch $@ .venv/installed

.venv/installed-parity: .venv/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'autograd>=1.7'
	touch $@

.venv/installed-gpu: .venv/installed-parity
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cuda$(CUDA)]'
	touch $@
