# make demo: a whole run on synthetic slides. make test: style and all tests. Both set up .venv first.
# Needs Python 3.11 or newer, make and git; PYTHON=python3.12 make demo takes another Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO := demo
WORKERS ?= 2

.PHONY: help venv dev demo test slurm test-slurm faults bench bench-scale lint format lock clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    set up, and a whole run on synthetic slides (results in $(DEMO)/results)"
	@echo "make test    set up, style and all tests"
	@echo "make slurm   install SLURM (Debian, as root), for its tests in make test; make test-slurm runs them alone"
	@echo "make faults  faults tried many times: kills, full disks, damaged slides (some minutes; docs/reliability.md)"
	@echo "make bench   speed and exactness beside their limits (ten minutes; docs/performance.md)"
	@echo "make bench-scale  memory on a slide of 8 gigapixels, and a million nuclei (half an hour, 10 GB)"
	@echo "make venv    set up $(VENV) from envs/requirements.lock; make dev adds the tools for tests and style"
	@echo "make lint    style alone; make format rewrites the code in it"
	@echo "make clean   remove the demo and caches"

# The stamps tell that a lock file has been installed.
$(VENV)/requirements.stamp: envs/requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": PYTHON=python3.12 make ...")'
	@echo "Setting up $(VENV) (downloads about 3 GB with PyTorch for CUDA)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-deps -r envs/requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/dev.stamp: envs/dev.lock $(VENV)/requirements.stamp
	$(PIP) install --quiet --no-deps -r envs/dev.lock
	@touch $@

venv: $(VENV)/requirements.stamp

dev: $(VENV)/dev.stamp

demo: venv
	$(BIN)/python -m pipeline demo-slides $(DEMO)/slides
	$(BIN)/snakemake --quiet rules host --cores all --config slides=$(DEMO)/slides/slides.tsv results=$(DEMO)/results
	$(BIN)/python -m pipeline demo-table $(DEMO)/results

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Without SLURM its tests are skipped; here that is an error.
slurm:
	$(PYTHON) tests/slurm/cluster.py install

test-slurm: dev slurm
	NUCLEI_NEED_SLURM=1 $(BIN)/python -m pytest -n 0 -rP tests/slurm

# What was tried is printed; docs/reliability.md has the figures.
faults: dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m faults_long -rsP -o faulthandler_timeout=0 tests/faults

bench: venv
	$(BIN)/python -m benchmarks

bench-scale: venv
	$(BIN)/python -m benchmarks cohort memory million --out benchmarks-scale.json

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check --compact-diff Snakefile workflow
	$(BIN)/snakemake --lint

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow

# From the environment as it is now; see envs/lock.py.
lock: dev
	$(BIN)/python envs/lock.py

clean:
	rm -rf $(DEMO) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
