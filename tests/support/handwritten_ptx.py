"""PTX written by hand, for tests of the simulator."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.proofs import ptxsim

Array = npt.NDArray[Any]


def module(body: str, *parameters: str, threads: int = 32) -> str:
    """A PTX kernel with the given body.

    Its registers are %p0-7, %rs0-31, %r0-99 and %rd0-31; %rd10, %rd11, ... hold the parameters, %r99 the thread.
    """
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
    """Run a body on tensors; return the counts."""
    ptx = module(body, *["u64"] * len(tensors), threads=threads)
    return ptxsim.run_ptx(ptx, shared, (ctas,), tensors).summary()


def by_lane(body: str, inputs: Sequence[Array], result: str) -> Array:
    """Run `body` in each lane on its elements `$0`, `$1`, ... of the inputs; return the results `$d` of all lanes."""
    prefix = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}
    names = [f"{prefix[x.itemsize]}{i}" for i, x in enumerate(inputs)]
    out = np.zeros(len(inputs[0]), result)
    code = []
    for i, x in enumerate([*inputs, out]):
        code.append(f"mul.wide.u32 %rd20, %r99, {x.itemsize}; add.s64 %rd{21 + i}, %rd20, %rd{10 + i};")
    for i, (name, x) in enumerate(zip(names, inputs, strict=True)):
        code.append(f"ld.global.b{8 * x.itemsize} {name}, [%rd{21 + i}];")
    destination = f"{prefix[out.itemsize]}9"
    code.append(re.sub(r"\$(\w)", lambda m: destination if m[1] == "d" else names[int(m[1])], body))
    code.append(f"st.global.b{8 * out.itemsize} [%rd{21 + len(inputs)}], {destination};")
    tensors = [torch.from_numpy(x.view(f"i{x.itemsize}")) for x in (*inputs, out)]
    run("\n".join(code), *tensors, threads=len(out))
    return out


def integers(dtype: str, seed: int) -> Array:
    """64 random integers, with the limits of the type among them."""
    info = np.iinfo(dtype)
    edges = [0, 1, 2, info.max, info.max - 1, info.min, info.min + 1, info.max // 2]
    rng = np.random.default_rng(seed)
    random = rng.integers(info.min, info.max, 64, dtype, endpoint=True) >> rng.integers(0, info.bits, 64).astype(dtype)
    return np.concatenate([np.array(edges, dtype), random])[rng.permutation(64)]


FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    0.1,
    3e38,
    -3e38,
    1e-39,
    65519.9,
    65520.0,
    2.5,
    -3.5,
    1e10,
    -1e10,
    np.inf,
    -np.inf,
    np.nan,
]


def floats(seed: int) -> Array:
    """64 random numbers of f32, with special ones among them."""
    rng = np.random.default_rng(seed)
    random = rng.standard_normal(64) * 10.0 ** rng.integers(-6, 7, 64)
    return np.concatenate([FLOATS, random])[:64][rng.permutation(64)].astype(np.float32)
