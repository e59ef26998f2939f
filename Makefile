# What a newcomer needs: `make demo`, `make test`. Everything is installed into .venv, nothing elsewhere.
# On a machine with a ROS 2 distribution the robot's workspace is built with colcon; this file is not used there.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# Run, not just looked up: a version manager's shim may stand there for a Python that is not installed.
PYTHON ?= $(or $(shell for p in python3.11 python3.12 python3.10; do \
  $$p -c '' 2>/dev/null && echo $$p && break; done),python3)
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
# So many tests at once: one more than two cores could, for a third of the time a test waits for a peer. A file's tests stay
# together, in order: they share fixtures.
TEST_WORKERS ?= $(shell cores=$$(OMP_NUM_THREADS= nproc); echo $$(( cores < 2 ? cores : 3 )))
DEMO_ARGS ?=
BENCH_ARGS ?=
# Of `make faults` and `make soak`: what is chosen at random, and how long.
SEED ?= 1
MINUTES ?= $(if $(filter soak,$(MAKECMDGOALS)),60,20)
FAULTS_ARGS ?= all
OLDEST_VENV ?= .venv-oldest
LMMS_VENV ?= .venv-lmms

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check
# -qq: errors only; a failed build still shows its whole output.
pip_install := $(pip) install -qq --constraint constraints.txt $(PIP_ARGS)
# Read on every install; Python modules are not among them: the install is editable and sees edits at once.
install_inputs := pyproject.toml setup.py constraints.txt CMakeLists.txt package.xml \
	$(wildcard msg/*.msg srv/*.srv action/*.action launch/* config/* kernels/*/cpp/*)

# The ROS of .venv, even from a shell that has sourced a distribution; nothing leaves this machine.
unexport PYTHONPATH LD_LIBRARY_PATH CMAKE_PREFIX_PATH PYTHONHOME _ROS_WHEELS_BOOTSTRAP_COMPLETE
export AMENT_PREFIX_PATH := $(abspath $(VENV))
export RMW_IMPLEMENTATION := rmw_fastrtps_cpp
export ROS_AUTOMATIC_DISCOVERY_RANGE := LOCALHOST
# A domain of its own for each run, so that two runs, or a robot's nodes on this machine, never hear each other.
export ROS_DOMAIN_ID := $(shell echo $$(( $$$$ % 100 + 1 )))
export PATH := $(abspath $(bin)):$(PATH)

.PHONY: help demo test test-versions test-lmms faults soak docker-check bench docs docs-serve install clean distclean check-machine

help: ## this list
	@echo "statekv_ros: a robot's visual memory as a ROS 2 node"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
	  while IFS='|' read -r target what; do printf '  make %-14s %s\n' "$$target" "$$what"; done
	@echo
	@echo 'Variables: PYTHON (the interpreter for a new .venv), PIP_ARGS (for example "--index-url ..." for another build'
	@echo 'of torch), DEMO_ARGS, PYTEST_ARGS, TEST_WORKERS (tests at once), BENCH_ARGS, SEED, MINUTES.'
	@echo 'As in: make test PYTEST_ARGS="-k launch"'

demo: $(VENV)/.installed-$(if $(VIEW),view,demo) ## install what is needed, then show the memory at work (VIEW=1: in a browser too)
	@$(bin)/python -m statekv_ros.demo $(if $(VIEW),--view) $(DEMO_ARGS)

test: $(VENV)/.installed-test ## install what is needed, then run all tests
	@echo '== tests'
	@$(bin)/python -m pytest -ra --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

version_tests := test/test_families.py test/test_exactness.py test/test_pixels.py

test-versions: $(VENV)/.installed-test $(OLDEST_VENV)/.installed ## run the model families' tests with the newest and the oldest Transformers
	@results=(); failed=0; for venv in $(VENV) $(OLDEST_VENV); do \
	  version=$$($$venv/bin/python -c 'import transformers; print(transformers.__version__)'); \
	  echo "== Transformers $$version"; \
	  if $$venv/bin/python -m pytest -q $(version_tests) $(PYTEST_ARGS); then result=passed; else result=FAILED; failed=1; fi; \
	  results+=("Transformers $$version: $$result"); done; \
	  printf '%s\n' '== results' "$${results[@]}"; exit $$failed

test-lmms: $(LMMS_VENV)/.installed ## run the tests of lmms-eval's model statekv, in an environment of its own
	@$(LMMS_VENV)/bin/python -m pytest -ra test/test_lmms.py test/test_lmms_parts.py $(PYTEST_ARGS)

campaign := $(bin)/python test/campaign
of_run = --seed $(SEED) --minutes $(MINUTES)

faults: $(VENV)/.installed-test ## bad inputs, killed peers, broken files; MINUTES=20 (FAULTS_ARGS="--help")
	@$(campaign) $(FAULTS_ARGS) $(of_run) --report faults_report

soak: $(VENV)/.installed-test ## a node watches a looped bag for MINUTES=60: does anything grow?
	@$(campaign) soak $(of_run) --report soak_report

# Not of .venv: what it makes is a machine of its own.
docker-check: ## what the images run, in a clean Debian tree (root, debootstrap; minutes)
	@docker/check.sh

# The tests that need a GPU are part of it.
bench: $(VENV)/.installed-test ## measure (BENCH_ARGS="--help" says what)
	@$(bin)/statekv-bench $(BENCH_ARGS)

# Material's notice about the future of MkDocs is for its maintainers.
mkdocs := NO_MKDOCS_2_WARNING=1 $(bin)/python -m mkdocs

docs: $(VENV)/.installed-docs ## build the documentation site into build/site, without a warning
	@$(mkdocs) build --quiet
	@echo "open build/site/index.html"

docs-serve: $(VENV)/.installed-docs ## show the documentation site at 127.0.0.1:8000 while you write
	@$(mkdocs) serve

install: $(VENV)/.installed-demo ## only install, into .venv

clean: ## remove what builds and runs left behind; keeps .venv
	@rm -rf build install log demo_output faults_report soak_report *.egg-info .pytest_cache .hypothesis
	@find . -path './.venv*' -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean ## clean, and remove .venv and the generated interfaces
	@rm -rf $(VENV) $(OLDEST_VENV) $(LMMS_VENV) statekv_ros/msg statekv_ros/srv statekv_ros/action statekv_ros/*.so

# --- installing -------------------------------------------------------------------------------------------------------

check-machine:
	@command -v $(PYTHON) >/dev/null || { echo 'error: $(PYTHON) not found: install Python 3.10, 3.11 or 3.12, or name' \
	  'one with PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v[:2] <= (3, 12) else \
	  f"error: $(PYTHON) is Python {v[0]}.{v[1]}, expected 3.10, 3.11 or 3.12: name one with PYTHON=/path/to/python3.11")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(PYTHON) -c 'import sys; v = sys.version_info; \
	  print(f"error: $(PYTHON) has no venv module: apt install python{v[0]}.{v[1]}-venv", file=sys.stderr)'; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; v = sys.version_info; h = sysconfig.get_paths()["include"] + "/Python.h"; \
	  sys.exit(None if os.path.isfile(h) else \
	  f"error: {h} is missing, and the messages are compiled against it: apt install python{v[0]}.{v[1]}-dev")'
	@for compiler in $${CXX:-c++ g++ clang++}; do command -v $$compiler >/dev/null && exit 0; done; \
	  echo "error: no C++ compiler ($${CXX:-c++, g++, clang++}) found, and the messages of msg/, srv/ and action/ are compiled:" \
	  'apt install g++' >&2; exit 1

$(bin)/python: | check-machine
	@echo '== $(VENV): a new virtual environment with $(shell $(PYTHON) --version 2>&1)'
	@$(PYTHON) -m venv $(VENV)

# What pyproject.toml wants at build time: installed into .venv too, where colcon and rebuilds find it.
$(VENV)/.build-requirements: pyproject.toml constraints.txt | $(bin)/python
	@echo '== ROS 2 build tools, as wheels'
	@$(bin)/python -c "exec('try: import tomllib\nexcept ImportError: from pip._vendor import tomli as tomllib'); \
	  print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" > $@.tmp
	@$(pip_install) --requirement $@.tmp
	@mv $@.tmp $@

# An install with the test extras serves the demo as well.
$(VENV)/.installed-demo: $(install_inputs) | $(VENV)/.build-requirements
	@echo '== statekv_ros, editable, and its dependencies (torch is the big one: minutes the first time)'
	@$(pip_install) --no-build-isolation --editable '.[demo]'
	@touch $@

$(VENV)/.installed-view: $(install_inputs) | $(VENV)/.build-requirements
	@echo '== statekv_ros, editable, its dependencies and those of its page (torch is the big one: minutes the first time)'
	@$(pip_install) --no-build-isolation --editable '.[demo,view]'
	@touch $(VENV)/.installed-demo $@

$(VENV)/.installed-test: $(install_inputs) | $(VENV)/.build-requirements
	@echo '== statekv_ros, editable, its dependencies and the test tools (torch is the big one: minutes the first time)'
	@$(pip_install) --no-build-isolation --editable '.[demo,test]'
	@touch $@ $(VENV)/.installed-demo $(VENV)/.installed-view

$(VENV)/.installed-docs: $(install_inputs) | $(VENV)/.installed-demo
	@echo '== the tools that build the documentation'
	@$(pip_install) --no-build-isolation --editable '.[docs]'
	@touch $@

# The oldest Transformers that pyproject.toml allows and the hub client that it asks for; all else is that of .venv.
oldest = $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)

# An environment that sees all packages of .venv, behind its own: $(call over_venv,FOLDER).
define over_venv
	@rm -rf $(1)
	@$(bin)/python -m venv $(1)
	@packages='import sysconfig; print(sysconfig.get_paths()["purelib"])'; \
	  echo "import site; site.addsitedir('$$($(bin)/python -c "$$packages")')" \
	  > "$$($(1)/bin/python -c "$$packages")/packages_of_venv.pth"
endef

$(OLDEST_VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.installed-test
	@echo '== $(OLDEST_VENV): Transformers $(oldest), over the packages of $(VENV)'
	$(call over_venv,$(OLDEST_VENV))
	@grep -v -e '^transformers==' -e '^huggingface-hub==' constraints.txt > $(OLDEST_VENV)/constraints.txt
	@$(OLDEST_VENV)/bin/python -m pip --disable-pip-version-check install -qq --constraint $(OLDEST_VENV)/constraints.txt \
	  $(PIP_ARGS) 'transformers==$(oldest).*'
	@touch $@

$(LMMS_VENV)/.installed: pyproject.toml requirements-lmms.txt | $(VENV)/.installed-test
	@echo '== $(LMMS_VENV): lmms-eval, over the packages of $(VENV)'
	$(call over_venv,$(LMMS_VENV))
	@$(LMMS_VENV)/bin/python -m pip --disable-pip-version-check install -qq --no-deps --requirement requirements-lmms.txt $(PIP_ARGS)
	@touch $@
