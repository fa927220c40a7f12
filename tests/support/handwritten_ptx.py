"""PTX written by hand, for tests of the simulator."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.proofs import ptxsim


def module(body: str, *parameters: str, threads: int = 32) -> str:
    """A PTX kernel. Registers: %p0-7, %rs0-31, %r0-99, %rd0-31; %rd10 to %rd10+n hold the parameters."""
    declared = ",\n".join(f".param .{type_} k_param_{i}" for i, type_ in enumerate(parameters))
    loads = "\n".join(f"ld.param.b64 %rd{10 + i}, [k_param_{i}];" for i in range(len(parameters)))
    return f"""
.visible .entry k(
{declared}
)
.reqntid {threads}
{{
.reg .pred %p<8>;
.reg .b16 %rs<32>;
.reg .b32 %r<100>;
.reg .b64 %rd<32>;
mov.u32 %r99, %tid.x;
{loads}
{body}
ret;
}}
"""


def run(body: str, *tensors: torch.Tensor, threads: int = 32, shared: int = 0, ctas: int = 1) -> dict[str, Any]:
    """The counts of hand-written PTX on tensors; %r99 is the thread."""
    ptx = module(body, *["u64"] * len(tensors), threads=threads)
    return ptxsim.run_ptx(ptx, shared, (ctas,), tensors).summary()
