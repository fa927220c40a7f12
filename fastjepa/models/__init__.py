"""The vision transformer on packed tokens, which every method builds on."""
