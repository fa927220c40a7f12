"""Units that the tables print in. GiB stands in fastjepa.host."""

MIB = 2**20
"""Bytes of a MiB."""
