# make test, make bench: each sets up what it needs first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup test bench report clean
setup: $(VENV)/built

# One pip call: torch is pinned in it, so nothing fetches another build of torch.
$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

test: setup
	$(BIN)/python -m pytest $(ARGS)

bench: setup
	$(BIN)/python -m benchmarks.models $(ARGS)
	$(BIN)/python -m benchmarks.units $(ARGS)

report: setup
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf $(VENV) build *.egg-info sk_fused/*.so
