# Five commands for work on fastjepa. They use .venv where `make setup` has made it, else the environment that is active.

export PATH := $(CURDIR)/.venv/bin:$(PATH)
# As in .ci/run: one thread per process, and no GPU.
export OMP_NUM_THREADS := 1
export OMP_WAIT_POLICY := PASSIVE
export DS_ACCELERATOR := cpu
export CUDA_VISIBLE_DEVICES :=

.PHONY: help setup check test fast proofs

help:
	@echo "make setup     an environment in .venv with all that work on fastjepa needs"
	@echo "make check     style, spelling, files, types, borders between the packages: about a minute"
	@echo "make fast      the inner loop: tests that start no processes and train nothing to the end"
	@echo "make test      all tests that need no GPU"
	@echo "make proofs    the kernels as compiled for GPUs, held to their limits"

setup:
	python3 -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e '.[dev]'

check:
	ruff check .
	ruff format --check .
	codespell
	python .ci/check_files.py
	mypy
	lint-imports

test:
	python -m pytest -n 2 --dist loadfile
	TRITON_INTERPRET=1 python -m pytest -n 2 --dist loadfile tests/kernels/triton

fast:
	python -m pytest -n 2 -m "not processes and not learns and not gpu"

proofs:
	python -m benchmarks.proofs.aot --check
