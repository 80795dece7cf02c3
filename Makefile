# Two commands for a newcomer: `make demo` and `make test`. Everything runs in .venv, made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-slow test-faults lint types bench constraints clean cluster demo-cluster cluster-down

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "piste needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/piste run llm-adamw llm-muon llm-reg

test: $(STAMP)
	$(BIN)/pytest -q

test-slow: $(STAMP)
	$(BIN)/pytest -q -m slow --timeout 1800

test-faults: $(STAMP)
	$(BIN)/pytest -q -m fault --timeout 600

lint: $(STAMP)
	@test ! -e platform/__init__.py || { echo "platform/__init__.py shadows the standard library: remove it"; exit 1; }
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	for script in tests/bench/bench_*.py; do $(BIN)/python $$script || exit 1; done

# A Ray cluster of three hosts on this machine (infra/README.md); PISTE_CLUSTER names another than "piste".
cluster: $(STAMP)
	$(BIN)/python infra/cluster.py up

demo-cluster: $(STAMP)
	$(BIN)/python infra/cluster.py exec client $(BIN)/piste submit sweep mlp-steps --sweep.trials 96 --sweep.batch 12

cluster-down: $(STAMP)
	$(BIN)/python infra/cluster.py down

# Exact versions of everything, from the environment in use; run it after changing a range in pyproject.toml.
constraints: $(STAMP)
	{ echo "# Exact versions that piste is tested with; made by \`make constraints\`."; \
	  $(BIN)/pip freeze --exclude-editable | grep -v ' @ '; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) .piste build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
