# bloodnb on a bare machine: needs make, git and Python 3.11 or 3.12; everything else comes with `make demo`.
# PYTHON names the interpreter to build .venv from; left empty, the first fitting one on PATH is taken.
PYTHON ?=
DEMO_PARAMETERS ?= -p data drawn -p recipe demo -p output _runs/demo -p overwrite True
BIN := .venv/bin
export TF_CPP_MIN_LOG_LEVEL := 3

.DEFAULT_GOAL := help
.PHONY: help demo test test-all docs docs-preview outputs lock clean

help:  ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | while IFS='|' read -r target what; do printf 'make %-12s %s\n' "$$target" "$$what"; done

demo: .venv/installed  ## set up, then train on drawn cells: offline, one to two minutes once set up
	@mkdir -p _runs
	@$(BIN)/papermill nbs/train.ipynb _runs/demo.ipynb $(DEMO_PARAMETERS)
	@echo 'executed notebook: _runs/demo.ipynb'
	@echo 'figures:           _runs/demo/figures'

test: .venv/installed  ## check everything: library in step, notebooks, jobs, the site in a browser
	@bash .ci/chromium.sh
	@$(BIN)/python -m pytest --numprocesses=2 --dist=loadgroup --durations=10 -m 'not slow'

test-all: .venv/installed  ## the same with every backbone, recipe and slow notebook cell, as before a release: 20 minutes more
	@bash .ci/chromium.sh
	@$(BIN)/python -m pytest --numprocesses=2 --dist=loadgroup --durations=10

docs: .venv/installed  ## render the site into _docs (with Quarto where it is installed, else with smalldocs)
	@$(BIN)/python .ci/render_site.py

docs-preview: .venv/installed  ## render the site and serve it on this machine
	@$(BIN)/python .ci/render_site.py --preview

outputs: .venv/installed  ## run the notebooks in place, so that they show what this code does; some with NOTEBOOKS="nbs/04_models.ipynb ..."
	@$(BIN)/python .ci/run_notebooks.py $(NOTEBOOKS)

lock: .venv/installed  ## resolve pyproject.toml into requirements.lock; pins stay unless LOCK_FLAGS=--upgrade
	@PATH="$(CURDIR)/.venv/uv/bin:$$PATH" uv pip compile --universal --python-version 3.11 --extra dev --no-header --no-annotate --no-emit-package bloodnb --quiet $(LOCK_FLAGS) pyproject.toml -o requirements.lock
	@echo 'requirements.lock is resolved; the next make target installs it'

clean:  ## remove what make can make again: .venv, _docs, _proc, caches (_runs stays)
	rm -rf .venv _docs _proc build dist .pytest_cache *.egg-info
	find bloodnb nbs tests .ci -name __pycache__ -type d -prune -exec rm -rf {} +

# Written last, so an interrupted set-up is taken up again by the next call.
.venv/installed: requirements.lock pyproject.toml
	@PYTHON='$(PYTHON)' bash .ci/environment.sh
	@touch $@
