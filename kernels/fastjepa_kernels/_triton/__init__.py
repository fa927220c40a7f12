"""The Triton kernels, one file per operation: kernels, launchers, autograd. Imported only where they run."""
