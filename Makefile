# make quickstart   the whole recipe, results in runs/quickstart
# make test         the tests
# make test-full    and the slow ones
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: venv quickstart test test-full

venv: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[test,local]' -c constraints.txt
	touch $@

quickstart: venv
	$(BIN)/python -m exectune_jax.main --config configs/quickstart.py \
	  --workdir runs/quickstart

# Three at a time on two cores: tests wait, too.
test: venv
	$(BIN)/python -m pytest -m 'not full' -n 3 --dist loadfile \
	  --no-loadscope-reorder --durations 15

test-full: venv
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest
