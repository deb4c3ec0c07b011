# Two commands are all a fresh machine needs: `make demo` and `make test`. Each builds .venv first if it must.
#   PYTHON=python3.12                the interpreter that .venv is made with
#   TORCH=torch==2.12.0              another torch than the one in constraints.txt
# Both count when .venv is made: `make clean` first.
#   WHEELS=folder                    where `make test-sglang` and `test-vllm` look for packages before it asks the network

PYTHON ?= python3
OLDEST_TRANSFORMERS := 5.17.0
PIP := -m pip -qq --disable-pip-version-check
PIP_INSTALL := $(PIP) install
PYTEST := -m pytest
# What newer and older packages are tried with need not be tried in pictures alone, nor at the size of real models; and
# which features a policy chooses, what a report says and what the server allows whom is decided by this code alone.
OF_ONE_VERSION := $(addprefix --ignore=tests/,asking/test_overlay.py asking/test_images.py models/test_real_shapes.py \
	$(patsubst %,trimming/test_%.py,policies pyramid weight report kept) \
	$(patsubst %,server/test_%.py,costs escalation fetch scheduler not_served))
# Each process gets a run of neighbours, which share what is expensive to make, and takes over from others at the end.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist worksteal
FIND_LINKS := $(if $(WHEELS),--find-links $(WHEELS))

# uv takes a tenth of pip's time. But pip fetches torch, for it may have been told of a build for the CPU.
UV_INSTALL = .venv/bin/uv pip install -q --python $(@D)/bin/python $(FIND_LINKS)

export HF_HUB_OFFLINE := 1
# Most modules of what is installed are never imported. Python compiles the others once, outside the sources; where it
# may not write that down, every process of the tests would compile them anew.
export PIP_NO_COMPILE := 1
export PYTHONDONTWRITEBYTECODE :=
export PYTHONPYCACHEPREFIX := $(CURDIR)/build/bytecode
# Tests keep every core busy with processes: threads on top of them would only wait for each other.
test coverage docs test-%: export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help environments demo test coverage test-slow test-ray test-oldest test-lmms test-kernels test-sglang test-vllm test-play \
	test-gpu test-install test-canary docs package bench lint clean

