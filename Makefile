# Three commands on a fresh machine: `make demo`, `make bench` and `make test`. All create .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo bench test lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed-demo
	$(BIN)/fastvq demo --out demo-out

bench: $(VENV)/installed-bench
	$(BIN)/python -m bench quick --out bench-out

test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pins keep PyTorch at the tested version; a newer one would be fetched with its CUDA libraries.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) demo-out bench-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
