# `make help` lists the targets. The first one that needs it makes a virtual environment in .venv.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The demo needs less. Where everything is installed, that is used.
DEMO := $(or $(wildcard $(INSTALLED)),$(VENV)/.installed-demo)
# Two single-threaded workers are faster than one with two threads: most of a test's time is spent in Python.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
QUICK := -m 'not slow'
OTHERS := oldest image newest
# The newest pyarrow does not work with numpy 1.26.
PINS_oldest := --resolution lowest-direct 'pyarrow==21.*'
# numpy 2.4 raises errors in the interpreter of triton 3.6. Some image processors of transformers 5.17 need torchvision.
PINS_image = $$($(BIN)/python -m verify.versions image) 'numpy<2.4' torchvision
# OLDEST has the tests of the core that depend on versions, and those of the integrations. `make test-oldest` leaves out
# those that start many processes. `make test-versions` runs the rest.
CORE := loss kernels row_kernels rounding ops head reference checks
OLDEST := $(CORE:%=tests/core/test_%.py) tests/project/test_versions.py tests/integrations tests/diagnostics/run
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
ARGS ?=
# Where this is set, as in many images, each of the many processes compiles the libraries' source again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-oldest test-versions matrix test-full compile bench fuzz mutate bench-report peers gpu \
	lint format docs docs-serve hub dist clean

help:  ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## make the environment in .venv; without an NVIDIA GPU with the CPU build of torch

$(INSTALLED): EXTRA := dev
$(VENV)/.installed-demo: EXTRA := real
$(INSTALLED) $(VENV)/.installed-demo: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("Python: got %d.%d, want 3.10 or newer; make install PYTHON=…" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# The newest torch on the registry brings gigabytes of CUDA. This version has a CPU build.
	nvidia-smi -L >/dev/null 2>&1 || $(BIN)/pip install torch==2.13.0
	@# uv takes a third of the time of pip. It does not read pip's settings: where they name the registry, pip installs.
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python -e '.[$(EXTRA)]' || $(BIN)/pip install -e '.[$(EXTRA)]'
	touch $@

demo: $(DEMO)  ## train a tiny LLaVA without and with PRe; writes a table, a plot and a report (ARGS="--quick" takes a minute or two, ARGS="--real --fetch" has real parts)
	$(BIN)/pre-kernels demo $(ARGS)

test: $(INSTALLED) .deps/kernels  ## run the tests but the slow ones; kernels are interpreted, and compiled ahead of time (ARGS="-k row_loss")
	$(PYTEST) $(QUICK) $(ARGS)

test-oldest: .deps/oldest/.installed .deps/triton  ## test kernels and integrations with the oldest supported versions, and compilation with triton 3.6
	$(subst $(BIN),.deps/oldest/bin,$(PYTEST)) $(QUICK) --versions oldest $(OLDEST) \
	  $(addprefix --ignore tests/integrations/test_,follow.py example_scripts.py many_ranks.py)
	.deps/oldest/bin/python -m verify.compile --targets sm90
	PYTHONPATH=.deps/triton $(BIN)/python -m verify.compile --targets sm90

test-versions: $(OTHERS:%=.deps/%/.installed)  ## run all tests with the other versions in the table of docs/models.md
	$(foreach row,$(OTHERS),$(subst $(BIN),.deps/$(row)/bin,$(PYTEST)) --versions $(row) &&) true

# torch.compile needs setuptools.
$(OTHERS:%=.deps/%/.installed): .deps/%/.installed: pyproject.toml | $(INSTALLED)
	rm -rf .deps/$*
	$(PYTHON) -m venv --without-pip .deps/$*
	$(BIN)/uv pip install --quiet --python .deps/$*/bin/python -e '.[dev]' 'setuptools>=77' $(PINS_$*)
	touch $@

.deps/triton: | $(INSTALLED)
	$(BIN)/uv pip install --quiet --no-deps --python $(BIN)/python --target $@ 'triton==3.6.*'

# It is not in the environment, since each transformers supports only some of its versions.
.deps/kernels: | $(INSTALLED)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target $@ 'kernels==0.17.*' tabulate

# Every combination of family, checkpointing, loop, LoRA and processes, with both versions of transformers.
matrix: .deps/oldest/.installed  ## test every combination of the integrations' matrix; `make test-full` runs every pair
	$(PYTEST) tests/integrations/test_matrix.py --full-matrix
	$(subst $(BIN),.deps/oldest/bin,$(PYTEST)) tests/integrations/test_matrix.py --full-matrix

test-full: test-oldest test-versions matrix .deps/kernels  ## run all tests that need no GPU
	$(PYTEST)
	$(BIN)/pre-kernels demo --quick --out build/demo

compile: $(INSTALLED)  ## compile every kernel without a GPU; prints registers, spills, shared memory and matrix instructions
	$(BIN)/python -m verify.compile $(ARGS)

bench: $(INSTALLED)  ## measure speed and memory of the loss and the baselines, into bench-out (ARGS=--record: into bench/results)
	$(BIN)/python -m pytest bench/ --benchmark $(ARGS)

fuzz: $(INSTALLED)  ## compare more than 10,000 random cases with float64, into bench-out (ARGS="--seed 7 --cases 100", --record)
	$(BIN)/python -m bench.fuzz $(ARGS)

mutate: $(INSTALLED)  ## before a release: check that the tests see small errors in the kernels and the Function; takes hours
	$(BIN)/python -m bench.mutate $(ARGS)

bench-report: $(INSTALLED)  ## write the committed results into the tables and pictures of README.md and docs/
	$(BIN)/python -m bench.report --pages

peers: $(INSTALLED)  ## install baselines of other projects and xdist in .deps/peers, for a GPU machine without a network
	$(BIN)/pip install --quiet --no-deps --upgrade --target .deps/peers liger-kernel quack-kernels pytest-xdist execnet

gpu:  ## on a machine with a GPU, with its python3: test and measure for 500 s, into $GPU_OUT (ARGS="--stage bench" for more)
	$(PYTHON) -m bench.gpu $(ARGS)

lint: $(INSTALLED)  ## run ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy pre_kernels

format: $(INSTALLED)  ## format and fix with ruff
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED)  ## build the site, build/docs/index.html: docs/ and the API reference (its search needs `make docs-serve`)
	$(SITE) build --strict

