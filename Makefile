# Two commands for a newcomer: `make demo` and `make test`. Each sets up what it needs in $(VENV).
PYTHON ?= python3
VENV ?= .venv
# A CPU build of this release; for a GPU: make TORCH="torch --index-url ..." or any pip requirement
TORCH ?= torch==2.13.0
OUT ?= runs/demo
POSTERS ?=
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

# Bytecode is compiled as modules are first imported: most of what these packages hold never is
PIP := $(BIN)/pip install -q --no-compile

.PHONY: demo test test-avx2 bench lint install install-dev assets clean

# What running Speeder needs: `make demo` installs no more
install: $(VENV)/.installed

# What testing and working on it needs beside
install-dev: $(VENV)/.installed-dev

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	@touch $@

# torch comes first, so that nothing below pulls in another build of it. The kernels are compiled while pip fetches the
# other packages; pip's own build waits for that one and takes what it has compiled, or says what went wrong
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) "setuptools>=77" wheel ninja "pybind11>=2.13"
	$(BIN)/python setup.py -q build_ext --inplace > $(VENV)/build.log 2>&1 & \
	$(PIP) --no-build-isolation -c constraints.txt -e .; status=$$?; wait; exit $$status
	$(BIN)/python -m speeder_kernels
	@touch $@

# The packages alone: to install Speeder once more with its extra would compile its libraries once more
$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"], sep="\n")' > $(VENV)/dev.txt
	$(PIP) -c constraints.txt -r $(VENV)/dev.txt
	@touch $@

assets: install
	$(BIN)/speeder assets

demo: install
	$(BIN)/speeder demo --out $(OUT) $(if $(POSTERS),--posters $(POSTERS))

# Test files run on several cores at once; threads that wait do not spin, or they would slow the other files down
PYTEST = OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n auto --dist loadfile --timeout=600

test: install-dev assets lint
	$(PYTEST) --durations=15

# What is compared to the last bit, as a processor without AVX-512 computes it: our kernels, torch, MKL, oneDNN
# (on AMD's processors MKL does as it likes)
test-avx2: install-dev
	SPEEDER_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m exact

# Every op beside PyTorch and beside the machine's limits: bench/table.md, table.json, roofline.png
bench: install-dev
	$(BIN)/python -m benchmarks.table $(if $(THREADS),--threads $(THREADS))

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

clean:
	rm -rf build speeder_kernels/*.so speeder_kernels/_build_info.py speeder.egg-info $(VENV)/.installed $(VENV)/.installed-dev
