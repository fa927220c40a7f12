"""Measurements, each a module to run: python -m benchmarks.NAME. `proofs/` holds those that need no clock."""
