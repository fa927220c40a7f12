"""The Triton kernels, one file per operation: kernels, launchers, autograd. They are imported only where they run."""

import triton


def one_if_interpreted(configs: list[triton.Config]) -> list[triton.Config]:
    """The configurations to choose from; for Triton's interpreter only the first, since it cannot time them."""
    return configs[:1] if triton.knobs.runtime.interpret else configs
