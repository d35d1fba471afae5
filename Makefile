# Targets are thin names for commands; every one that needs the environment sets it up first.
# Variables: PROFILE (scale), SEEDS (e.g. SEEDS=1,2,3), PYTHON (the interpreter of .venv).

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

NEW_ENOUGH := sys; sys.exit(sys.version_info < (3, 11))
# The first interpreter that runs and is new enough; constraints.txt was recorded with 3.11.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	if "$$python" -c 'import $(NEW_ENOUGH)' 2>/dev/null; \
	then echo "$$python"; break; fi; done)
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.setup-done
CHOICES = $(if $(SEEDS),--seeds $(SEEDS))
# These scales read committed or freshly built weights only, so nothing may wait for a network.
OFFLINE := HF_HUB_OFFLINE=1

.PHONY: help setup mini smoke test lint mini-world tuning clean \
	reproduce-table1 reproduce-table2 reproduce-table3 reproduce-released \
	bench-rewards bench-statistics bench-approximations

help: ## show this list
	@echo "usage: make TARGET [PROFILE=...] [SEEDS=1,2,...]"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)$$/\1|\2/p' $(firstword $(MAKEFILE_LIST)) \
		| while IFS='|' read -r name text; do printf '  %-18s %s\n' "$$name" "$$text"; done

tuning: $(READY) ## the learning-rate trials behind the tuned settings (PROFILE=mini unless given)
	$(OFFLINE) $(RUN)/g2rpo reproduce tuning --profile $(or $(PROFILE),mini) --seeds $(or $(SEEDS),101)

setup: $(READY) ## create .venv and install everything (about 3 minutes, 6 GB)

$(READY): pyproject.toml constraints.txt
	@if ! $(RUN)/python -c 'import pip, $(NEW_ENOUGH)' 2>/dev/null; then \
		if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c 'import $(NEW_ENOUGH)' 2>/dev/null; then \
			echo "error: no Python 3.11 or newer ($(or $(PYTHON),none found));" \
				"install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
			exit 2; \
		fi; \
		"$(PYTHON)" -m venv --clear $(VENV); \
	fi
	@echo "installing into $(VENV) (about 3 minutes the first time)"
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(RUN)/python -m pip check
	@touch $@

mini: $(READY) ## train, sample, score and print Table 1 on the mini world (one seed, 2 CPU cores)
	$(OFFLINE) $(RUN)/g2rpo reproduce table1 --profile mini $(CHOICES)

smoke: $(READY) ## the whole path on tiny random models, two minutes at most
	$(OFFLINE) $(RUN)/g2rpo reproduce table1 --profile smoke $(CHOICES)

test: $(READY) ## run all tests, in two processes
	$(OFFLINE) $(RUN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(READY) ## check style, formatting and types
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

mini-world: $(READY) ## train the mini world again from its seed (about an hour on 2 cores)
	$(OFFLINE) $(RUN)/python -m benchmarks.mini_world

reproduce-table1: $(READY) ## the paper's Table 1, methods against each other (PROFILE=flux unless given)
reproduce-table2: $(READY) ## the paper's Table 2, sets of granularities (PROFILE=flux unless given)
reproduce-table3: $(READY) ## the paper's Table 3, inference steps (PROFILE=flux unless given)
reproduce-released: $(READY) ## published checkpoints, sampled and scored, no training (PROFILE=flux unless given)
reproduce-table1 reproduce-table2 reproduce-table3 reproduce-released:
	$(RUN)/g2rpo reproduce $(@:reproduce-%=%) --profile $(or $(PROFILE),flux) $(CHOICES)

bench-rewards: $(READY) ## images a second of the reward models against their packages (ViT-H size, minutes)
	$(OFFLINE) $(RUN)/python -m benchmarks.speed.rewards

bench-statistics: $(READY) ## seconds that the statistics of a whole table take
	$(OFFLINE) $(RUN)/python -m benchmarks.speed.statistics

bench-approximations: $(READY) ## what approximate continuations change on the mini world (about half an hour)
	$(OFFLINE) $(RUN)/python -m benchmarks.approximations

clean: ## remove caches and build products; .venv and results/ stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . \( -name .venv -o -name .git -o -name results \) -prune -o -name __pycache__ -print0 \
		| xargs -0 rm -rf
