PYTHON ?= python3
PY := .venv/bin/python
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

test: .venv/ready test-oldest
	$(PY) -m ruff check .
	$(PY) -m pytest -n auto

test-oldest: .venv/oldest
	PYTHONPATH=.venv/oldest $(PY) -m pytest -n auto -m oldest

demo: .venv/demo
	$(PY) -m fastpeft.cli demo

bench: .venv/ready
	$(PY) -m pytest bench --benchmark-group-by=group --benchmark-autosave --benchmark-compare

gpu: .venv/ready
	bash bench/gpu.sh out

check: .venv/ready
	$(PY) -m fastpeft.cli check

.venv/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install torch
	$(PY) -m pip install -e .[test]
	touch $@
