PYTHON ?= python3
BIN := .venv/bin
.PHONY: demo test environment

environment: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

demo: environment
	$(BIN)/python -m experiments mnist --data auto --seeds 4 --out demo/mnist

test: environment
	$(BIN)/python -m pytest