docs-serve: $(INSTALLED)  ## serve the site at http://127.0.0.1:8000, and rebuild it after each change
	$(SITE) serve

hub: $(INSTALLED)  ## put the kernel for the Kernel Hub together in build/hub, from the sources of the package
	$(BIN)/python -m verify.hub $(ARGS)

# The sdist is installed without git, as on a machine that has none; then the wheel takes its place.
dist: $(INSTALLED) hub  ## build the files of a release into dist and check them: sdist, wheel and kernel; install both in a fresh environment
	rm -rf build/clean
	$(BIN)/python -m verify.dist $(ARGS)
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/clean
	nvidia-smi -L >/dev/null 2>&1 || build/clean/bin/pip install --quiet torch==2.13.0
	mkdir -p build/clean/no-git && printf '#!/bin/sh\nexit 127\n' >build/clean/no-git/git && chmod +x build/clean/no-git/git
	PATH="$(CURDIR)/build/clean/no-git:$$PATH" build/clean/bin/pip install --quiet dist/*.tar.gz
	$(IMPORTED)
	build/clean/bin/pip install --quiet --no-deps --force-reinstall dist/*.whl
	$(IMPORTED)

IMPORTED = cd build && clean/bin/python -c "import pre_kernels, torch; h = torch.randn(4, 8, requires_grad=True); \
	head = pre_kernels.PreHead(8); head(h, h).backward(); print('imported', pre_kernels.__file__)" && clean/bin/pre-kernels env

clean:  ## remove the files that the targets above made
	rm -rf .venv .deps build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
