"""The Triton kernels, one file per operation: kernels, launchers, autograd. Imported only where they run."""

import triton


def one_if_interpreted(configs: list[triton.Config]) -> list[triton.Config]:
    """The configurations to choose from: Triton's interpreter cannot time, and refuses to choose."""
    return configs[:1] if triton.knobs.runtime.interpret else configs
