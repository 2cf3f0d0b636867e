# GNU make. `make` lists the targets; ARGS="..." is passed on to the script or to pytest.

RUFF := 0.17.6
# Without PYTHON=..., the first of these that is 3.11 or newer.
PYTHONS := $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11)

# A worker of pytest for each core; a module's tests stay together where they can, since they share what is slow to make.
PYTEST := -m pytest -q -n auto --dist worksteal

export PYTHONUNBUFFERED := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-lowest test-newest test-cpus test-ranks test-gpu bench train-text train-sudoku lint clean always

help:  ## list the targets
	@echo 'usage: make TARGET [ARGS="..."] [PYTHON=/path/to/python]'
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{printf "  %-14s%s\n", $$1, $$2}'

venv: .venv/.installed  ## create .venv with the pinned dependencies

demo: .venv/.installed  ## run a shipped checkpoint: examples/demo.py
	@.venv/bin/python examples/demo.py $(ARGS)

test: .venv/.tested  ## run the tests; one file: ARGS=tests/test_house.py
	@echo 'running pytest'
	@.venv/bin/python $(PYTEST) $(ARGS)

test-lowest: .venv-lowest/.tested  ## run the tests with the oldest supported transformers, in .venv-lowest
	@echo 'running pytest with the oldest supported transformers'
	@.venv-lowest/bin/python $(PYTEST) $(ARGS)

test-newest: .venv-newest/.installed  ## run the tests with the newest of everything, upgraded now, in .venv-newest
	@.venv-newest/bin/python -m pip list 2>/dev/null | grep -E '^(torch|transformers|accelerate|peft|diffusers) '
	@echo 'running pytest with the newest versions'
	@.venv-newest/bin/python $(PYTEST) $(ARGS)

test-cpus: .venv/.tested  ## run the tests as other CPUs round: tests/other_cpus.py
	@.venv/bin/python tests/other_cpus.py $(ARGS)

test-ranks: .venv/.tested  ## run the tests of several processes with four of them: plans in two dimensions
	@RANKS=4 .venv/bin/python -m pytest -q -n 0 tests/test_ranks.py tests/test_scale.py $(ARGS)

test-gpu: .venv/.tested  ## run the tests that need a GPU
	@echo 'running pytest -m gpu'
	@.venv/bin/python -m pytest -q -m gpu $(ARGS)

bench: .venv/.installed  ## time against transformers' own model: benchmarks/against_transformers.py
	@.venv/bin/python benchmarks/against_transformers.py $(ARGS)

train-text: .venv/.installed  ## train the text checkpoint: examples/train.py text
	@.venv/bin/python examples/train.py text $(ARGS)

train-sudoku: .venv/.installed  ## train the sudoku checkpoint: examples/train.py sudoku
	@.venv/bin/python examples/train.py sudoku $(ARGS)

lint: .venv/.installed  ## check style and formatting with ruff
	@.venv/bin/python -m ruff --version 2>/dev/null | grep -qxF 'ruff $(RUFF)' || \
		{ echo 'installing ruff $(RUFF)'; .venv/bin/python -m pip install -q ruff==$(RUFF); }
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .

clean:  ## remove the environments, caches and build leftovers; keeps runs/
	rm -rf .venv .venv-lowest .venv-newest .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: requirements.txt setup.py
	$(install)

.venv-lowest/.installed: requirements-lowest.txt setup.py
	$(install)

# The names of both files without their versions; built anew and upgraded at every call.
.venv-newest/.installed: UPGRADE := --upgrade --upgrade-strategy eager
.venv-newest/.installed: build/requirements-newest.txt setup.py always
	$(install)

build/requirements-newest.txt: requirements.txt requirements-test.txt
	@mkdir -p $(@D)
	@sed -e '/^#/d' -e 's/==[^; ]*//' $^ > $@

%/.tested: %/.installed requirements-test.txt
	@echo 'installing what the tests need into $(@D)'
	@$(@D)/bin/python -m pip install -q -r requirements-test.txt
	@touch $@

# $(@D) is the environment, $< its requirements. The stamp .installed is touched last, and .installing stands there meanwhile:
# an environment whose installation was interrupted is built anew, a finished one (or one made by hand) is updated in place.
define install
@set -e; \
supported='import sys; sys.exit(sys.version_info < (3, 11))'; \
if [ ! -e $(@D)/.installing ] && $(@D)/bin/python -c "import pip; $$supported" 2>/dev/null; then \
	echo '[1/3] updating $(@D)'; \
else \
	python=; found=; \
	for candidate in $(PYTHONS); do \
		version=$$("$$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || version='not found'; \
		found="$$found$${found:+, }$$candidate: $$version"; \
		if "$$candidate" -c "$$supported" 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "error: Python 3.11 or newer is needed; found $$found. Name one: make venv PYTHON=/path/to/python3.12" >&2; \
		exit 1; \
	fi; \
	echo "[1/3] creating $(@D) with $$python ($$version)"; \
	rm -rf $(@D); \
	mkdir $(@D); \
	touch $(@D)/.installing; \
	"$$python" -m venv $(@D); \
fi; \
touch $(@D)/.installing; \
$(@D)/bin/python -m pip install -q --upgrade pip; \
echo '[2/3] installing dependencies (torch is about 200 MB as a CPU build, more with CUDA; a few minutes)'; \
$(@D)/bin/python -m pip install $(UPGRADE) -r $<; \
echo '[3/3] installing this package in editable mode'; \
PYTHONWARNINGS=ignore $(@D)/bin/python -m pip install -q --no-deps -e .; \
rm -f $(@D)/.installing; \
touch $@; \
echo '$(@D) is ready'
endef
