# Short names for commands; targets that need .venv set it up first.
# Variables: PROFILE (scale), SEEDS (e.g. SEEDS=1,2,3), CELLS (e.g. CELLS='base,hps/*'), CLUSTER
# (cluster profile), DETACH=1 (return after submitting), PUBLISH=1 (write tables to results/PROFILE),
# PYTHON (the interpreter of .venv), IMAGE (the image's name), DEVICE=cpu (check-gpu on tiny models).

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

NEW_ENOUGH := sys; sys.exit(sys.version_info < (3, 11))
# The first interpreter that runs and is new enough; the results were measured with 3.11.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	if "$$python" -c 'import $(NEW_ENOUGH)' 2>/dev/null; \
	then echo "$$python"; break; fi; done)
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.setup-done
# uv installs the packages of uv.lock, each only if its hash is the locked one.
UV := .uv/bin/uv
DOCS := .venv-docs
DOCS_READY := $(DOCS)/.setup-done
# In this order they share most trainings.
STUDIES := table1 table2 table3 family granularity eta fusion steps group equal-cost frontier efficient rewards choices released-vs-matched credit
PUBLISHED = $(if $(PUBLISH),--publish)
CHOICES = $(if $(SEEDS),--seeds $(SEEDS)) $(if $(CELLS),--cells '$(CELLS)') $(if $(CLUSTER),--cluster $(CLUSTER))
# These scales need no downloads, so nothing may wait for a network.
OFFLINE := HF_HUB_OFFLINE=1
export IMAGE
# The interpreter is the one found above, never a download.
export UV_PYTHON_DOWNLOADS := never
# Where Python may not keep what it compiles, every start would compile PyTorch and diffusers anew.
ifdef PYTHONDONTWRITEBYTECODE
export UV_COMPILE_BYTECODE ?= 1
endif

.PHONY: help setup mini smoke test check-mini lint docs readme mini-world tuning family-tuning clean \
	$(STUDIES:%=reproduce-%) reproduce-released reproduce-all \
	plan submit status check report test-browser \
	lock audit image sif check-image bench-speed bench-loop bench-methods bench-rewards bench-numerics bench-approximations check-gpu \
	slurm-up slurm-down test-slurm test-slurm-core \
	test-latex

help: ## list the targets
	@echo "usage: make TARGET [PROFILE=...] [SEEDS=1,2,...]"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)$$/\1|\2/p' $(firstword $(MAKEFILE_LIST)) \
		| while IFS='|' read -r name text; do printf '  %-29s %s\n' "$$name" "$$text"; done

tuning: $(READY) ## run the learning-rate trials of Table 1's methods (PROFILE=mini by default)
family-tuning: $(READY) ## run the learning-rate trials of the other methods
tuning family-tuning:
	$(OFFLINE) $(RUN)/g2rpo reproduce $@ --profile $(or $(PROFILE),mini) --seeds $(or $(SEEDS),101)

setup: $(READY) ## install everything into .venv (a minute, 6 GB; TORCH_INDEX=URL for another build of torch)

$(UV): docker/uv.txt
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c 'import $(NEW_ENOUGH)' 2>/dev/null; then \
		echo "error: no Python 3.11 or newer ($(or $(PYTHON),none found));" \
			"install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
		exit 2; \
	fi
	"$(PYTHON)" -m venv --clear .uv
	.uv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

$(READY): pyproject.toml uv.lock $(UV)
ifdef TORCH_INDEX
	$(UV) export --quiet --locked --no-emit-project --no-hashes --output-file $(VENV)-packages.txt
	$(UV) venv --quiet --clear --python "$(PYTHON)" $(VENV)
	$(UV) pip install --quiet --python $(VENV) --constraints $(VENV)-packages.txt \
		--index $(TORCH_INDEX) --index-strategy unsafe-best-match torch torchvision
	$(UV) pip install --quiet --python $(VENV) --constraints $(VENV)-packages.txt --group dev -e .
	@rm $(VENV)-packages.txt
else
	$(UV) sync --quiet --locked --python "$(PYTHON)"
endif
	@touch $@

