# Two commands do everything on a fresh machine with Python 3.11 and make:
#   make demo   create .venv, install, run the main job on embedded data, show the result
#   make test   the same environment, the whole suite
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint clean
demo: $(VENV)/.installed
	$(BIN)/zoo quickstart --out demo-run

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check zoo tests benchmarks
	$(BIN)/ruff format --check zoo tests benchmarks
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-run runs
