# Every task in a line: `make help`. A virtual environment is made in .venv on first use.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two single-threaded workers beat one with two threads: most of a test is Python
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
OTHERS := oldest image newest
# the newest datasets does not go with the huggingface_hub of transformers 4.57, the newest pyarrow not with numpy 1.26
PINS_oldest := --resolution lowest-direct 'datasets>=4.7,<5' 'pyarrow==21.*'
# numpy 2.4 refuses what the interpreter of triton 3.6 does; some image processors of transformers 5.17 want torchvision
PINS_image = $$($(BIN)/python -m verify.versions image) 'numpy<2.4' torchvision
# of the core, what versions may change, and of the integrations all but the starting of processes; `make test-versions` runs
# the rest
CORE := loss kernels row_kernels rounding ops head reference checks
OLDEST := $(CORE:%=tests/core/test_%.py) tests/project/test_versions.py tests/integrations tests/diagnostics/run
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-oldest test-versions matrix test-full compile bench fuzz mutate bench-report peers gpu \
	lint format docs docs-serve wheel clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## environment in .venv; without an NVIDIA GPU it gets the CPU build of torch

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# the registry's newest torch brings gigabytes of CUDA; this version has a CPU build
	nvidia-smi -L >/dev/null 2>&1 || $(BIN)/pip install torch==2.13.0
	$(BIN)/pip install -e '.[dev]'
	touch $@

demo: $(INSTALLED)  ## train a tiny LLaVA without and with PRe: a table, a picture, a report (ARGS="--quick" in a minute)
	$(BIN)/pre-kernels demo $(ARGS)

test: $(INSTALLED)  ## all tests, kernels interpreted and compiled ahead of time (ARGS="-k row_loss" for some)
	$(PYTEST) $(ARGS)

test-oldest: .deps/oldest/.installed .deps/triton  ## kernels and integrations on every oldest version claimed, compilation on triton 3.6
	$(subst $(BIN),.deps/oldest/bin,$(PYTEST)) --versions oldest $(OLDEST) \
	  --ignore tests/integrations/test_follow.py
	.deps/oldest/bin/python -m verify.compile --targets sm90
	PYTHONPATH=.deps/triton $(BIN)/python -m verify.compile --targets sm90

test-versions: $(OTHERS:%=.deps/%/.installed)  ## all tests on the other versions of the table in docs/models.md
	$(foreach row,$(OTHERS),$(subst $(BIN),.deps/$(row)/bin,$(PYTEST)) --versions $(row) &&) true

# uv, because pip takes four times as long; torch compiles with setuptools
$(OTHERS:%=.deps/%/.installed): .deps/%/.installed: pyproject.toml | $(INSTALLED)
	rm -rf .deps/$*
	$(PYTHON) -m venv --without-pip .deps/$*
	$(BIN)/uv pip install --quiet --python .deps/$*/bin/python -e '.[dev]' 'setuptools>=77' $(PINS_$*)
	touch $@

.deps/triton: | $(INSTALLED)
	$(BIN)/pip install --quiet --no-deps --target $@ 'triton==3.6.*'

# every combination of family, checkpointing, loop, LoRA and processes, on both versions of transformers
matrix: .deps/oldest/.installed  ## the whole product of the integrations' matrix, of which `make test` runs every pair
	$(PYTEST) tests/integrations/test_matrix.py --full-matrix
	$(subst $(BIN),.deps/oldest/bin,$(PYTEST)) tests/integrations/test_matrix.py --full-matrix

test-full: test test-oldest test-versions matrix  ## everything that runs without a GPU
	$(BIN)/pre-kernels demo --quick --out build/demo

compile: $(INSTALLED)  ## registers, spills, shared memory and matrix instructions of every kernel, without a GPU
	$(BIN)/python -m verify.compile $(ARGS)

bench: $(INSTALLED)  ## speed and memory beside the baselines, appended to bench/results
	$(BIN)/python -m pytest bench/ --benchmark $(ARGS)

fuzz: $(INSTALLED)  ## more than 10,000 fuzzed cases against float64 into bench/results/fuzz.jsonl (ARGS="--seed 7 --cases 100")
	$(BIN)/python -m bench.fuzz $(ARGS)

mutate: $(INSTALLED)  ## before a release: small errors in the kernels and the Function, which the tests have to see, in hours
	$(BIN)/python -m bench.mutate $(ARGS)

bench-report: $(INSTALLED)  ## write the committed results into the tables and pictures of README.md and docs/
	$(BIN)/python -m bench.report --pages

peers: $(INSTALLED)  ## baselines of other projects, and xdist, in .deps/peers, for a GPU machine that has no network
	$(BIN)/pip install --quiet --no-deps --upgrade --target .deps/peers liger-kernel quack-kernels pytest-xdist execnet

gpu:  ## on a machine with a GPU, with its own python3: all that 500 s can tell, to $GPU_OUT (ARGS="--stage bench" for more)
	$(PYTHON) -m bench.gpu $(ARGS)

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy pre_kernels

format: $(INSTALLED)  ## ruff, rewriting
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED)  ## the site, build/docs/index.html: docs/ and the API reference (its search needs `make docs-serve`)
	$(SITE) build --strict

docs-serve: $(INSTALLED)  ## the site at http://127.0.0.1:8000, built again after each change
	$(SITE) serve

wheel: $(INSTALLED)  ## build the wheel twice, to one hash, and from an sdist; install it into a fresh environment, import it
	rm -rf build/wheel
	$(BIN)/python -m verify.wheel
	$(PYTHON) -m venv build/wheel
	nvidia-smi -L >/dev/null 2>&1 || build/wheel/bin/pip install --quiet torch==2.13.0
	build/wheel/bin/pip install --quiet dist/*.whl
	cd build && wheel/bin/python -c "import pre_kernels, torch; h = torch.randn(4, 8, requires_grad=True); \
		head = pre_kernels.PreHead(8); head(h, h).backward(); print('imported', pre_kernels.__file__)"
	cd build && wheel/bin/pre-kernels env

clean:  ## what the targets above made
	rm -rf .venv .deps build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
