# Everything a contributor types. Needs make and Python 3.11 or newer; each target sets up .venv by itself.

# Paths stay relative to this folder, so that a checkout may stand in a folder whose name has spaces.
VENV := .venv
PYTHON_IN_VENV := $(VENV)/bin/python
PIP_INSTALL := $(PYTHON_IN_VENV) -m pip install --quiet --disable-pip-version-check --no-input
UV_VERSION := 0.13.9
SET_UP := $(VENV)/.development $(VENV)/.package

# What surrounds the caller must not decide what is installed or imported here.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX PIP_TARGET PIP_PREFIX
export PIP_USER := 0

.DEFAULT_GOAL := help
.PHONY: help demo test cover check floor model soak bench install lock clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

demo: $(VENV)/.package ## Show three replicas that drop a stale entry, and one that does not (ONCE=1: run once and exit)
	@$(PYTHON_IN_VENV) -m broadcache demo $(if $(filter-out 0,$(ONCE)),--once) $(ARGS)

test: $(SET_UP) ## Run the tests (ARGS='-k word -x' is passed to pytest)
	@$(PYTHON_IN_VENV) -m pytest -n auto $(ARGS)

cover: $(SET_UP) ## Run the tests, and show which lines and branches they do not reach (ARGS as above)
	@$(PYTHON_IN_VENV) -m coverage erase
	@status=0; $(PYTHON_IN_VENV) -m coverage run -m pytest -n auto $(ARGS) || status=$$?; \
		$(PYTHON_IN_VENV) -m coverage combine --quiet && $(PYTHON_IN_VENV) -m coverage report && exit $$status

# What the versions of the dependencies decide: connections, the wrapped mapping, the HTTP side, the test kit.
FLOOR := .venv-floor
FLOOR_TESTS := $(addprefix tests/,shared/test_invalidation.py shared/test_wire.py shared/transport/redis/test_link.py \
	$(addprefix shared/transport/redis/test_topology_,address.py credentials.py tls.py) \
	subscriber/cache $(patsubst tests/%,%,$(wildcard tests/subscriber/endpoint/*.py)) subscriber/following subscriber/test_hub.py subscriber/test_mixin.py \
	publisher/test_sync_publisher.py publisher/publishing/test_publisher.py testing)
# What only newer versions of cachetools do: the order of an LFUCache is kept by broadcache, and reads within a change.
FLOOR_EXCEPT := -k 'not LFUCache and not touched_keys_that_are_gone and not other_code_has_broken and not within_a_change'
# Old versions of other packages warn of newer ones.
FLOOR_WARNINGS := -W 'ignore:The anyio.abc.BlockingPortal alias:DeprecationWarning'

floor: $(FLOOR)/.package ## Run some tests with the lowest versions that pyproject.toml allows (Python 3.11; ARGS as above)
	@$(FLOOR)/bin/python -m pytest -n auto -p no:randomly $(FLOOR_WARNINGS) $(FLOOR_EXCEPT) $(FLOOR_TESTS) $(ARGS)

check: $(SET_UP) ## Check lint, formatting, directions of imports and types
	$(PYTHON_IN_VENV) -m ruff check
	$(PYTHON_IN_VENV) -m ruff format --check
	$(PYTHON_IN_VENV) $(VENV)/bin/lint-imports --no-cache --no-logo
	$(PYTHON_IN_VENV) -m mypy
	$(PYTHON_IN_VENV) -m basedpyright --pythonpath $(PYTHON_IN_VENV)
	@# All types that users of the package see. The package is looked for by the first python of PATH.
	@report=$$(PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PYTHON_IN_VENV) -m basedpyright --verifytypes broadcache \
		--ignoreexternal) || { echo "$$report"; exit 1; }; echo "$$report" | grep '^Type completeness'

model: $(VENV)/.package ## Search the specification of the protocol with spin (ARGS='--scene bus --trails')
	@$(PYTHON_IN_VENV) docs/specification/check.py $(ARGS)

soak: $(SET_UP) ## Check the promise under every fault, for minutes (ARGS='--seconds 60 --faults cut,delay')
	@$(PYTHON_IN_VENV) -m tests.faults $(ARGS)
	@PROMISE_MODEL_RUNS=20000 $(PYTHON_IN_VENV) -m pytest -n auto --timeout 3600 tests/whole/test_promise_model.py

bench: $(SET_UP) ## Measure against peers and against the floor
	@$(PYTHON_IN_VENV) -m benchmarks $(ARGS)

install: $(SET_UP) ## Set up .venv: locked tools and this package, editable

lock: ## Write requirements/*.txt again (UPGRADE=1: with the newest versions)
	@sh requirements/lock.sh $(UV_VERSION) $(if $(filter-out 0,$(UPGRADE)),--upgrade)

clean: ## Remove .venv, builds and caches
	rm -rf $(VENV) $(FLOOR) build dist src/broadcache.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per step: a change of tool settings in pyproject.toml installs the package again, not its dependencies,
# and the demo does not wait for tools that only contributors need.
$(VENV)/.runtime: requirements/build.txt requirements/runtime.txt
	@PYTHON="$(PYTHON)" sh requirements/venv.sh $(VENV)
	@echo "installing what broadcache needs into $(VENV) (once, under a minute)"
	@$(PIP_INSTALL) --require-hashes --requirement requirements/build.txt --requirement requirements/runtime.txt
	@touch $@

$(VENV)/.development: requirements/dev.txt $(VENV)/.runtime
	@echo "installing the tools for tests and checks into $(VENV) (once, about a minute)"
	@$(PIP_INSTALL) --require-hashes --requirement requirements/dev.txt
	@touch $@

$(VENV)/.package: pyproject.toml src/broadcache/__init__.py $(VENV)/.runtime
	@$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(FLOOR)/.runtime: requirements/build.txt requirements/floor.txt
	@PYTHON="$(PYTHON)" sh requirements/venv.sh $(FLOOR)
	@echo "installing the lowest versions that broadcache allows into $(FLOOR) (once, about a minute)"
	@$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check --no-input --require-hashes \
		--requirement requirements/build.txt --requirement requirements/floor.txt
	@touch $@

$(FLOOR)/.package: pyproject.toml src/broadcache/__init__.py $(FLOOR)/.runtime
	@$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
		--no-deps --no-build-isolation --editable .
	@touch $@
