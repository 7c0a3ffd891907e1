# The two commands need Python >= 3.11, make and a package index, nothing else.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: help demo test figures environment clean

help:
	@echo "make demo     environment, then theorem, MNIST and language model, and one summary page"
	@echo "make test     environment, then all default tests"
	@echo "make figures  the committed figures, from full runs (hours on two cores)"
	@echo "make clean    remove the environment and the demo"

environment: .venv/ready

.venv/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

demo: environment
	rm -rf demo
	$(BIN)/python -m experiments theorem --seeds 5 --out demo/theorem
	$(BIN)/python -m experiments mnist --data auto --seeds 5 --out demo/mnist
	$(BIN)/python -m experiments language --out demo/language
	$(BIN)/python -m experiments summary demo

test: environment
	$(BIN)/python -m pytest -n 2

# Runs that were stopped go on; figures/ gets everything but the parts.
define figure
	$(BIN)/python -m experiments $(2) --out runs/figures/$(1) --resume
	mkdir -p figures/$(1) && cp runs/figures/$(1)/*.* figures/$(1)/

endef

figures: environment
	$(call figure,theorem,theorem)
	$(call figure,theorem_extensions,theorem_extensions)
	$(call figure,mnist,mnist)
	$(call figure,mnist_nature,mnist --preset nature)
	$(call figure,mnist_digits,mnist --data digits)
	$(call figure,mnist_noise,mnist_noise)
	$(call figure,mnist_channel,mnist_channel)
	$(call figure,mnist_channel_one_hidden,mnist_channel --preset one_hidden)
	$(call figure,mnist_factorial_sgd,mnist_factorial --preset sgd)
	$(call figure,mnist_cloning,mnist_cloning)
	$(call figure,mnist_architectures,mnist_architectures)
	$(call figure,mnist_factorial_teacher,mnist_factorial --preset teacher)
	$(call figure,mnist_factorial_rates_adam,mnist_factorial --preset rates_adam)
	$(call figure,mnist_factorial_rates_sgd,mnist_factorial --preset rates_sgd)
	$(call figure,mnist_factorial_rates_momentum,mnist_factorial --preset rates_momentum)
	$(call figure,mnist_factorial_optimizers,mnist_factorial --preset optimizers)
	$(call figure,mnist_factorial,mnist_factorial)
	$(call figure,mnist_alignment,mnist_alignment)
	$(call figure,mnist_interventions,mnist_interventions)
	$(call figure,mnist_heads,mnist_heads)
	$(call figure,mnist_heads_smooth,mnist_heads --preset smooth)
	$(call figure,mnist_capacity,mnist_capacity)
	$(call figure,reproduce,reproduce)
	$(call figure,language,language --preset full)
	$(call figure,language_matrix,language_matrix)
	$(call figure,language_cross_init,language_cross_init)
	$(call figure,language_divergence,language_divergence)
	$(call figure,language_optimisers,language_optimisers)
	$(call figure,language_claims,language_claims)
	$(call figure,language_habit,language_habit)
	$(call figure,language_media,language_media)
	$(call figure,language_theorem,language_theorem)
	$(call figure,language_bases,language_bases)

clean:
	rm -rf .venv demo
