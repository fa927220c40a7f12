"""Proofs that need no clock: compiled kernels, PTX on the CPU, counts, bytes, equality of the engines."""
