# make test, make bench: each sets up what it needs first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup test bench bench-all bench-check gpu report clean
setup: $(VENV)/built

# One pip call: torch is pinned in it, so nothing fetches another build of torch.
$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
	PATH="$(CURDIR)/$(BIN):$$PATH" SK_FUSED_WERROR=1 $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# The oldest triton that the kernels are for, beside the pinned one: what it compiles of them is tested too.
$(VENV)/oldest: $(VENV)/installed
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ triton==3.6.0
	touch $@

test: setup $(VENV)/oldest
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

bench: setup
	$(BIN)/python -m benchmarks.models $(ARGS)
	$(BIN)/python -m benchmarks.units --contenders timm sk_fused convolutions $(ARGS)

# What sk_fused is compared with, beside torch and timm; nothing else needs them.
$(VENV)/peers: $(VENV)/installed benchmarks/requirements.txt
	$(BIN)/pip install --quiet --requirement requirements.txt --requirement benchmarks/requirements.txt
	touch $@

# Every result, then the report.
bench-all: setup $(VENV)/peers
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.models --tax
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.serving --batch 1
	$(BIN)/python -m benchmarks.parity
	$(BIN)/python -m benchmarks.digits
	$(BIN)/python -m benchmarks.units
	$(BIN)/python -m benchmarks.passes
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.cold_start
	$(BIN)/python -m benchmarks.check
	$(BIN)/python -m benchmarks.report

# What got slower since the committed results of this kind of device.
bench-check: setup
	$(BIN)/python -m benchmarks.check --quick $(ARGS)

# All that needs a GPU, with the Python, torch and triton that the machine has.
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

report: setup
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf $(VENV) build *.egg-info sk_fused/*.so