help:
	@echo "make demo         ask the embedded model about a picture, trimmed and untrimmed"
	@echo "make test         the tests"
	@echo "make coverage     the tests, and the lines that none of them runs"
	@echo "make test-slow    the tests that take longer than twenty seconds"
	@echo "make test-ray     the tests that start a Ray cluster"
	@echo "make test-oldest  the model's tests on transformers $(OLDEST_TRANSFORMERS), the oldest supported"
	@echo "make test-lmms    the plugin for lmms-eval, run by lmms-eval itself; downloads about a gigabyte"
	@echo "make test-kernels the Triton kernels, interpreted and compiled on the CPU; Linux"
	@echo "make test-sglang  the tests that run SGLang, on the CPU"
	@echo "make test-vllm    the tests that run vLLM, on the CPU"
	@echo "make test-play    the playground in a headless Chromium; installs Debian's where there is none"
	@echo "make test-gpu     the tests that need a CUDA device, in an environment that has one"
	@echo "make test-install the built wheel, README's commands and example, and types, in an empty environment"
	@echo "make test-canary  the demo on the newest of everything, and the model's and the server's tests if that is newer than what is pinned"
	@echo "make docs         the site under build/site, links checked, and the tutorial run"
	@echo "make package      the wheel and the source distribution in dist/, checked for publishing"
	@echo "make bench        time and memory against their bars, on a machine that does nothing else"
	@echo "make lint         ruff, mypy, and which module may import which"
	@echo "make environments what the other targets install when they need it, all at once"
	@echo "make clean        remove what the other targets made"

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("crosstrim needs Python 3.11 or newer, and \
	$(PYTHON) is %d.%d: give another, as in make PYTHON=python3.11" % sys.version_info[:2])'
	@echo "Installing into .venv ..."
	@$(PYTHON) -m venv .venv
	@sed 's|^torch==.*|$(or $(TORCH),&)|' constraints.txt > .venv/constraints.txt
	@.venv/bin/python $(PIP_INSTALL) -c .venv/constraints.txt uv
	@.venv/bin/python $(PIP) download --no-deps -c .venv/constraints.txt -d .venv/wheels torch
	@$(UV_INSTALL) --no-deps .venv/wheels/*
	@rm -r .venv/wheels
	@$(UV_INSTALL) -c .venv/constraints.txt -e '.[dev,recipe,serve,ray]'
	@touch $@

# An environment on top of .venv: it sees the torch and the pip that are installed there, and has all else of its own.
define on_top
	@echo "Installing into $(@D) ..."
	@rm -rf $(@D)
	@.venv/bin/python -m venv --without-pip $(@D)
	@.venv/bin/python -c 'import sys, sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beneath.pth"
	@echo 'torch; python_version < "3"' > $(@D)/not-installed.txt
endef
ON_TOP = $(UV_INSTALL) --overrides $(@D)/not-installed.txt

# huggingface-hub follows transformers.
.venv-oldest/.installed: .venv/.installed
	$(on_top)
	@sed -e 's|^transformers==.*|transformers==$(OLDEST_TRANSFORMERS)|' -e '/^huggingface-hub==/d' \
		.venv/constraints.txt > $(@D)/constraints.txt
	@$(ON_TOP) -c $(@D)/constraints.txt -e '.[dev]'
	@touch $@

.venv-lmms/.installed: .venv/.installed constraints-lmms.txt
	$(on_top)
	@sed 's|^torch==.*|$(or $(TORCH),&)|' constraints-lmms.txt > $(@D)/constraints.txt
	@$(ON_TOP) -c $(@D)/constraints.txt -e '.[lmms]' pytest
	@touch $@

# Triton takes 700 MB and does nothing else for a CPU: it stays beside .venv.
.venv-triton/.installed: .venv/.installed
	@echo "Installing Triton into .venv-triton ..."
	@rm -rf .venv-triton
	@.venv/bin/python $(PIP_INSTALL) -c .venv/constraints.txt --no-deps --target .venv-triton triton
	@touch $@

# SGLang's own requirements are for CUDA: what it imports on a CPU is listed instead.
.venv-sglang/.installed: .venv/.installed requirements-sglang.txt
	$(on_top)
	@$(UV_INSTALL) --no-deps -r requirements-sglang.txt -e .
	@touch $@

# The same goes for vLLM.
.venv-vllm/.installed: .venv/.installed requirements-vllm.txt
	$(on_top)
	@$(UV_INSTALL) --no-deps -r requirements-vllm.txt -e .
	@touch $@

.venv-play/.installed: .venv/.installed constraints-play.txt
	$(on_top)
	@sed 's|^torch==.*|$(or $(TORCH),&)|' constraints-play.txt > $(@D)/constraints.txt
	@$(ON_TOP) -c $(@D)/constraints.txt -e '.[play]' playwright pytest
	@touch $@

# What writes the site, runs the tutorial, and builds and checks what is published.
.venv-docs/.installed: .venv/.installed requirements-docs.txt
	$(on_top)
	@$(UV_INSTALL) --no-deps -r requirements-docs.txt -e .
	@touch $@

# What pyproject.toml admits, in the newest versions. Of torch the newest that the index has a CPU build of.
CANARY := .venv-canary/bin
.venv-canary/.installed: .venv/.installed
	$(on_top)
	@newest="$$(.venv/bin/python -m pip index versions torch 2>/dev/null | grep -oE '[0-9.]+\+cpu' | head -1)"; \
		pinned="$$(sed -n 's|^torch==||p' .venv/constraints.txt)"; \
		$(CANARY)/python $(PIP_INSTALL) "torch==$${newest:-$$pinned}"
	@$(ON_TOP) --upgrade -e '.[dev,serve,ray]'
	@touch $@

environments: $(foreach name,oldest lmms docs triton sglang vllm play canary,.venv-$(name)/.installed)

demo: .venv/.installed
	@mkdir -p build
	.venv/bin/crosstrim ask cat "What colour is the 2?" --k 0.05 --compare --overlay build/overlay.png
	@echo "build/overlay.png is the picture; what is grey in it was dropped after the first cross-attention layer."

test: .venv/.installed
	@.venv/bin/python $(PYTEST) $(SIDE_BY_SIDE) $(COVERAGE) -m "not slow and not ray"

coverage: COVERAGE := --cov --cov-report=term:skip-covered
coverage: test

test-slow: .venv/.installed
	@.venv/bin/python $(PYTEST) $(SIDE_BY_SIDE) -m "slow and not ray" $$(grep -rl --include='*.py' mark.slow tests)

# Ray gives way to every other process, and beside another stage its workers would starve.
test-ray: .venv/.installed
	@RAY_worker_niceness=0 .venv/bin/python $(PYTEST) -m ray $$(grep -rl --include='*.py' mark.ray tests)

test-oldest: .venv-oldest/.installed
	@.venv-oldest/bin/python $(PYTEST) $(SIDE_BY_SIDE) --disable-warnings -m "not slow" $(OF_ONE_VERSION) \
		tests/models tests/trimming tests/asking

test-lmms: .venv-lmms/.installed
	@PYTHONPATH=$(CURDIR)/tests/eval/lmms/shim .venv-lmms/bin/python $(PYTEST) --disable-warnings tests/eval/lmms

test-kernels: .venv-triton/.installed
	@PYTHONPATH=.venv-triton .venv/bin/python $(PYTEST) $(SIDE_BY_SIDE) -m "not slow" tests/method/kernels
	@PYTHONPATH=.venv-triton TRITON_INTERPRET=1 .venv/bin/python $(PYTEST) $(SIDE_BY_SIDE) -m "not slow" tests/method/kernels

test-sglang: .venv-sglang/.installed
	@PYTHONPATH=tests/engines/sglang/shims .venv-sglang/bin/python $(PYTEST) --disable-warnings -m sglang tests/engines/sglang

test-vllm: .venv-vllm/.installed
	@.venv-vllm/bin/python $(PYTEST) --disable-warnings -m vllm tests/engines/vllm

# Playwright's own browsers are not downloaded: it drives the system's.
test-play: .venv-play/.installed
	@command -v chromium > /dev/null || { echo "Installing Debian's chromium ..."; \
		apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium > /dev/null; }
	@.venv-play/bin/python $(PYTEST) --disable-warnings -m play tests/play

# In the environment that is active: it has torch for its GPU already, and this installs nothing.
test-gpu:
	@python $(PYTEST) --disable-warnings tests/gpu

test-install: package
	@.venv/bin/python -m tests.support.docs.install

# What crosstrim works with and is no newer than what is pinned was tried by the tests of the other stages.
test-canary: .venv-canary/.installed
	@$(CANARY)/python -c 'from importlib.metadata import version as v; print("canary:", \
		", ".join(f"{name} {v(name)}" for name in ("torch", "transformers", "ray", "fastapi", "typer", "pillow")))'
	@newer="$$($(CANARY)/python -m tests.support.newer)" && echo "newer than pinned: $${newer:-nothing}" && \
		if [ -n "$$newer" ]; then $(CANARY)/python $(PYTEST) $(SIDE_BY_SIDE) --disable-warnings -q -m "not slow and not ray" \
		$(OF_ONE_VERSION) tests/models tests/server \
		$(patsubst %,tests/trimming/test_%.py,oracle handle static generation_promises); fi
	@$(CANARY)/crosstrim ask cat "What colour is the 2?" --k 0.05 --compare

docs: .venv-docs/.installed
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs --quiet build --strict
	@.venv-docs/bin/python $(PYTEST) -q --disable-warnings tests/docs/test_site.py tests/docs/test_tutorial.py

package: .venv-docs/.installed
	@rm -rf dist && mkdir -p build
	@.venv-docs/bin/python -m build > build/package.log 2>&1 || { cat build/package.log; exit 1; }
	@.venv-docs/bin/twine check --strict dist/*
	@.venv-docs/bin/python -m tests.support.docs.package dist
	@.venv-docs/bin/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@.venv-docs/bin/check-jsonschema -q --builtin-schema vendor.citation-file-format CITATION.cff

bench: .venv/.installed
	@mkdir -p build/bench
	@failed=; for suite in layers decode stack saliency growth merge session mini; do \
		.venv/bin/crosstrim bench $$suite --check --out build/bench/$$suite.json || failed="$$failed $$suite"; \
	done; if [ -n "$$failed" ]; then echo "FAILED:$$failed" >&2; exit 1; fi

lint: .venv/.installed
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-cache

clean:
	@rm -rf .venv .venv-oldest .venv-triton .venv-lmms .venv-sglang .venv-vllm .venv-play .venv-docs .venv-canary build dist
	@rm -rf .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
