# The two commands need Python >= 3.11, make and a package index, nothing else.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: help demo test figures environment clean

help:
	@echo "make demo     environment, then the theorem's table and the MNIST figure, and one summary page"
	@echo "make test     environment, then all default tests"
	@echo "make figures  the committed figures, from full runs (hours on two cores)"
	@echo "make clean    remove the environment and the demo"

environment: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

demo: environment
	rm -rf demo
	$(BIN)/python -m experiments theorem --seeds 5 --out demo/theorem
	$(BIN)/python -m experiments mnist --data auto --seeds 5 --out demo/mnist
	$(BIN)/python -m experiments summary demo

test: environment
	$(BIN)/python -m pytest -n 2

figures: environment
	$(BIN)/python -m experiments theorem --out figures/theorem --resume
	$(BIN)/python -m experiments theorem_extensions --out figures/theorem_extensions --resume
	$(BIN)/python -m experiments mnist --out figures/mnist --resume
	$(BIN)/python -m experiments mnist --preset nature --out figures/mnist_nature --resume
	$(BIN)/python -m experiments mnist --data digits --out figures/mnist_digits --resume
	$(BIN)/python -m experiments mnist_noise --out figures/mnist_noise --resume
	$(BIN)/python -m experiments mnist_channel --out figures/mnist_channel --resume
	$(BIN)/python -m experiments mnist_channel --preset one_hidden --out figures/mnist_channel_one_hidden --resume
	$(BIN)/python -m experiments mnist_factorial --preset sgd --out figures/mnist_factorial_sgd --resume
	$(BIN)/python -m experiments mnist_cloning --out figures/mnist_cloning --resume
	$(BIN)/python -m experiments mnist_architectures --out figures/mnist_architectures --resume
	$(BIN)/python -m experiments mnist_factorial --preset teacher --out figures/mnist_factorial_teacher --resume
	$(BIN)/python -m experiments mnist_factorial --out figures/mnist_factorial --resume
	$(BIN)/python -m experiments mnist_alignment --out figures/mnist_alignment --resume
	$(BIN)/python -m experiments mnist_interventions --out figures/mnist_interventions --resume
	$(BIN)/python -m experiments mnist_capacity --out figures/mnist_capacity --resume
	$(BIN)/python -m experiments reproduce --out figures/reproduce --resume

clean:
	rm -rf .venv demo
