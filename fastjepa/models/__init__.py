"""The vision transformer on packed tokens, on which every method builds."""
