# Everything happens in .venv, made from the locks in requirements/.
# PYTHON: any of python3.11, python3.12, python3.13.  make test SLOW=1 runs the slow tests too.
PYTHON ?= python3

.PHONY: help demo test check check-locks bench lock clean

help:
	@echo "make demo    label a piece of Wikipedia and look at it"
	@echo "make test    the tests (SLOW=1: the slow ones too)"
	@echo "make check   lint, format, types"
	@echo "make check-locks   can the locks be installed from the package index alone?"
	@echo "make bench   the benchmarks that need neither a GPU nor data of your own"
	@echo "make lock    renew requirements/*.lock"
	@echo "make clean   remove .venv, .uv and demo/"

demo: .venv/demo.done
	@.venv/bin/python -m lacy.demo

test: .venv/test.done
	@.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(if $(SLOW),-m "slow or not slow") $(ARGS)

check: .venv/test.done
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

check-locks: .venv/test.done
	.venv/bin/python requirements/lock.py --check

bench: .venv/test.done
	.venv/bin/python benchmarks/label.py
	.venv/bin/python benchmarks/score.py
	.venv/bin/python benchmarks/stats.py
	.venv/bin/python benchmarks/train.py
	.venv/bin/python benchmarks/cascade.py
	.venv/bin/python benchmarks/scale.py

lock: .venv/test.done
	PATH="$(PATH):.uv/bin" .venv/bin/python requirements/lock.py --upgrade

clean:
	rm -rf .venv .uv demo

.venv/demo.done: requirements/demo.lock requirements/install.py pyproject.toml
	@$(PYTHON) requirements/install.py demo
	@touch $@

.venv/test.done: requirements/test.lock requirements/vllm.lock requirements/install.py pyproject.toml
	@$(PYTHON) requirements/install.py test
	@touch $@
