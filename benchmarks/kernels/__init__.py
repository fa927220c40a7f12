"""The kernels beside all that could take their place: python -m benchmarks.kernels."""
