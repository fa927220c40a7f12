"""Kernels timed beside the alternatives that a trainer could use: python -m benchmarks.kernels."""
