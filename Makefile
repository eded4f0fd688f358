# Every target sets up .venv by itself; `make PYTHON=python3.12 test` builds it with another Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# a worker takes one core and 1 to 2 GB
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint types bench evidence docs gallery package clean

demo: $(STAMP)  ## the main job on the embedded model: runs/demo/report.html
	@$(BIN)/difftune demo --output_dir runs/demo

test: $(STAMP)  ## everything but the slow tests; those that need a GPU or Chromium skip themselves by name
	@$(PYTEST)

test-slow: $(STAMP)
	@$(PYTEST) -m slow

lint: $(STAMP)
	@$(BIN)/ruff check .

types: $(STAMP)
	@$(BIN)/mypy

bench: $(STAMP)
	@set -e; for script in scripts/bench_*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

# ROWS: guidance search noise training peers, or some of them; all without it
evidence: $(STAMP)  ## docs/evidence.md and the README's table of claims; hours, and it goes on where it was stopped
	@$(BIN)/python scripts/make_evidence.py $(ROWS)

# not --quiet: mkdocs counts the warnings that it prints, and --quiet hides them from --strict
docs: $(STAMP)  ## build/site/index.html; offline, and a link to nowhere is an error
	@NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

gallery: $(STAMP)  ## the pictures of docs/gallery.md and of the README, by the commands that stand there
	@$(BIN)/python scripts/plot_measured.py
	@$(BIN)/python scripts/make_gallery.py

package: $(STAMP)  ## dist/: a wheel and a source archive, checked
	@rm -rf build dist
	@$(BIN)/python -m build
	@$(BIN)/twine check --strict dist/*

clean:  ## caches and build products; not .venv, not runs
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "difftune needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1): run 'make PYTHON=/path/to/python3.12'" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --editable ".[all,test]"
	@touch $@
