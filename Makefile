# Two commands do everything: `make reproduce` runs the suite, `make test` proves it. Each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
# uv, where it is installed, does in half a minute what takes pip three
INSTALL := $(if $(shell command -v uv),uv pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile)

# Each notebook and each command starts a Python of its own. Where bytecode may not be kept, every one of them compiles
# torch again, ten seconds of a core each; .venv is ours to keep it in.
unexport PYTHONDONTWRITEBYTECODE

PYTEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup reproduce update test test-slow format lint lock lab site clean-notebooks

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

# The stamp holds the environment to the lock: it is made anew when the lock, the project file or the Python changes.
$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 13)) and f"Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --require-hashes --requirement requirements.lock
	$(INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@

setup: $(VENV)/.ready  ## create .venv from the lock

reproduce: setup  ## run every notebook (quick profile), redraw figures/, write build/report/index.html
	$(BIN)/dbb figures --jobs $(JOBS)

update: setup  ## the same, and keep the outputs in notebooks/, ready to commit
	$(BIN)/dbb figures --update --jobs $(JOBS)

# What a change breaks, it breaks here. The rest would make whoever waits for it wait four times as long.
test: setup  ## run every notebook through papermill, and the tests of what they stand on
	$(PYTEST) -m "not slow"

test-slow: setup  ## run all other tests: broken packages, foreign networks, long runs, JupyterLab, the site
	$(PYTEST) -m slow

# A kernel that the user once installed under the same name, python3, must not win: what JUPYTER_PATH names comes first.
# Who is root, as in a container, has no other user to be.
lab: setup  ## open the notebooks in JupyterLab, the tour first
	JUPYTER_PATH="$(CURDIR)/$(VENV)/share/jupyter$${JUPYTER_PATH:+:$$JUPYTER_PATH}" $(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.default_url=/lab/tree/00_tour.ipynb notebooks

site: setup  ## build the web site into build/site, from notebooks that just ran
	$(BIN)/python docs/build.py --jobs $(JOBS)

clean-notebooks: setup  ## bring notebooks saved in JupyterLab to their committed form
	$(BIN)/dbb clean

format: setup  ## format package, tests and notebooks
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup  ## check format and lint, change nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

lock:  ## resolve requirements.lock anew (needs uv)
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --output-file requirements.lock
