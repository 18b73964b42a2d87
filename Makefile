# make install | demo | test | lint | clean      (without make: see README)
PYTHON ?= python3
VENV := .venv
EXTRAS := epub,eval,serve
# Further arguments: make demo ARGS="--minutes 30 --out runs/half", make install PIP_FLAGS="--index-url https://…"
ARGS ?=
PIP_FLAGS ?=

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif

# $(call install,extras): the package itself in editable form, everything else as pinned. The Python is checked first,
# since pip's own message about it is easily missed.
define install
@$(PYTHON) -c "import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit('miniGLM: Python %d.%d, 3.11 - 3.13 needed: make PYTHON=python3.12 ...' % v[:2])"
$(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c requirements.lock -e ".[$(1)]"
@touch $@
endef

.PHONY: install demo test lint clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml requirements.lock
	$(call install,$(EXTRAS))

$(VENV)/installed-test: pyproject.toml requirements.lock
	$(call install,test)
	@touch $(VENV)/installed

demo: install
	$(BIN)/miniglm demo $(ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n auto --dist loadfile $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
