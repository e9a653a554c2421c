# Two commands for a newcomer: `make demo` and `make test`. Both make the environment first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
CORES ?= all
READY := $(VENV)/.ready

.PHONY: demo test lint validate env clean

demo: $(READY)
	$(VENV)/bin/snakemake --cores $(CORES)

# One process per core; a file's tests stay together, as they share what they build.
test: lint
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(VENV)/bin/ruff check src tests
	$(VENV)/bin/ruff format --check src tests
	$(VENV)/bin/snakefmt --check Snakefile workflow
	$(VENV)/bin/snakemake --lint

# Nightly: every model on planted cohorts whose truth is known. Hours; a killed run goes on.
validate: $(READY)
	$(VENV)/bin/python -m morphome validate results/validation --cores $$(nproc) --strict

env: $(READY)

# Made anew when a dependency changes. Wheels only: OpenSlide, libjpeg-turbo and libvips come inside them.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) results .snakemake
