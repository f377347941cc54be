# All commands of this repository. `make train` and `make test` only need Python >= 3.11.
# Works with GNU make 3.81 and any POSIX shell.

SHELL := /bin/sh
PY := .venv/bin/python
ARGS =

.PHONY: help train test test-slow test-all test-nightly check format schemas update lock clean setup
.DEFAULT_GOAL := help

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# PYTHON=… chooses the interpreter; by default, it is that of .venv, or the first one that is new enough. LOCK=no
# installs the version ranges of requirements.txt instead of the lock file: for CPU wheels, or a mirror that builds
# its own files. Later set-ups of the same .venv keep this choice until LOCK=yes.
setup: ## build or update .venv
	@for python in $(if $(PYTHON),"$(PYTHON:~/%=$(HOME)/%)",$(PY) python3 python3.13 python3.12 python3.11 python); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
			exec "$$python" scripts/set_up.py $(if $(filter command,$(origin LOCK)),lock=$(LOCK)); \
		fi; \
	done; \
	echo 'set-up: no Python >= 3.11 found$(if $(PYTHON), (PYTHON=$(PYTHON))); install one, or name it: make PYTHON=/path/to/python3 …' >&2; \
	exit 1

train: setup ## train: make train ARGS="optimizer=adamw scheduler=cosine"
	@$(PY) scripts/train.py $(ARGS)

test: setup ## run the tests that are not slow (some five minutes on two cores)
	@$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow" $(ARGS)

test-slow: setup ## run only the slow tests
	@$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile -m "slow and not nightly" $(ARGS)

test-all: ## run the fast and the slow tests
	@$(MAKE) test
	@$(MAKE) test-slow

.PHONY: extras
extras: setup ## install the packages of all extras, as requirements-extras.lock pins them
	@if grep -q '"installed_from": "requirements.lock"' .venv/.set-up-complete && [ -f requirements-extras.lock ]; then \
		$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-extras.lock; fi
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[export,http,lora,mlflow,notebook,s3,text]'

# >>> template only
.PHONY: mutate test-next-hydra bench bench-gpu peers reference site workflows
mutate: extras ## break each promise on purpose, in a copy, and check that its tests fail
	@$(PY) tests/mutate.py $(ARGS)

test-next-hydra: setup ## run the tests of Hydra code with the newest Hydra below 1.5, including release candidates
	@$(PY) -m pip install --quiet --upgrade --target build/next-hydra 'hydra-core>=1.4.0rc1,<1.5'
	@PYTHONPATH=build/next-hydra $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not nightly" --one-of-each \
		tests/test_config.py tests/test_load.py tests/test_train.py \
		tests/test_hydra_habits.py tests/test_hydra_settings.py tests/test_notebook.py tests/test_origins.py tests/scripts tests/sweep $(ARGS)

bench: setup ## rewrite benchmarks/RESULTS.md (about 45 minutes); ARGS=step measures one part, ARGS=--help lists the parts
	@$(PY) -m benchmarks $(ARGS)

# Needs no network, and no .venv if packages are elsewhere: see docs/gpu.md.
bench-gpu: ## measure on a GPU and write docs/gpu.md; ARGS=--help lists the parts
	@python=$(PY); [ -x $(PY) ] || python=python3; \
		PYTHONPATH="src$${PYTHONPATH:+:$$PYTHONPATH}" "$$python" -m benchmarks.gpu $(ARGS)

# The tools are installed again where the lock has changed.
build/site-tools/complete: docs/site/requirements.lock | setup
	@rm -rf build/site-tools
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --target build/site-tools -r $<
	@touch $@

reference: schemas ## rewrite docs/keys.md, docs/reference/ and the diagrams of the pages
	@$(PY) docs/site/keys.py
	@$(PY) docs/site/api.py
	@$(PY) docs/site/images.py

site: setup build/site-tools/complete ## build the site in build/site/html; a warning is an error
	@PYTHONPATH="$(CURDIR)/build/site-tools" PYTHONDONTWRITEBYTECODE=1 $(PY) docs/site/build.py

workflows: setup build/site-tools/complete ## check .github and CITATION.cff
	@PYTHONPATH="$(CURDIR)/build/site-tools" sh .github/check.sh $(PY)

peers: setup ## install other engines for `make bench` to compare with
	@$(PY) -m pip install --quiet --no-deps --upgrade --target build/peers -r benchmarks/peers/requirements.txt
# <<< template only

test-nightly: setup ## run all tests, including variants of slow ones
	@$(MAKE) test
	@$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile -m slow $(ARGS)
# >>> template only
	@$(MAKE) mutate
# <<< template only

check: setup ## check formatting, lint and types
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
# >>> template only
	@$(PY) tests/english.py
	@$(PY) -m mypy --config-file= --ignore-missing-imports --python-version 3.11 benchmarks
# <<< template only
	@$(PY) -m mypy

format: setup ## format, and fix what the linter can
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

schemas: setup ## rewrite the JSON Schemas of conf/, with which editors complete and underline
	@$(PY) scripts/make_schemas.py

update: setup ## update the engine: make update FROM=<checkout or clone URL of a newer template>
	@$(PY) scripts/update.py FROM="$(FROM)" KEEP="$(KEEP)" MIGRATED="$(MIGRATED)"

lock: ## update the lock file after a change of requirements (newest versions: ARGS=--upgrade)
	@command -v uv >/dev/null || { echo 'make lock needs uv: pip install uv' >&2; exit 1; }
	@UV_CUSTOM_COMPILE_COMMAND='make lock' uv pip compile --quiet --universal --python-version 3.11 \
		--fork-strategy fewest --no-emit-index-url --no-emit-find-links --no-annotate \
		--generate-hashes $(ARGS) requirements-dev.txt --output-file requirements.lock
	@# The versions of requirements.lock, where the extras allow them: uv keeps what stands in its output.
	@cp requirements.lock requirements-extras.lock
	@UV_CUSTOM_COMPILE_COMMAND='make lock' uv pip compile --quiet --universal --python-version 3.11 \
		--fork-strategy fewest --no-emit-index-url --no-emit-find-links --no-annotate \
		--generate-hashes --all-extras $(ARGS) pyproject.toml --output-file requirements-extras.lock
# >>> template only
	@UV_CUSTOM_COMPILE_COMMAND='make lock' uv pip compile --quiet --universal --python-version 3.11 \
		--fork-strategy fewest --no-emit-index-url --no-emit-find-links --no-annotate \
		--generate-hashes $(ARGS) docs/site/requirements.txt --output-file docs/site/requirements.lock
# <<< template only

clean: ## remove caches; keep outputs, data and .venv
	@rm -rf .pytest_cache .mypy_cache .ruff_cache build dist src/*.egg-info
	@find . \( -path ./outputs -o -path ./data -o -path ./.venv -o -path ./.git \) -prune \
		-o -type d -name __pycache__ -exec rm -rf {} +
