# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` set up all that they need on a fresh Debian or Ubuntu with git, make and python3.

# The interpreter that .venv is made with (3.11 or newer), and where .venv is.
PYTHON ?= python3
VENV ?= .venv
export PYTHON

# Files of tests that run at once.
JOBS ?= 2

BIN := $(VENV)/bin
OBJECT := agent/kmonitor/agent/kmonitor.bpf.o

# Stamps: what a set-up step leaves behind, so that it is done once. The one of .venv lies in it, and goes when it goes.
SYSTEM := build/system-run.stamp
SYSTEM_TEST := build/system-test.stamp
SYSTEM_BENCH := build/system-bench.stamp
INSTALLED := $(VENV)/kmonitor.stamp
INSTALLED_BENCH := $(VENV)/kmonitor-bench.stamp

.DEFAULT_GOAL := help
.PHONY: help setup setup-test setup-bench build demo test lab-test soak ha-table vm-load vm-miss vm-killers bench bench-quick lint format generate check-generated wheel clean FORCE

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 26

setup: $(INSTALLED) $(OBJECT) ## all that running takes: system packages, .venv, the BPF object

setup-test: setup $(SYSTEM_TEST)

setup-bench: setup $(SYSTEM_BENCH) $(INSTALLED_BENCH)

build: $(OBJECT) ## the BPF object, and its source beside it for bcc

demo: setup ## broker, agent, and what a small workload does; ALL=1: all that this machine does, FOR=10s (root, for BPF)
	$(BIN)/kmon up $(if $(ALL),,--demo) $(if $(FOR),--for $(FOR)) $(ARGS)

test: setup-test lint ## lint, and all tests, JOBS=2 at once (root, for BPF); ARGS="-k fork" goes to pytest
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --junitxml=build/junit.xml $(ARGS)

lab-test: setup ## the tour of docs/lab.md, on a Docker engine; says why if there is none
	KMONITOR_LAB_TEST=1 $(BIN)/python -m pytest -rs tests/compose $(ARGS)

soak: setup-test ## random faults under load, and then the books (root, for BPF); FOR=2m SEED=7 ARGS="--nodes 3"
	$(BIN)/python -m tests.robustness.soak $(if $(FOR),--for $(FOR)) $(if $(SEED),--seed $(SEED)) $(ARGS)

ha-table: setup-test ## from a death to the new process, with Pacemaker alone and with kmonitor (5 minutes, root); KILLS=10
	$(BIN)/python -m tests.ha.table $(if $(KILLS),--kills $(KILLS)) $(ARGS)

vm-load: setup ## every program of the probe on the stock kernels of Debian, in virtual machines (root); KERNELS="5.10 7.3"
	$(PYTHON) -m tools.vm.boot load $(KERNELS)

vm-miss: setup ## a load of forks on each of them, and what was told of it beside what was (root); KERNELS="7.3" SOURCES="core"
	$(PYTHON) -m tools.vm.boot miss $(KERNELS) $(if $(SOURCES),--arguments "$(SOURCES)")

vm-killers: setup ## deaths by signals on each of them, and who was named for it (root); KERNELS="5.10" SOURCES="core bcc"
	$(PYTHON) -m tools.vm.boot killers $(KERNELS) $(if $(SOURCES),--arguments "$(SOURCES)")

bench: setup-bench ## all measurements, beside peers: build/bench/results.md (10 minutes, root); ARGS="--only latency"
	$(BIN)/python -m bench $(ARGS)

bench-quick: setup-bench ## the same in a minute, to see that it works: no figure means anything
	$(BIN)/python -m bench --quick --out build/bench-quick $(ARGS)

lint: setup check-generated ## format, style, types, import layers, generated code, licence lines
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	tools/check_spdx.sh

format: setup ## write the source in the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generate: setup ## Python and its types from proto/
	tools/generate.sh $(VENV)

check-generated: setup
	tools/generate.sh $(VENV) --check

wheel: setup ## dist/kmonitor-*.whl, with the BPF object inside
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove all that was made here, .venv too
	rm -rf build dist $(VENV) $(OBJECT) $(dir $(OBJECT))bpf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find agent broker clients proto tests tools -name __pycache__ -prune -exec rm -rf {} +

$(SYSTEM): tools/system_packages.sh
	@mkdir -p $(@D)
	@tools/system_packages.sh run
	@touch $@

$(SYSTEM_TEST): tools/system_packages.sh
	@mkdir -p $(@D)
	@tools/system_packages.sh test
	@touch $@

$(SYSTEM_BENCH): tools/system_packages.sh
	@mkdir -p $(@D)
	@tools/system_packages.sh bench
	@touch $@

# The script looks at the times too, for the build hook of the package; touch, as it may find nothing to do.
$(OBJECT): $(wildcard bpf/*.c bpf/*.h) | $(SYSTEM)
	tools/build_bpf.sh
	@touch $@

# The object comes first: the package's build hook would make it, and hide clang's messages.
# An environment remembers where its checkout lies: in a copy or after a move it is made again.
$(INSTALLED): pyproject.toml constraints.txt tools/setup_venv.sh | $(SYSTEM) $(OBJECT)
	@tools/setup_venv.sh $(VENV)
	@echo '$(CURDIR)' > $@

$(INSTALLED_BENCH): pyproject.toml constraints.txt $(INSTALLED)
	@echo "Installing what the plots take into $(VENV)"
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --no-build-isolation --editable '.[bench]'
	@touch $@

ifneq ($(CURDIR),$(shell cat $(INSTALLED) 2>/dev/null))
$(INSTALLED): FORCE
endif
