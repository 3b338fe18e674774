# Everything a contributor runs. `make help` lists it.

PYTHON ?= python3
TAG := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv/$(TAG)
# Warns on every import on older interpreters; there our own cipher is the one that is tested.
CRYPTOGRAPHY := 'cryptography; python_version >= "3.9"'
PYTEST_OPTIONS := -q -W error -p no:cacheprovider --continue-on-collection-errors
# The newest releases that still understand Python 3.7, the oldest interpreter that kfserver runs on.
MYPY := mypy==1.4.1
RUFF := ruff==0.17.6
RUFF_OPTIONS := --no-cache --target-version py37 --line-length 120 \
	--select E,F,W,B,C4,SIM,RET,UP,PIE --ignore UP006,UP007,UP035,UP045
MYPY_OPTIONS := --strict --ignore-missing-imports --python-version 3.7 --cache-dir /dev/null
# How long each of the four readers is fuzzed under the guidance of coverage.
FUZZ_SECONDS ?= 60
SOURCES := kfserver.py handlers.py
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: help run demo test test-all check fuzz crash bench promises soak clean

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: ## Start the server with handlers.py
	$(PYTHON) kfserver.py

demo: ## Start a server, push a signed packet, show the answer and the handler's line, stop
	$(PYTHON) tests/demo.py

$(VENV)/installed:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check pytest redis $(CRYPTOGRAPHY)
	touch $@

test: $(VENV)/installed ## Run the tests on $(PYTHON), warnings as errors
	@$(VENV)/bin/python tests/side_by_side.py $(VENV)/bin/python -m pytest $(PYTEST_OPTIONS)

test-all: ## Run the tests on every CPython from 3.7 on that is found, however new
	sh tests/each_python.sh $(MAKE) --no-print-directory test

.venv/check/installed: Makefile
	$(PYTHON) -m venv .venv/check
	.venv/check/bin/python -m pip install --quiet --disable-pip-version-check $(MYPY) $(RUFF) pytest
	touch $@

check: .venv/check/installed ## Types and style
	.venv/check/bin/mypy $(MYPY_OPTIONS) $(SOURCES)
	.venv/check/bin/ruff check $(RUFF_OPTIONS) $(SOURCES) tests

# atheris has wheels for some versions of Python only: the first that it can be installed on is taken.
.venv/fuzz/installed:
	for python in $(PYTHON) python3.13 python3.12 python3.11; do \
		$$python -m venv --clear .venv/fuzz 2>/dev/null && .venv/fuzz/bin/python -m pip install --quiet \
			--disable-pip-version-check --only-binary :all: atheris h11 cryptography && touch $@ && break; \
	done; test -e $@

fuzz: $(VENV)/installed .venv/fuzz/installed ## Mutated pushes and bytes, guided by coverage too, and a comparison with h11
	$(VENV)/bin/python tests/fuzz.py --cases 200000
	.venv/fuzz/bin/python tests/fuzz_guided.py --seconds $(FUZZ_SECONDS)
	.venv/fuzz/bin/python tests/fuzz_h11.py --cases 100000

crash: $(VENV)/installed ## Kill a server with a journal 100 times, and count every message
	$(VENV)/bin/python tests/crash.py --kills 100

.venv-bench/installed: tests/bench/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r tests/bench/requirements.txt
	touch $@

bench: .venv-bench/installed ## Measure kfserver against its peers with wrk, and renew tables and plot
	.venv-bench/bin/python tests/bench/bench.py $(BENCH_OPTIONS) --update-readme README.md \
		--update-tables tests/bench/README.md --plot tests/bench/speed.svg
	.venv-bench/bin/python tests/bench/growth.py $(BENCH_OPTIONS) --update-readme tests/bench/README.md

promises: ## Measure what the README promises: latency, exactly once, idle cost, slow clients, nginx, replies
	$(PYTHON) tests/bench/promises.py
	$(PYTHON) tests/bench/hostage.py
	$(PYTHON) tests/bench/behind_nginx.py
	$(PYTHON) tests/bench/replies.py

soak: ## Ten minutes at 1,000 pushes a second: memory, descriptors and threads
	$(PYTHON) tests/bench/soak.py --minutes 10

clean: ## Remove what the other targets made
	rm -rf .venv .venv-bench
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
