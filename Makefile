# Everything from a fresh clone: each target makes the virtual environment first if it is not there.
# `make` alone lists the targets.

PYTHON ?= python3
TASKS ?= era
WORKERS ?= 2
OUT ?= release
RUN := .venv/bin/python
INSTALLED := .venv/.installed

# Nothing below asks a model hub. Tests take one thread a worker; the demo takes what the machine has.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint format types hf-common test-oldest checkpoints release gpu-check arm64 data clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv and install the project into it with the versions of constraints.txt

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,export,serve,deepspeed,dev]'
	@touch $@

demo: $(INSTALLED)  ## text -> checkpoint -> task -> one int8 file, measured on the test split; goes on where it stopped
	$(RUN) -m benchmarks.demo

test: lint types  ## lint, types and the quick tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --durations=10

test-slow: $(INSTALLED)  ## the tests that take minutes: the whole path on a small scale, the wheel in a clean environment
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow --durations=10

lint: $(INSTALLED)  ## ruff: rules and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(INSTALLED)  ## ruff: repair what it can and format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

types: $(INSTALLED)  ## mypy
	$(RUN) -m mypy

hf-common: $(INSTALLED)  ## transformers' own common model tests on our classes (fetches its source distribution)
	$(RUN) tests/hf_common/upstream.py
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow -s tests/hf_common

test-oldest: .venv-oldest/.installed  ## tests of library and export with the oldest versions it supports, in .venv-oldest
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n $(WORKERS) -m "slow or not slow" tests/elastic_model tests/export tests/hf_common

.venv-oldest/.installed: setup.cfg constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[train,export,serve,dev]'
	@touch $@

checkpoints: $(INSTALLED)  ## make the checkpoints that benchmarks need, e.g. TASKS="era sst2", in checkpoints/
	$(RUN) -m benchmarks.checkpoints $(TASKS)

release: $(INSTALLED)  ## CHECKPOINT=folder as a complete, checked hub folder in OUT (default: release/); PUSH=org/name uploads it
	HF_HUB_OFFLINE=$(if $(PUSH),0,1) $(RUN) -m pretrain release --model $(CHECKPOINT) --output $(OUT) $(if $(PUSH),--push $(PUSH))

gpu-check: $(INSTALLED)  ## what this machine's GPU does with pre-training, in ten minutes at most; goes on where it stopped
	$(RUN) -m benchmarks.gpu_check

arm64: $(INSTALLED)  ## (Debian 12, as root) an ARM64 Python with onnxruntime in .arm64, run by qemu-user: it checks ARM64 files
	dpkg --add-architecture arm64 && apt-get -qq update && apt-get -qq install qemu-user
	PYTHON=$(RUN) bash benchmarks/arm64.sh .arm64

data: $(INSTALLED)  ## fetch the source of the embedded data with npm and make it again, the same text byte for byte
	$(RUN) -m benchmarks.make_data

clean:  ## remove what the targets made (demo, checkpoints, release, builds, caches), but not .venv and .arm64
	rm -rf demo checkpoints release build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
