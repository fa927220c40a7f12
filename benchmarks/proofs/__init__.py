"""Proofs that need no clock: compiled kernels (aot), PTX run on the CPU (ptxsim), counts, bytes, equality of engines."""
