# Needs Python >= 3.11, make and a package index; everything is installed into .venv beside this file.

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CANDIDATES := python3.13 python3.12 python3.11 python3 python
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help run test test-all lint clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@echo '  Options go into ARGS, e.g. make run ARGS="budget.size=0.1", and PYTHON=... chooses the interpreter.'

run: $(STAMP)  ## install if needed, then run ajpq, with ARGS
	@echo "make: running ajpq $(ARGS)"
	@$(VENV)/bin/ajpq $(ARGS)

test: $(STAMP)  ## install if needed, then run the tests but the slow ones, with ARGS
	@echo "make: running the tests"
	@$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-all: $(STAMP)  ## install if needed, then run all tests, with ARGS
	@echo "make: running all tests, the slow ones too"
	@$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile -m "" $(ARGS)

lint: $(STAMP)  ## check the style of the sources
	@$(PY) -m ruff check .

clean:  ## remove .venv and what builds and tests leave behind, but no results
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@for python in $(if $(PYTHON),"$(PYTHON)",$(CANDIDATES)); do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "make: creating $(VENV) with $$(command -v "$$python") ($$("$$python" --version))"; \
	    exec "$$python" -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo "make: error: Python >= 3.11 with its venv module must be on the PATH, but none of" \
	  "'$(or $(PYTHON),$(CANDIDATES))' is one; install it, or say where it is: make PYTHON=/path/to/python" >&2; \
	exit 1

$(STAMP): pyproject.toml constraints.txt | $(PY)
	@echo "make: installing uv into $(VENV)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt uv \
	  || echo "make: uv is not available, pip does the installation"
	@echo "make: installing ajpq and the packages of constraints.txt (2 to 3 GB with CUDA; once)"
	@if $(PY) -m uv --version >/dev/null 2>&1; then \
	  env -u UV_SYSTEM_PYTHON $(PY) -m uv pip install --quiet --python $(PY) -c constraints.txt -e '.[test]'; \
	else \
	  $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'; \
	fi
	@touch $@
