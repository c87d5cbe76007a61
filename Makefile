# `make demo` and `make test` each work alone on a bare machine (Python >= 3.11 with pip and venv).
PYTHON ?= python3
VENV := .venv
EXTRAS := dev,run,timm
# Another Python that is named has an environment of its own, such as .venv-3.13, without torch and Ray
# (6 GB) unless EXTRAS=dev,run,timm is given. pyenv's interpreters need not be switched on.
ifneq ($(origin PYTHON),file)
  override PYTHON := $(or $(shell $(PYTHON) -c '' 2>/dev/null && echo $(PYTHON) || \
    ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/*/bin/$(PYTHON) 2>/dev/null | sort -V | tail -n 1),$(PYTHON))
  VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
  ifneq ($(VERSION),3.11)
    VENV := .venv-$(VERSION)
    EXTRAS := dev
  endif
endif
COMMA := ,
WHOLE := $(filter run,$(subst $(COMMA), ,$(EXTRAS)))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LINT = $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/codespell

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-without-bfloat16 test-slow lint bench clean

help:
	@echo "make demo   synthetic slides to single-cell expression, on this machine, into demo/"
	@echo "make test   lint, then all tests but the slow; what .ci/run calls"
	@echo "make test PYTHON=python3.13  on another Python, in .venv-3.13: all tests that need neither torch nor Ray"
	@echo "make test-without-bfloat16  the same as on a CPU without native bfloat16"
	@echo "make test-slow  lint, then the tests that take minutes each"
	@echo "make lint   ruff, mypy --strict, codespell"
	@echo "make bench  throughput end to end, against the same kernels in a bare loop"
	@echo "make venv   only set up .venv with the pinned versions of constraints.txt"
	@echo "make clean  remove .venv*, caches and the demo"

venv: $(INSTALLED)

# Installed anew when a dependency or a pin changes. The stamp comes last, so that a broken
# installation is taken up again.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed; say make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: venv
	$(BIN)/scellst-ray demo --out demo

# Tests with Ray wait for it much of the time, so the other tests and lint run next to them; their
# output follows when all have ended. The first process reads only files with tests for Ray.
# Two Rays on one machine would disturb each other. Ray's workers yield to all else by default.
# Lint is no $(MAKE) here: make runs such a line even if it is only asked what it would do.
# Each process computes in one thread: on shared cores, threads burn CPU while they wait for each other.
test: export OMP_NUM_THREADS := 1
test: export OMP_WAIT_POLICY := passive
ifeq ($(WHOLE),)
# mypy needs the packages; what lint finds does not depend on the Python that runs it.
test: venv
	$(BIN)/python -m pytest -m "not slow"
else
# So that no test is left out because torch or Ray is broken.
test: export TESTS_NEED := torch ray
test: venv
	@lint=$$(mktemp); log=$$(mktemp); \
	{ $(LINT); } >"$$lint" 2>&1 & linting=$$!; \
	$(BIN)/python -m pytest -m "not slow and not ray" >"$$log" 2>&1 & others=$$!; \
	RAY_worker_niceness=0 $(BIN)/python -m pytest -m "not slow and ray" \
		$$(grep -rl --include='test_*.py' 'mark\.ray' tests | sort); with_ray=$$?; \
	wait $$others; without=$$?; wait $$linting; linted=$$?; \
	cat "$$log" "$$lint"; rm "$$log" "$$lint"; \
	test $$linted = 0 || echo "lint failed, see above"; \
	exit $$((with_ray | without | linted))
endif

# torch and oneDNN leave native bfloat16 and AVX-512 unused.
test-without-bfloat16: export ONEDNN_MAX_CPU_ISA := AVX2
test-without-bfloat16: export ATEN_CPU_CAPABILITY := avx2
test-without-bfloat16: test

test-slow: lint
	$(BIN)/python -m pytest -m slow

lint: venv
	$(LINT)

bench: venv
	$(BIN)/python benchmarks/end_to_end.py

clean:
	rm -rf .venv .venv-* build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
