# make demo   build the pyz and run the main job end to end on an embedded local Hub
# make test   the whole suite, against the built pyz and in part against the source
# make mutate [N=100] [SEED=0] [ROOM=hub/ranges.py]  what the tests would miss: tests/mutate.py
# make fuzz [SECONDS=3600] [SEED=N]  hostile input with fresh seeds, for a while: tests/fuzz/run.py
# make golden write tests/golden anew: what hfship says, word for word
# make bench [BENCH_ARGS=--small]  beside other programs, in one table: benchmarks/all.py
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := $(shell find src -name "*.py" -o -name "*.json")

# make picture: docs/terminal.svg, of a run that is recorded now
picture: build $(VENV)/.ready
	$(BIN)/python docs/picture.py

.PHONY: picture demo test mutate fuzz golden build lint bench clean

build: dist/hfship.pyz

DOCUMENTS := $(wildcard docs/*)

dist/hfship.pyz: launcher.py build_zipapp.py vendor.lock build.lock LICENSE $(SOURCES) $(DOCUMENTS)
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
	$(BIN)/python tests/run.py $(PYTEST_ARGS)

mutate: $(VENV)/.ready
	$(BIN)/python tests/mutate.py $(addprefix -n ,$(N)) $(addprefix --seed ,$(SEED)) $(addprefix --room ,$(ROOM)) $(MUTATE_ARGS)

fuzz: build $(VENV)/.ready
	$(BIN)/python tests/fuzz/run.py $(addprefix --seconds ,$(SECONDS)) $(addprefix --seed ,$(SEED)) $(FUZZ_ARGS)

golden: build $(VENV)/.ready
	HFSHIP_GOLDEN=write $(BIN)/python -m pytest -q tests/test_golden.py -k "words or (help and source)"
	HFSHIP_GOLDEN=write $(BIN)/python -m pytest -q $(addprefix tests/test_,arguments.py asked.py meant.py results.py texts.py commands_listing.py)
	git diff --stat -- tests/golden

bench: build $(VENV)/.ready
	$(BIN)/python benchmarks/all.py $(BENCH_ARGS)

clean:
	rm -rf build dist $(VENV)
