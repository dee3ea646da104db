# `make pretrain` and `make test` work on a bare machine: each sets up .venv first, once.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

.PHONY: setup pretrain test test-all test-matrix bench gpu-check lint docs clean
setup: $(VENV)/.installed $(VENV)/.extension

pretrain: OUT ?= runs/demo
pretrain: setup
	$(VENV)/bin/fastbert pretrain --out $(OUT) --resume

# Most tests are too small for several threads, so each process has one thread. Files run in the
# order of tests/conftest.py, the longest first, not by their number of tests.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
test: setup
	$(PYTEST) -m "not exhaustive"

# Also runs the tests marked exhaustive, which repeat others for more cases.
test-all: setup
	$(PYTEST)

# Runs the quick tests on each Python found, pyenv's too, and on three versions of transformers.
test-matrix: setup
	PYENV_VERSION=$$(pyenv versions --bare 2>/dev/null | grep -E '^3\.1[123]\.' | paste -sd:) $(PY) -m nox

bench: setup
	$(PY) -m benchmarks

# Uses the machine's own Python and installs nothing. ONLY="a b" runs these parts only.
gpu-check:
	$(PYTHON) -m benchmarks gpu-check $(OUT) $(ONLY:%=--only %)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Builds the site in site/; a broken link is an error.
docs: $(VENV)/.docs
	$(VENV)/bin/zensical build --clean --strict -f mkdocs.yml

clean:
	rm -rf $(VENV) build site *.egg-info fastbert/*.so

# Some distributions ship Python without ensurepip, which `venv` needs; virtualenv brings its own pip.
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "fastbert needs Python 3.11 to 3.13: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { rm -rf $(VENV) && \
		$(PYTHON) -m pip install -q --target $(VENV)-bootstrap virtualenv && \
		PYTHONPATH=$(VENV)-bootstrap $(PYTHON) -m virtualenv -q $(VENV); \
		status=$$?; rm -rf $(VENV)-bootstrap; exit $$status; }

# The extension is built separately, below, because pip would hide whether that succeeds; seqeval's
# build needs setuptools_scm.
$(VENV)/.installed: constraints.txt pyproject.toml | $(PY)
	$(PIP) install -q -c constraints.txt setuptools setuptools_scm torch numpy
	FASTBERT_BUILD_EXT=0 $(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	FASTBERT_BUILD_EXT=0 $(PIP) install -q -c constraints.txt --no-build-isolation -e '.[docs]'
	@touch $@

$(VENV)/.extension: setup.py $(wildcard csrc/* csrc/cuda/*) $(VENV)/.installed
	@PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) setup.py -q build_ext --inplace
	@touch $@
