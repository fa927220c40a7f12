"""The Triton kernels compiled ahead of time, and checked without a GPU: python -m benchmarks.proofs.aot."""
