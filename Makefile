# Everything runs from the repository root in .venv, which the first target makes. Nothing is fetched after that.
SHELL := /bin/bash
PYTHON ?= python3
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)
LOCK := requirements/$(if $(filter 0,$(GPUS)),cpu,cuda).lock
# The demo's batch of 16 rows divides over 1, 2, 4 or 8 processes.
PROCESSES := $(if $(filter 0,$(GPUS)),2,$(lastword $(foreach n,1 2 4 8,$(shell [ $(GPUS) -ge $(n) ] && echo $(n)))))
PIP := .venv/bin/pip install --quiet --disable-pip-version-check
# Of the demo: `make demo STEPS=300` trains longer.
STEPS := 100
export HF_HUB_OFFLINE := 1
export NO_MKDOCS_2_WARNING := 1
export PYTHONUNBUFFERED := 1

.PHONY: demo test test-faults test-slurm test-all docs lint format clean
.DELETE_ON_ERROR:

demo: .venv/runtime corpus/python.json
	@run=runs/demo-$$(date +%Y%m%d-%H%M%S) && \
	OMP_NUM_THREADS=$$(( $$(nproc) > $(PROCESSES) ? $$(nproc) / $(PROCESSES) : 1 )) \
	.venv/bin/torchrun --standalone --nproc-per-node $(PROCESSES) train/pretrain.py conf=demo run_dir=$$run \
	  batch.micro_rows=$(if $(filter 8,$(PROCESSES)),2,4) train.steps=$(STEPS) && \
	.venv/bin/python scripts/report.py $$run

# Two files of tests at a time, as many start processes of their own; the long ones first (tests/conftest.py).
test: .venv/docs corpus/python.json
	.venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Real processes that are killed, stopped and starved, one test after the other.
test-faults: export OMP_NUM_THREADS := 1
test-faults: .venv/test corpus/python.json
	.venv/bin/python -m pytest -q -m faults

# A Slurm of two nodes on this machine: its own daemons and ports, from Debian's packages.
test-slurm: .venv/test
	@PATH=$$PATH:/usr/sbin; type munged slurmctld slurmd sbatch >/dev/null 2>&1 || { \
	  echo "installing slurm-wlm and munge"; sudo=; [ $$(id -u) = 0 ] || sudo=sudo; \
	  $$sudo apt-get update -qq && \
	  $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null; } || { \
	  echo "error: no Slurm and no way to install it; on Debian or Ubuntu, as root: apt-get install slurm-wlm munge" >&2; \
	  exit 1; }
	.venv/bin/python -m pytest -q -m slurm tests/slurm

test-all: .venv/lm-eval corpus/python.json
	.venv/bin/python -m pytest -q -m "not slurm"

# The documentation as a site; a link that leads nowhere is an error.
docs: .venv/docs
	.venv/bin/mkdocs build --quiet --strict
	@echo "open site/index.html"

lint: .venv/test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# The embedded corpus: the source code of this Python's standard library.
corpus/python.json: | .venv/runtime
	.venv/bin/python scripts/prepare_data.py --input python-stdlib --output corpus/python \
	  --tokenizer corpus/tokenizer.json --train-tokenizer 4096 --workers 2

# torch first, by its exact pin, so that nothing else chooses a build; packages without wheels build against it.
.venv/runtime: $(LOCK) requirements/base.lock
	@echo "installing $(LOCK)"
	@[ -x .venv/bin/python ] || $(PYTHON) -m venv .venv
	@$(PIP) $$(grep -h -E '^(setuptools|wheel)==' requirements/base.lock) $$(grep '^torch==' $(LOCK))
	@$(PIP) --no-build-isolation -r $(LOCK)
	@touch $@

.venv/test: .venv/runtime requirements/test.lock
	@echo "installing requirements/test.lock"
	@$(PIP) -r requirements/test.lock
	@touch $@

.venv/docs: .venv/test requirements/docs.lock
	@echo "installing requirements/docs.lock"
	@$(PIP) -r requirements/docs.lock
	@touch $@

.venv/lm-eval: .venv/docs requirements/lm-eval.lock
	@echo "installing requirements/lm-eval.lock"
	@$(PIP) -r requirements/lm-eval.lock
	@touch $@

clean:
	rm -rf .venv corpus site .pytest_cache .mypy_cache .ruff_cache
