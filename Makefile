# Two commands do all the set-up on a machine with Python 3.10 or newer: `make test`, `make demo`.
SHELL := /bin/bash
PYTHON ?= python3
SEED ?= 0
# Test processes.
JOBS ?= 2
PY := .venv/bin/python
# torch and torchvision are taken together, so that both come from one build: a CPU wheel of one
# beside a CUDA wheel of the other does not import. For a CPU-only pair:
#   make venv TORCH="torch torchvision --index-url URL_OF_THE_CPU_WHEELS"
TORCH ?= torch torchvision

.PHONY: venv test test-faults test-slurm lint demo demo-full bench clean

venv: .venv/.ready

.venv/.ready: pyproject.toml setup.py
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --allow-existing --python "$(PYTHON)" .venv && \
	  uv pip install --python $(PY) $(TORCH) && uv pip install --python $(PY) -e '.[dev]'; \
	else \
	  "$(PYTHON)" -m venv .venv && $(PY) -m pip install --quiet --disable-pip-version-check $(TORCH) && \
	  $(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'; \
	fi
	@$(PY) -c "import torch, torchvision" || { \
	  echo "error: torch and torchvision do not fit each other; remove .venv and pass one pair," \
	       "such as make venv TORCH='torch==2.14.1 torchvision==0.29.1'" >&2; rm -f $@; exit 1; }
	@touch $@

test: venv
	$(PY) -m pytest -q -n $(JOBS) --dist worksteal

# Fifty kills and a compiled model: many minutes.
test-faults: venv
	LAZYCLIP_TEST_FAULTS=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal tests/test_faults.py \
	  tests/test_signals.py tests/test_bad_data.py tests/test_resume.py tests/test_step.py

# A SLURM controller with two nodes under a temporary folder: ten minutes, everything ended after.
SLURM_TOOLS := munged slurmctld slurmd sbatch srun
test-slurm:
	@for tool in $(SLURM_TOOLS); do \
	  PATH="$$PATH:/usr/sbin:/sbin" command -v $$tool >/dev/null || { \
	    echo "error: no $$tool; on Debian or Ubuntu, as root: apt-get install -y" \
	         "--no-install-recommends slurm-wlm munge" >&2; exit 2; }; \
	done
	@$(MAKE) --no-print-directory venv
	LAZYCLIP_TEST_SLURM=1 $(PY) -m pytest -q --durations=0 --durations-min=1 tests/test_slurm_cluster.py

lint: venv
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

demo: venv
	$(PY) -m demo.run --seed $(SEED)

demo-full: venv
	$(PY) -m demo.run --seed $(SEED) --full

bench: venv
	$(PY) benchmarks/bench_pooling.py
	$(PY) benchmarks/bench_segmentation.py --quick

clean:
	rm -rf build dist out .venv *.egg-info src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
