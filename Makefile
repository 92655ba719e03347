# Everything a developer or a visitor runs. `make demo` and `make test` need Python 3.11+, make and, the first time, the
# package registry: they build their own .venv and reuse it until pyproject.toml changes.

# The first Python 3.11+ on the PATH; `make test PYTHON=...` names another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
JOBS ?= 2
# Processes that share the GPU in `make gpu`; each takes a gigabyte or two of its memory.
GPU_JOBS ?= 4

# A stamp's name holds a checksum of what an installation depends on: while that is unchanged, pip is not called.
KEY := $(shell { cat pyproject.toml; pwd; } | cksum | tr ' \t' '--')
DEMO_STAMP := .venv/demo-$(KEY)
TEST_STAMP := .venv/test-$(KEY)
CHECK_STAMP := .venv/check-$(KEY)
DOCS_STAMP := .venv/docs-$(KEY)

# GPU targets take the interpreter named on the command line, else .venv, else the python3 of a prepared machine.
ifeq ($(origin PYTHON),command line)
GPU_PYTHON = $(PYTHON)
else
GPU_PYTHON = $(if $(wildcard .venv/bin/python),.venv/bin/python,$(PYTHON))
endif
# $(call need,statement,message): ends a GPU target, with a line in place of a traceback, where Python refuses the statement.
need = $(GPU_PYTHON) -c '$(1)' 2>/dev/null || { echo '$(GPU_PYTHON): $(2)'; exit 1; }
need_gpu = $(call need,import cupy; assert cupy.cuda.is_available(),no GPU is usable: `python -m cupyq doctor` says what is missing)

.PHONY: help demo test check format docs gpu sanitize bench wheel clean

help:
	@echo 'make demo      load a small quantized model, write some text, measure it (no GPU needed)'
	@echo 'make test      the tests; those that need a GPU are skipped where there is none'
	@echo 'make check     linters, types, and the tests of the repository itself'
	@echo 'make format    let ruff and clang-format rewrite the sources'
	@echo 'make docs      the documentation site, in site/; warnings are errors'
	@echo 'make gpu       the GPU tests; writes tests/gpu_receipt.json'
	@echo 'make sanitize  compute-sanitizer over small cases of every op (GPU)'
	@echo 'make bench     the benchmarks (GPU)'
	@echo 'make wheel     dist/cupyq-*.whl'

demo: $(DEMO_STAMP)
	.venv/bin/python examples/demo.py

# A worker a core: threads of NumPy's on top would wait for each other.
test: $(TEST_STAMP)
	OPENBLAS_NUM_THREADS=1 .venv/bin/python -m pytest -q -n $(JOBS) --dist worksteal

check: $(CHECK_STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/clang-format --dry-run -Werror cupyq/cu/*.cu cupyq/cu/*.cuh
	.venv/bin/mypy
	.venv/bin/python -m pytest -q -n $(JOBS) tests/test_repo.py tests/test_kernels.py tests/test_arrays.py tests/test_foreign.py

format: $(CHECK_STAMP)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/clang-format -i cupyq/cu/*.cu cupyq/cu/*.cuh

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet
	@echo 'open site/index.html'

gpu:
	@$(call need,import pytest$(comma) xdist,pytest and pytest-xdist are missing: run `make test` first or name a Python that has them)
	@$(need_gpu)
	OPENBLAS_NUM_THREADS=1 $(GPU_PYTHON) -m pytest -q -n $(GPU_JOBS) --dist worksteal -m gpu --require-gpu --gpu-receipt tests/gpu_receipt.json

# The plain run first: it fills the kernel cache, so that the sanitizer watches kernels and not the compiler.
sanitize:
	@$(need_gpu)
	PYTHONPATH=. $(GPU_PYTHON) tools/sanitize_cases.py --compile
	SANITIZER=racecheck PYTHONPATH=. $(GPU_PYTHON) tools/sanitize_cases.py --compile
	PYTHONPATH=. $(GPU_PYTHON) tools/sanitize_cases.py
	PYTHONPATH=. $(GPU_PYTHON) tools/sanitize.py --logs build/sanitize --minutes 60

bench:
	@$(need_gpu)
	PYTHONPATH=. $(GPU_PYTHON) -m cupyq bench qmatmul --quick
	PYTHONPATH=. $(GPU_PYTHON) -m cupyq bench attention --quick
	set -e; for file in benchmarks/bench_*.py; do PYTHONPATH=. $(GPU_PYTHON) $$file; done

wheel: $(TEST_STAMP)
	rm -rf build dist
	.venv/bin/python -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .
	@ls -l dist

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@test -n '$(PYTHON)' || { echo 'cupyq needs Python 3.11 or newer, none found on the PATH; name one: make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo '$(PYTHON) is older than Python 3.11; name another: make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo '$(PYTHON) has no venv module with pip; on Debian and Ubuntu: apt install python3-venv'; exit 1; }
	$(PYTHON) -m venv .venv

# $(call install,extras): this checkout, editable, with the given extras.
install = .venv/bin/python -m pip install -q --disable-pip-version-check -e '.$(if $(1),[$(1)])'
CUDA_EXTRA = $(shell .venv/bin/python tools/cuda_extra.py)
comma := ,

$(DEMO_STAMP): | .venv/bin/python
	@echo 'installing into .venv (first run only)'
	$(call install,$(CUDA_EXTRA))
	@touch $@

$(TEST_STAMP): | .venv/bin/python
	@echo 'installing into .venv (first run only)'
	$(call install,test$(comma)docs$(comma)$(or $(CUDA_EXTRA),compile))
	@touch $@

$(CHECK_STAMP): $(TEST_STAMP)
	$(call install,dev)
	@touch $@

$(DOCS_STAMP): | .venv/bin/python
	$(call install,docs)
	@touch $@
