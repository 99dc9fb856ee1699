PYTHON ?= python3
PY := .venv/bin/python
PYTEST := $(PY) -m pytest -n logical --maxprocesses 8 --dist worksteal
PEERS := tests/integrations/peer_suites/run.py
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)

.PHONY: demo demo-methods demo-serve docs test test-all test-thorough test-oldest test-adapters \
	test-nullgpu test-engines mutants peft-suite adapters-suite bench gpu check

demo: .venv/demo
	$(PY) -m fastpeft.cli demo

# Every method on one task, beside PEFT's: one table, one plot.
demo-methods: .venv/demo
	$(PY) -m fastpeft.cli demo --methods

demo-serve: .venv/demo
	$(PY) -m fastpeft.cli demo --serve

# The site, in site/; every warning is an error. It reads the source and imports nothing of it.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build --strict

# What is promised, and the style: minutes on two cores. `make test-all` runs everything.
test: .venv/ready .venv/peft-suite
	$(PYTEST) -m "not thorough"
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

test-all: test test-thorough test-oldest test-adapters

# The instruments themselves, the mutants' sample, every architecture, long runs.
test-thorough: .venv/ready
	$(PYTEST) -m thorough

# The same tests of what depends on the versions of others, with the oldest Triton, PEFT and transformers in front.
test-oldest: .venv/oldest
	PYTHONPATH=$(CURDIR)/.venv/oldest $(PYTEST) -m oldest

# Against AdapterHub's library, which pins an older transformers.
test-adapters: .venv/adapters
	PYTHONPATH=$(CURDIR)/.venv/adapters $(PY) -c "import adapters"
	PYTHONPATH=$(CURDIR)/.venv/adapters $(PYTEST) tests/integrations/adapters

# On a GPU that computes nothing: host time, launches, synchronisations, memory and capture of PyTorch's CUDA build.
test-nullgpu: .venv-nullgpu/ready
	.venv-nullgpu/bin/python -m bench.nullgpu -m pytest tests/nullgpu

# In vLLM's engine and its server, whose build for CPUs runs our LoRA layers.
test-engines: .venv-engines/ready
	.venv-engines/bin/python -m pytest tests/engines

# Breaks the package in one place at a time; a test must fail each time. `make test-all` runs a sample.
mutants: .venv/ready
	$(PY) tests/tools/mutants/run.py

# PEFT's own tests with our layer in place of theirs, every call compared with theirs: the installed version's, or those
# of PEFT=folder of a PEFT source tree. Then again with our low-rank term too large, which must be noticed.
peft-suite: .venv/peft-suite
	PYTHONPATH=$(CURDIR)/$< $(PY) $(PEERS) peft $(or $(PEFT),$</source)
	PYTHONPATH=$(CURDIR)/$< $(PY) $(PEERS) peft $(or $(PEFT),$</source) --self-test -k "MLP-LoraConfig"

# The same for AdapterHub's library, whose sdist has no tests: make adapters-suite ADAPTERS=folder of its source tree.
adapters-suite: .venv/adapters
	$(if $(ADAPTERS),,$(error adapters-suite: ADAPTERS is not given, expected a source tree of AdapterHub's library))
	PYTHONPATH=$(CURDIR)/$< $(PY) $(PEERS) adapters $(ADAPTERS)
	PYTHONPATH=$(CURDIR)/$< $(PY) $(PEERS) adapters $(ADAPTERS) --self-test -k Bottleneck

bench: .venv/ready
	$(PY) -m pytest bench --benchmark-autosave --benchmark-compare --benchmark-group-by=group \
		--benchmark-columns=min,median,iqr,rounds

gpu: .venv/ready
	bash bench/gpu.sh out

check: .venv/ready
	$(PY) -m fastpeft.cli check

.venv/ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/host/*)
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -e .[test] && $(PY) -m fastpeft.cli build && touch $@

.venv/oldest: constraints-oldest.txt | .venv/ready
	PIP_CONSTRAINT= $(PY) -m pip install --target $@ --upgrade --no-deps -r $< && touch $@

# The sources of PEFT as installed, which have its tests, and what these need beside.
.venv/peft-suite: constraints.txt | .venv/ready
	rm -rf $@ && $(PY) -m pip install --target $@ --no-deps parameterized==0.9.0
	$(PY) -m pip download --no-deps --no-binary peft --dest $@ \
		peft==$$($(PY) -c "import importlib.metadata; print(importlib.metadata.version('peft'))")
	mkdir $@/source && tar xzf $@/peft-*.tar.gz --strip-components=1 --directory $@/source && touch $@

.venv/adapters: constraints-adapters.txt | .venv/ready
	PIP_CONSTRAINT= $(PY) -m pip install --target $@ --upgrade --no-deps -r $< && touch $@

.venv-nullgpu/ready: constraints-nullgpu.txt constraints.txt pyproject.toml $(wildcard csrc/host/*)
	$(PYTHON) -m venv .venv-nullgpu
	PIP_CONSTRAINT= .venv-nullgpu/bin/python -m pip install --no-deps -r constraints-nullgpu.txt
	sed '/^torch==/d; /^triton>/d' constraints.txt > .venv-nullgpu/constraints.txt
	FASTPEFT_NO_CUDA=1 PIP_CONSTRAINT=.venv-nullgpu/constraints.txt \
		.venv-nullgpu/bin/python -m pip install -e .[test] && .venv-nullgpu/bin/python -m fastpeft.cli build && touch $@

.venv-engines/ready: constraints-engines.txt pyproject.toml setup.py
	$(PYTHON) -m venv .venv-engines
	PIP_CONSTRAINT= .venv-engines/bin/python -m pip install --no-deps -r constraints-engines.txt
	FASTPEFT_NO_CUDA=1 .venv-engines/bin/python -m pip install --no-deps -e . && touch $@

.venv/docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv $@
	$@/bin/pip install $$($(PYTHON) -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $@

.venv/demo: .venv/ready
	$(PY) -m pip install -e .[demo] && touch $@
