# Two commands do everything on a fresh machine with Python 3.11 and make:
#   make demo   create .venv, install, run the main job on embedded data, show the result
#   make test   the same environment, the whole suite
PYTHON ?= python3
VENV   ?= .venv
DEMO   ?= demo-run
BIN    := $(VENV)/bin

.PHONY: demo test lint cards docs clean
demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(BIN)/zoo quickstart --out $(DEMO)

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check zoo tests benchmarks
	$(BIN)/ruff format --check zoo tests benchmarks
	$(BIN)/mypy

# write the cards of the catalogue's published models anew
cards: $(VENV)/.installed
	$(BIN)/python -m zoo.hub.card

# the documentation as a site in build/site
docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/mkdocs build --strict

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: Python 3.11 or newer is needed; name one with make PYTHON=python3.11' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) runs
