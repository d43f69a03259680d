# make example   answers one question with the embedded checkpoint: the answer on stdout, everything else on stderr
# make test      runs the tests, but for the long ones: some five minutes   (PYTEST_ARGS="-k cache" narrows it down)
# make test-all  runs all of them
# make lint      runs ruff and mypy
# make clean     removes what the others made
#
# Each sets up what it needs in $(VENV) first; stamp files there make a second run start at once.

PYTHON ?= python3
VENV ?= .venv
INPUT_TEXT ?= What is the answer to life, the universe, and everything?
EXAMPLE_ARGS ?=
PYTEST_ARGS ?=

python := $(VENV)/bin/python
install := $(python) -m pip install --quiet --disable-pip-version-check
portable := $(shell find portable -type f -not -path '*/build/*' -not -path '*.egg-info/*' -not -name '*.pyc' -not -name '*.so')

.PHONY: example test test-all lint clean FORCE
.DELETE_ON_ERROR:

example: $(VENV)/.runtime
	@$(python) example.py --input-text "$(INPUT_TEXT)" --seed=1 $(EXAMPLE_ARGS)

test: $(VENV)/.test
	@$(python) -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: $(VENV)/.test
	@$(python) -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(python) -m mypy

clean:
	@rm -rf $(VENV) build dist portable/build portable/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip and the builds that it starts write to stderr, so that stdout belongs to the program.
$(VENV)/.runtime: $(VENV)/pyvenv.cfg requirements.txt requirements/nvtripy.txt $(portable)
	@echo "installing the runtime's requirements in $(VENV)" >&2
	@$(install) -r requirements.txt >&2
	@$(install) --no-deps -r requirements/nvtripy.txt >&2
	@touch $@

$(VENV)/.test: $(VENV)/.runtime requirements/test.txt requirements/evaluate.txt requirements/demo.txt requirements/checkpoints.txt requirements/serve.txt requirements/summarize.txt requirements/distributed.txt
	@echo "installing the tests' requirements in $(VENV)" >&2
	@$(install) -r requirements/test.txt >&2
	@touch $@

# A venv whose interpreter has gone (a Python was uninstalled, the tree was moved) is as good as none.
ifneq ($(shell test -x "$(python)" && echo usable),usable)
$(VENV)/pyvenv.cfg: FORCE
endif

$(VENV)/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null || { echo "error: Python 3.10 or newer is needed; '$(PYTHON)' is not there" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "error: Python 3.10 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version); try: make PYTHON=python3.12" >&2; exit 1; }
	@if test -e $@; then rm -rf $(VENV); fi
	@$(PYTHON) -m venv $(VENV) >&2 || { rm -rf $(VENV); exit 1; }
