# make demo   build the pyz and run the main job end to end on an embedded local Hub
# make test   the whole suite, against the source and against the built pyz
# make golden write tests/golden anew: what hfship says, word for word
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# `serve` takes the first free port from 8000 before docker binds it: tests of these run one at a time.
SERVING := $(patsubst %,tests/test_%.py,serve models jobs golden readme end_to_end components)

.PHONY: demo test golden build lint bench clean

build: dist/hfship.pyz

dist/hfship.pyz: hfship.py build_zipapp.py vendor.lock build.lock LICENSE
	$(PYTHON) build_zipapp.py -o $@

demo: build
	$(PYTHON) tests/demo.py dist/hfship.pyz

$(VENV)/.ready: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: build lint
	$(BIN)/python -m pytest -n 3 $(addprefix --ignore=,$(SERVING)) $(PYTEST_ARGS)
	$(BIN)/python -m pytest $(SERVING) $(PYTEST_ARGS)

golden: build $(VENV)/.ready
	HFSHIP_GOLDEN=write $(BIN)/python -m pytest -q tests/test_golden.py -k "words or (help and source)"
	git diff --stat -- tests/golden

bench: build $(VENV)/.ready
	$(BIN)/python benchmarks/fetch.py
	$(BIN)/python benchmarks/pack.py

clean:
	rm -rf build dist $(VENV)
