# One command each; every one makes the environment first if it is missing or if the lock changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DATA   ?= ../shared
# Of lines and branches; what runs in a process of its own is not counted.
COVERAGE ?= 86
PREFECT_OFF := PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1

.PHONY: help env demo test coverage test-data test-services test-browser lint format bench docs lock clean

help:            ## list the commands
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: $(READY)    ## make the environment from requirements-dev.lock

$(READY): requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "medtl needs Python 3.11 or newer; try make PYTHON=python3.11")'
	@echo "medtl: making the environment in $(VENV) (about 6 GB with torch, some minutes)"
	@$(PYTHON) -m venv --clear $(VENV)
	@# The lock is complete, so pip resolves nothing (older pips refuse `sqlalchemy[asyncio]` beside hashes otherwise).
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-dev.lock
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

demo: $(READY)   ## write a small hospital, train on it, name the report
	@$(BIN)/medtl demo

# Two at a time with one thread each: first rooms, then what starts servers. 5: no test of that kind was asked for.
TESTS := OMP_NUM_THREADS=1 $(PREFECT_OFF) $(BIN)/python -m pytest -m "not data and not services and not browser" -n 2 --dist loadfile
test: $(READY)   ## every test that needs nothing but this folder
	@$(TESTS) --ignore=tests/pipelines $(ARGS) || [ $$? = 5 ]
	@$(TESTS) --no-loadscope-reorder tests/pipelines $(ARGS) || [ $$? = 5 ]

coverage: $(READY) ## the same tests, and which lines they never ran; takes a third longer
	@$(TESTS) --ignore=tests/pipelines --cov --cov-report= $(ARGS)
	@$(TESTS) --no-loadscope-reorder --cov --cov-append --cov-report=term:skip-covered --cov-fail-under=$(COVERAGE) tests/pipelines $(ARGS)

test-data: $(READY) ## the tests on real scans (DATA=folder that holds data/ and weights/)
	@OMP_NUM_THREADS=1 MEDTL_TEST_DATA=$(abspath $(DATA)) $(PREFECT_OFF) $(BIN)/python -m pytest -m data -n 2 --dist worksteal $(ARGS)

test-services: $(READY) ## the tests against a real Orthanc and dcmtk (install them first; see .ci/run)
	@MEDTL_TEST_SERVICES=1 $(PREFECT_OFF) $(BIN)/python -m pytest -m "services and not data" $(ARGS)

test-browser: $(READY) ## the tests of pages in a real Chromium and of their PDFs (install it and poppler first; see .ci/run)
	@test -d $(VENV)/pdf || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
	  --target $(VENV)/pdf -r requirements-pdf.lock
	@test -d $(VENV)/viewer || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
	  --target $(VENV)/viewer -r requirements-viewer.lock
	@OMP_NUM_THREADS=1 MEDTL_TEST_BROWSER=1 PYTHONPATH=$(VENV)/pdf:$(VENV)/viewer \
	  $(BIN)/python -m pytest -m browser -n 2 --dist worksteal $(ARGS)

lint: $(READY)   ## format, style, types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(READY) ## write the format and the safe fixes
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(READY)  ## every benchmark beside its peers (ARGS=--json for figures)
	@for file in $$(ls benchmarks/*.py | grep -v -e _peers -e nnunet.py -e leaks -e pretraining -e results -e views); do $(BIN)/python $$file $(ARGS) || exit 1; done

docs: $(READY)   ## write docs/config.md from the config's sections
	@$(BIN)/python -c 'from pathlib import Path; from pipelines.look import config_reference; Path("docs/config.md").write_text(config_reference())'

lock: $(READY)   ## renew the five locks from pyproject.toml
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip compile pyproject.toml --upgrade --extra pacs --extra masks --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --no-annotate --quiet -o requirements.lock
	@$(BIN)/uv pip compile pyproject.toml --upgrade --extra pacs --extra masks --extra test --extra onnx --extra bundle \
	  --extra peers --extra lint --extra build -c requirements.lock \
	  --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet \
	  -o requirements-dev.lock
	@# what the image's wheel is built with, at the versions of the lock above
	@echo hatchling | $(BIN)/uv pip compile - -c requirements-dev.lock --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --no-annotate --quiet -o requirements-build.lock

	@# what writes PDFs; apart, because it needs pango, which not every machine has
	@echo weasyprint | $(BIN)/uv pip compile - -c requirements-dev.lock --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --no-annotate --quiet -o requirements-pdf.lock
	@# what carries NiiVue; alone, because its script is read and nothing of it is run
	@echo 'ipyniivue>=2.4.4,<3' | $(BIN)/uv pip compile - --no-deps --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --no-annotate --quiet -o requirements-viewer.lock

clean:           ## remove the environment and caches
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
