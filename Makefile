# Every target makes what it needs: nothing but Python 3.10+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := 2.6.0
TORCH ?= 2.6.0

.PHONY: demo test test-integration test-oldest test-torch lint types check build clean

# The main job on real data: scikit-learn's handwritten digits, in full precision and then at 3 and 2 bits, four ways.
demo: $(VENV)/examples.stamp
	$(BIN)/python examples/digits.py

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest --ignore tests/integration

# The matrix of docs/compatibility.md: real runs, two processes among them.
test-integration: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m "" tests/integration

# The oldest Lightning that pyproject.toml allows.
test-oldest: $(VENV)-oldest/dev.stamp
	$(VENV)-oldest/bin/python -m pytest tests/callbacks $(addprefix tests/integration/test_,resume.py checkpoints.py \
		lightning_callbacks.py trainer_options.py precision.py optimization.py)

# Another torch, TORCH=2.6.0 unless given: gigabytes, where no build for CPUs is at hand. Not a part of CI.
test-torch: $(VENV)-torch-$(TORCH)/dev.stamp
	$(VENV)-torch-$(TORCH)/bin/python -m pytest --ignore tests/integration

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

check: lint types test

# The wheel, imported from a clean environment.
build: $(VENV)/dev.stamp
	rm -rf dist $(VENV)-wheel
	$(BIN)/python -m build --wheel
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd $(VENV)-wheel && bin/python -c "import lightning_qat_osc as q; print(q.__version__, len(q.__all__), 'names')"
	rm -rf $(VENV)-wheel

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and exactly: a looser range may take a build for another machine.
$(VENV)/%.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

$(VENV)-oldest/dev.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-oldest
	grep -v lightning constraints.txt > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint $(VENV)-oldest/constraints.txt \
		"lightning==$(OLDEST)" "pytorch-lightning==$(OLDEST)" --editable ".[dev]"
	touch $@

$(VENV)-torch-$(TORCH)/dev.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-torch-$(TORCH)
	grep -v -E '^torch(ao)?==' constraints.txt > $(VENV)-torch-$(TORCH)/constraints.txt
	$(VENV)-torch-$(TORCH)/bin/python -m pip install --quiet "torch==$(TORCH)"
	$(VENV)-torch-$(TORCH)/bin/python -m pip install --quiet \
		--constraint $(VENV)-torch-$(TORCH)/constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-wheel $(VENV)-oldest $(VENV)-torch-* build dist runs