# The half of Table 1 that is trained on HPS; all of it is `make reproduce-table1 PROFILE=mini`.
mini: CELLS ?= base,hps/*
mini: $(READY) ## train, sample, score and print Table 1 on the mini world (one seed, 2 CPU cores, 8 minutes)
	@if [ "$(or $(PROFILE),mini)" != mini ]; then \
		echo "error: make mini has the profile mini; use make reproduce-table1 PROFILE=$(PROFILE)" >&2; exit 2; fi
	$(OFFLINE) $(RUN)/g2rpo reproduce table1 --profile mini $(CHOICES)

smoke: $(READY) ## run the whole pipeline on tiny random models (2 minutes)
	$(OFFLINE) $(RUN)/g2rpo reproduce table1 --profile smoke $(CHOICES)

# In the order of their folders: xdist's own order leaves files with few but slow tests for the end.
test: $(READY) ## run the tests in two processes and list the slowest
	$(OFFLINE) $(RUN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
		--durations 20

check-mini: $(READY) ## train a committed cell and a part of the mini world again and compare (4 minutes)
	$(OFFLINE) $(RUN)/python -m pytest -m mini --numprocesses 2 tests/integration

test-slurm: $(READY) ## run the tests that need a SLURM cluster (10 minutes; root, Debian)
	PYTHON=$(RUN)/python tests/slurm/run.sh 'slurm'

test-slurm-core: $(READY) ## run the most important of them (4 minutes)
	PYTHON=$(RUN)/python tests/slurm/run.sh 'slurm and core'

test-latex: $(READY) ## compile every table with LaTeX, installing it if needed (root, Debian)
	PYTHON=$(RUN)/python tests/latex/run.sh

test-browser: $(READY) ## test the report in headless Chromium, installing it if needed (root, Debian); screenshots in build/
	PYTHON=$(RUN)/python tests/browser/run.sh

slurm-up: ## start a SLURM cluster of two nodes on this machine (root, Debian)
	tests/slurm/cluster/up.sh

slurm-down: ## stop that cluster
	tests/slurm/cluster/down.sh

lint: $(READY) ## check style, formatting, types and import layers
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports --no-logo
	$(RUN)/hadolint docker/Dockerfile

$(DOCS_READY): uv.lock $(UV)
	UV_PROJECT_ENVIRONMENT=$(DOCS) $(UV) sync --quiet --locked --only-group docs --python "$(PYTHON)"
	@touch $@

# Broken links, anchors and formulas are errors.
docs: $(READY) $(DOCS_READY) ## build the documentation into build/site (half a minute)
	rm -rf build/site
	PYTHONPATH=. $(RUN)/python docs/generate.py
	$(DOCS)/bin/sphinx-build --fail-on-warning --keep-going --quiet --fresh-env --jobs auto -c docs \
		-d build/doctrees . build/site
	@echo "build/site/index.html"

readme: $(READY) ## write README's table and picture from the committed results
	$(RUN)/python docs/readme.py

lock: $(UV) ## write uv.lock from pyproject.toml (UPGRADE=1 or UPGRADE=NAME for newer versions)
	$(UV) lock $(if $(UPGRADE),$(if $(filter 1,$(UPGRADE)),--upgrade,--upgrade-package $(UPGRADE)))

audit: $(UV) ## look up known vulnerabilities of the locked packages
	$(UV) audit --locked

image: ## build the container image (IMAGE=g2rpo, BASE_IMAGE=...) with docker, podman or buildah
	docker/build-image.sh $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE))

sif: ## convert the image to build/g2rpo.sif for Apptainer
	docker/build-sif.sh

check-image: ## build and test the image on bare Debian, without a Docker engine (root; 20 GB)
	docker/check-image.sh

mini-world: $(READY) ## rebuild the mini world from its seed (34 minutes on 2 idle cores)
	$(OFFLINE) $(RUN)/python -m benchmarks.mini_world

reproduce-table1: $(READY) ## Table 1 of the paper: methods compared (PROFILE=flux by default)
reproduce-table2: $(READY) ## Table 2 of the paper: sets of granularities (PROFILE=flux by default)
reproduce-table3: $(READY) ## Table 3 of the paper: inference steps (PROFILE=flux by default)
reproduce-released: $(READY) ## sample and score the published checkpoints, without training (PROFILE=flux by default)
reproduce-steps: $(READY) ## study: which steps are stochastic
reproduce-eta: $(READY) ## study: the noise level
reproduce-fusion: $(READY) ## study: how granularities become one advantage
reproduce-granularity: $(READY) ## study: further sets of granularities
reproduce-group: $(READY) ## study: the group size
reproduce-credit: $(READY) ## study: reward variance and gradient signal of each step
reproduce-equal-cost: $(READY) ## study: all methods at equal NFE or device-seconds
reproduce-frontier: $(READY) ## study: reward against cost, with cheaper settings of G²RPO
reproduce-family: $(READY) ## every method under matched settings
reproduce-efficient: $(READY) ## the cheapest setting of G²RPO found by the frontier, beside Table 1's
reproduce-rewards: $(READY) ## study: which rewards to train on, and how they are combined
reproduce-choices: $(READY) ## study: one setting changed at a time
reproduce-released-vs-matched: $(READY) ## study: each method's own settings against matched ones
$(STUDIES:%=reproduce-%) reproduce-released:
	$(RUN)/g2rpo reproduce $(@:reproduce-%=%) --profile $(or $(PROFILE),flux) $(CHOICES) $(PUBLISHED) \
		$(if $(DETACH),--detach)

# Sequential even with -j, since they share trainings. A failure does not stop the others.
reproduce-all: $(READY) ## run all tables and studies (PROFILE=flux by default)
	@failed=; for study in $(STUDIES); do \
		echo "== $$study"; \
		$(MAKE) --no-print-directory reproduce-$$study || failed="$$failed $$study"; \
	done; \
	if [ -n "$$failed" ]; then echo "error: not finished:$$failed; run the same command to resume" >&2; exit 2; fi

plan: $(READY) ## show what a table costs (TABLE=table1, PROFILE=flux, CLUSTER=auto by default)
	$(RUN)/g2rpo plan $(or $(TABLE),table1) --profile $(or $(PROFILE),flux) $(CHOICES)

submit: $(READY) ## submit a table and return (variables as for plan)
	$(RUN)/g2rpo reproduce $(or $(TABLE),table1) --profile $(or $(PROFILE),flux) $(CHOICES) --detach

status: $(READY) ## show the stages of the latest submission
	$(RUN)/g2rpo status

report: $(READY) ## write one HTML page of everything finished (PROFILE=mini by default; TABLE=, SEEDS=, PUBLISH=1)
	$(OFFLINE) $(RUN)/g2rpo report $(TABLE) --profile $(or $(PROFILE),mini) \
		$(if $(SEEDS),--seeds $(SEEDS)) $(if $(PUBLISH),--publish)

check: $(READY) ## check this machine, or with CLUSTER= a cluster (PROFILE=mini by default)
	$(RUN)/g2rpo check $(if $(CLUSTER),cluster --cluster $(CLUSTER) --profile $(or $(PROFILE),mini),machine)

bench-speed: $(READY) ## time one iteration: released code against ours (FLUX size on a GPU, else the mini world)
	$(OFFLINE) $(RUN)/python -m benchmarks.speed.iteration

bench-loop: $(READY) ## time one iteration on the mini world: a plain Flow-GRPO loop against ours
	$(OFFLINE) $(RUN)/python -m benchmarks.speed.plain_loop

bench-methods: $(READY) ## time one iteration of every method on the mini world
	$(OFFLINE) $(RUN)/python -m benchmarks.speed.methods

bench-rewards: $(READY) ## time reward models beside their packages (minutes on a CPU; REWARDS=hps,clip: only these)
	$(OFFLINE) $(RUN)/python -m benchmarks.speed.rewards $(if $(REWARDS),--rewards $(REWARDS))

bench-numerics: $(READY) ## deviation of the ratio from 1 before an update, at FLUX's width and length (minutes)
	$(OFFLINE) $(RUN)/python -m benchmarks.speed.numerics

bench-approximations: $(READY) ## effect of approximate continuations on the mini world (about an hour)
	$(OFFLINE) $(RUN)/python -m benchmarks.speed.approximations

# With a .venv it needs no network, so that it runs on a bare machine with a GPU.
check-gpu: $(if $(wildcard $(RUN)/python),,$(READY)) ## check on a GPU what only a GPU shows: kernels, memory, speed (8 minutes; writes results/gpu)
	$(OFFLINE) $(RUN)/python -m benchmarks.gpu_check $(if $(DEVICE),--device $(DEVICE))

clean: ## remove caches and build products, but not .venv and results/
	rm -rf build dist .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis
	find . \( -name .venv -o -name .git -o -name results \) -prune -o -name __pycache__ -print0 \
		| xargs -0 rm -rf
