"""What can be known of the Triton kernels without a GPU: python -m benchmarks.proofs.aot."""
