# Two commands do everything on a machine with Python >= 3.11, make and a package index:
#   make quickstart   environment, install, and the main job on embedded data
#   make test         environment, install with the test extras, and the test suite
#
# Variables: PYTHON (interpreter for the environment), VENV (its folder),
#            PIP_ARGS (for pip install), PYTEST_ARGS (for pytest), QUICKSTART_ARGS,
#            JOBS (processes of pytest; each takes up to 3 GB).

VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= 2
QUICKSTART_ARGS ?=

# The first candidate that really runs, is new enough and can make environments. Being on PATH is
# not enough: version managers leave shims there for versions that are not active.
PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3.13 python3 python,\
  $(shell $(p) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
    >/dev/null 2>&1 && echo $(p))))

PY := $(VENV)/bin/python
# Files stay whole, since their tests share compiled programs.
PYTEST = $(PY) -m pytest --numprocesses=$(JOBS) --dist=loadfile
PIP_INSTALL = $(PY) -m pip install --no-input --disable-pip-version-check $(PIP_ARGS)

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint format docs clean

help:
	@echo "make quickstart   install, then build data, train, evaluate and predict on embedded data"
	@echo "make test         install with the test extras, then run the test suite"
	@echo "make test-all     the same with the slow tests"
	@echo "make lint         ruff check and format check"
	@echo "make format       let ruff rewrite the files"
	@echo "make docs         install what makes the docs site, then make it in site/"
	@echo "make clean        remove the environment and caches"

quickstart: $(VENV)/.stamp-run
	$(PY) -m tools.quickstart $(QUICKSTART_ARGS)

test: $(VENV)/.stamp-dev
	$(PYTEST) $(PYTEST_ARGS)

test-all: $(VENV)/.stamp-dev
	$(PYTEST) -m "" $(PYTEST_ARGS)

lint: $(VENV)/.stamp-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.stamp-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Reads the code, and imports none of it: the package itself isn't installed.
docs: $(VENV)/.stamp-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with venv found: install one, or say" \
	  "make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -f $@; exit 1; }

# The stamps make a second call cheap; a changed pyproject.toml installs anew.
$(VENV)/.stamp-run: pyproject.toml | $(PY)
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml | $(PY)
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.stamp-run

# What extra `docs` asks for.
$(VENV)/.stamp-docs: pyproject.toml | $(PY)
	$(PIP_INSTALL) $$($(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@
