# Everything a user needs. `make help` lists the targets; each prints the plain command it runs.
#
#   PYTHON    interpreter to build the environment with (3.10 or newer)
#   PIP_ARGS  more arguments for pip, such as --extra-index-url of a CPU-only torch index
#   SCALE     recipe folder: shapes (embedded, default) or sd15
#   DATA      webdataset shards, needed for SCALE=sd15
#   TEACHER   Hub id or pipeline folder to distil from, instead of the recipe's own
#   ARGS      more arguments for `bkd train`, such as train.batch=16

PYTHON   ?= python3
PIP_ARGS ?=
SCALE    ?= shapes
DATA     ?=
TEACHER  ?=
ARGS     ?=

VENV      := .venv
BKD       := $(VENV)/bin/bkd
INSTALLED := $(VENV)/installed
OVERRIDES := $(if $(DATA),'data.shards=$(DATA)') $(if $(TEACHER),'teacher.id=$(TEACHER)') $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help install train-small train-tiny results gates test test-slow test-integration check docs audit dist clean

help:  ## show this list
	@echo "make TARGET [SCALE=sd15 DATA='shards/{00000..00099}.tar' TEACHER=id-or-folder]"
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 18

install: $(INSTALLED)  ## create .venv with everything in it

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("bkd needs Python 3.10 or newer, not " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]' $(PIP_ARGS)
	@touch $(INSTALLED)

train-small: $(INSTALLED)  ## prune, distil, evaluate and report SD-Small
	$(call train_and_show,sd-small)

train-tiny: $(INSTALLED)  ## the same for SD-Tiny
	$(call train_and_show,sd-tiny)

# The embedded world has an exact checker; a real teacher's students are shown in the report's pictures.
define train_and_show
$(BKD) train $(SCALE)/$(1) $(OVERRIDES)
$(if $(filter shapes,$(SCALE)),$(BKD) eval runs/$(SCALE)/$(1) --suite shapes --overwrite)
$(BKD) report runs/$(SCALE)/$(1)
@echo "student: runs/$(SCALE)/$(1)/student"
endef

results: $(INSTALLED)  ## train and compare every method and student, 3 seeds; hours, continues where it stopped
	$(VENV)/bin/python tools/results_runs.py -o runs/results
	$(VENV)/bin/python tools/results_page.py runs/results -o docs
	$(VENV)/bin/python tools/results_guided_runs.py -o runs/results-guided
	$(VENV)/bin/python tools/results_guided_page.py runs/results-guided -o docs
	$(VENV)/bin/python tools/results_steps_runs.py -o runs/results-steps
	$(VENV)/bin/python tools/results_steps_page.py runs/results-steps -o docs

gates: $(INSTALLED)  ## measure the embedded world and its teacher on 1,000 prompts
	$(VENV)/bin/python tools/check_shapes_gates.py

test: $(INSTALLED)  ## run the tests, offline
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m 'not slow'

test-slow: $(INSTALLED)  ## the tests that take minutes each
	$(VENV)/bin/python -m pytest -m slow

test-integration: $(INSTALLED)  ## download with img2dataset from this machine, filter, cache and train
	$(VENV)/bin/python -m pytest -m integration tests/integration

check: $(INSTALLED)  ## lint and type-check
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# Without --quiet, which would hide warnings from --strict as well.
docs: $(INSTALLED)  ## build the documentation into site/; fails on a broken link
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	@echo "open site/index.html"

audit:  ## known advisories of the installed packages; asks the package index
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip install --quiet pip-audit
	.audit/bin/pip-audit --path $$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

dist: $(INSTALLED)  ## wheel and source archive, in dist/
	$(VENV)/bin/python -m build --no-isolation

clean:  ## remove the environment; runs stay
	rm -rf $(VENV)
