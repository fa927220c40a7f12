"""Where the time, the arithmetic and the memory of a training step go, measured on this machine."""
