# make demo | test | check | bench | clean. Each makes .venv first where it is missing.
PYTHON ?= python3
# One CPU build of torch by default. A torch that $(PYTHON) already has (a CUDA build, say) is used instead.
TORCH ?= torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
READY := .venv/.ready
DEV := .venv/.dev
CORE := .venv/.core
SOURCES := setup.py $(wildcard csrc/*.cpp csrc/*.hpp csrc/cuda/*.cu csrc/cuda/*.hpp)

.PHONY: demo test check format bench bench-train bench-evaluate bench-merge bench-merge-gpu bench-data bench-search bench-faults clean

demo: $(CORE)
	$(BIN)/python examples/quickstart/collect.py
	$(BIN)/demix run examples/quickstart/study.yaml

# A file's tests stay in one process: they share studies and checkpoints that take long to make.
test: $(CORE) $(DEV)
	$(BIN)/python -m pytest tests --numprocesses 2 --dist loadfile

check: $(CORE) $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/contract/test_import_layers.py

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Tables on standard output, JSON under benchmarks/results/. Each script has --help: sizes, peers to compare with.
bench: bench-train bench-evaluate bench-merge bench-data bench-search

bench-train: $(CORE)
	$(BIN)/python benchmarks/train_step.py

bench-evaluate: $(CORE)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evaluate.py

SCRATCH ?= build/bench
bench-merge: $(CORE) $(DEV)
	$(BIN)/python benchmarks/merge.py --work $(SCRATCH)/merge

# Tests, sanitises and measures the CUDA merge; ends with 2 where there is no GPU, so it is not a part of `bench`.
bench-merge-gpu: $(CORE) $(DEV)
	$(BIN)/python benchmarks/merge_gpu.py

bench-data: $(CORE) $(DEV)
	$(BIN)/python benchmarks/data_prepare.py
	$(BIN)/python benchmarks/data_blend.py

# benchmarks/rank_consistency.py trains about nine hundred small models (50 minutes of a core): run it by hand.
# benchmarks/surrogates.py and domain_changes.py need RegMix's published runs: give them --data by hand.
bench-search: $(CORE) $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/search_cost.py

bench-faults: $(CORE) $(DEV)
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/merge_faults.py --work $(SCRATCH)/merge_faults

$(READY): pyproject.toml
	@command -v g++ >/dev/null || { echo "g++ is missing: install a C++17 compiler (apt-get install g++)"; exit 2; }
	@echo "installing into .venv, and building csrc: some minutes"
	@if $(PYTHON) -c "import torch" 2>/dev/null; then $(PYTHON) -m venv --system-site-packages .venv; \
	 else $(PYTHON) -m venv .venv && $(BIN)/pip install --quiet --retries 1 --extra-index-url $(TORCH_INDEX) "$(TORCH)"; fi
	$(BIN)/pip install --quiet "setuptools>=77" "pybind11>=2.13"
	$(BIN)/pip install --quiet --no-build-isolation --editable .
	@touch $@

$(DEV): $(READY)
	$(BIN)/pip install --quiet "megatron-demix[dev]"
	@touch $@

# Installing has built the core; a changed csrc/ is rebuilt in place.
$(CORE): $(READY) $(SOURCES)
	@built=$$(ls megatron_demix/_core*.so 2>/dev/null); if [ -z "$$built" ] || [ -n "$$(find $(SOURCES) -newer $$built)" ]; \
	 then echo "building csrc"; $(BIN)/python setup.py --quiet build_ext --inplace; fi
	@touch $@

clean:
	rm -rf .venv build *.egg-info megatron_demix/*.so .pytest_cache .mypy_cache .ruff_cache runs examples/*/corpus
