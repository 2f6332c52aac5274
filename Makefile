# Everything happens in .venv, made from the locks in requirements/.
# Debian's python3 has no venv without another package: virtualenv does for it.
# PYTHON: any of python3.11, python3.12, python3.13.  make test SLOW=1 runs the slow tests too.
PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check -qq

.PHONY: help demo test check bench lock clean

help:
	@echo "make demo    label a piece of Wikipedia and look at it"
	@echo "make test    the tests (SLOW=1: the slow ones too)"
	@echo "make check   lint, format, types"
	@echo "make bench   every benchmark but mfu.py, which wants a GPU"
	@echo "make lock    renew requirements/*.lock"
	@echo "make clean   remove .venv and demo/"

demo: .venv/demo.done
	@.venv/bin/python -m lacy.demo

test: .venv/test.done
	@.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(if $(SLOW),-m "slow or not slow") $(ARGS)

check: .venv/test.done
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

bench: .venv/test.done
	.venv/bin/python benchmarks/label.py
	.venv/bin/python benchmarks/score.py
	.venv/bin/python benchmarks/stats.py
	.venv/bin/python benchmarks/train.py
	.venv/bin/python benchmarks/cascade.py
	.venv/bin/python benchmarks/scale.py

lock:
	$(PYTHON) requirements/lock.py

clean:
	rm -rf .venv demo

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "lacy needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv 2>/dev/null || { rm -rf .venv .bootstrap; \
		$(PYTHON) -m pip install -qq --target .bootstrap virtualenv && \
		PYTHONPATH=.bootstrap $(PYTHON) -m virtualenv --quiet .venv && rm -rf .bootstrap; }
	@$(PIP) install --upgrade pip

.venv/demo.done: requirements/demo.lock pyproject.toml | .venv/bin/python
	@echo "installing into .venv (about two minutes the first time) ..."
	@$(PIP) install -r requirements/demo.lock
	@$(PIP) install --no-deps -e .
	@touch $@

.venv/test.done: requirements/test.lock requirements/vllm.lock pyproject.toml | .venv/bin/python
	@echo "installing into .venv (about four minutes the first time) ..."
	@$(PIP) install -r requirements/test.lock
	@$(PIP) install --no-deps -r requirements/vllm.lock
	@$(PIP) install --no-deps -e .
	@touch $@
