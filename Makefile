VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
INSTALLED := $(VENV)/.installed
SUPPLY := build/supply
LOCKED := -q --no-compile --no-deps --require-hashes --only-binary :all:
RETROFIT := $(BIN)/python -m examples.retrofit

.PHONY: setup demo docs model test test-all faults faults-full check format lock audit sbom clean

setup: $(INSTALLED)

# Everything by its hash, and nothing that isn't in a lock; what is never imported is never compiled, which halves the
# time. Where pip finds PyTorch's CPU build, as in CI, it takes that: PyPI's for Linux needs CUDA's packages as well, 3 GB.
# This project itself is built by what the lock has.
$(INSTALLED): pyproject.toml $(wildcard locks/*.txt)
	@echo "installing Python packages, 3 GB in $(VENV): this takes some minutes and says nothing"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(LOCKED) -r locks/torch-cpu.txt || $(BIN)/pip install $(LOCKED) -r locks/torch.txt
	$(BIN)/pip install $(LOCKED) -r locks/development.txt
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

# The tools of the supply chain have an environment of their own.
$(SUPPLY)/.installed: locks/supply.txt
	$(PYTHON) -m venv $(SUPPLY)
	$(SUPPLY)/bin/pip install $(LOCKED) -r locks/supply.txt
	touch $@

# Resolves anew what is locked, by `make lock` only what pyproject.toml no longer allows, by `make lock UP=--upgrade` all.
lock: setup $(SUPPLY)/.installed
	$(BIN)/python -m tools.lock $(UP)

# Asks PyPI whether advisories are known of anything that is locked; a package it can't ask about is an error.
audit: $(SUPPLY)/.installed
	for lock in development torch supply; do \
		$(SUPPLY)/bin/pip-audit --strict --disable-pip --require-hashes -r locks/$$lock.txt || exit 1; done

# The packages of this machine's environment, what each needs and its licence, as CycloneDX.
sbom: setup $(SUPPLY)/.installed
	$(SUPPLY)/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --output-reproducible \
		-o build/sbom.cdx.json $(BIN)/python

demo: setup
	$(BIN)/python -m examples.demo

# What is written from code first; the site is build/site.
docs: setup
	$(BIN)/python -m tools
	$(BIN)/zensical build --strict

# Trains anew what is in assets/smollm2-engram, which takes hours, and prints how its figures compare.
# Memory that is freed is kept, not faulted in again at every step: training takes a third less time.
model: export MALLOC_MMAP_MAX_ = 0
model: export MALLOC_TRIM_THRESHOLD_ = 100000000000
model: export MALLOC_TOP_PAD_ = 268435456
model: setup
	$(RETROFIT) words
	$(RETROFIT) generate
	$(RETROFIT) site
	$(RETROFIT) cartridge examples/retrofit/manual --site build/retrofit/assets -o build/retrofit/assets/manual.overlay --force
	$(RETROFIT) train-head
	$(RETROFIT) acceptance
	$(RETROFIT) bundle
	$(RETROFIT) evaluate build/retrofit/model.engram --asset build/retrofit/assets
	$(RETROFIT) compare build/retrofit/assets/evaluation.json

# Two processes, whole files each, as a file's tests share what they compile; tests/conftest.py says which come first.
SUITE := $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# As many processes as CI has cores: threads beside them wait for one another, a third longer in all.
test test-all faults faults-full: export OMP_NUM_THREADS = 1

test: setup
	$(SUITE)

test-all: setup
	$(SUITE) -m ""

# What may go wrong from outside, done on purpose; ends in a table of what survived. The first takes some minutes, the
# second hours. Rows that this machine can't run are named.
faults: setup
	$(BIN)/python -m tests.faults --json build/faults.json

faults-full: setup
	$(BIN)/python -m tests.faults --full --json build/faults-full.json

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# build/retrofit stays: what `make model` trains takes hours.
clean:
	rm -rf dist
	test ! -d build || find build -mindepth 1 -maxdepth 1 ! -name retrofit -exec rm -rf {} +
