"""Make Triton's interpreter (3.8.0) compute in bfloat16.

Unpatched, it keeps bf16 as uint16 bit patterns: sums, products and dots silently work on integers, and a cast from fp32
truncates. This patch gives NumPy a real bf16 dtype (ml_dtypes), and rounds every conversion to nearest even, as the GPU
does.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_BF16 = np.dtype(ml_dtypes.bfloat16)
_Handle: Any = interpreter.TensorHandle
_Builder: Any = interpreter.InterpreterBuilder


def install() -> None:
    """Patch the interpreter. Call this before a kernel runs; further calls do nothing."""
    if interpreter._get_np_dtype is _numpy_dtype:
        return
    interpreter._get_np_dtype = _numpy_dtype
    _Builder.cast_impl = _cast
    _Builder.create_fp_to_fp = _convert
    _Builder.create_dot = _dot
    _Builder.get_bf16 = lambda builder, value: _Handle(np.array([value], _BF16), tl.bfloat16)
    interpreter.ReduceOps.sum = _sum


_stock_numpy_dtype: Any = interpreter._get_np_dtype
_stock_cast: Any = _Builder.cast_impl
_stock_convert: Any = _Builder.create_fp_to_fp
_stock_sum: Any = interpreter.ReduceOps.sum


def _numpy_dtype(type_: Any) -> Any:
    is_bf16 = not isinstance(type_, tl.pointer_type) and type_.scalar == tl.bfloat16
    return _BF16 if is_bf16 else _stock_numpy_dtype(type_)


def _numpy_can_cast(type_: Any) -> bool:
    return bool(type_.is_standard_floating() or type_.is_int())


def _cast(builder: Any, source: Any, target: Any) -> Any:
    types = source.dtype.scalar, target.scalar
    if tl.bfloat16 in types and all(map(_numpy_can_cast, types)):
        return _Handle(source.data.astype(_numpy_dtype(types[1])), types[1])
    return _stock_cast(builder, source, target)


def _convert(builder: Any, source: Any, target: Any, rounding: Any) -> Any:
    types = source.dtype.scalar, target.scalar
    if tl.bfloat16 not in types:
        return _stock_convert(builder, source, target, rounding)
    if rounding == interpreter._ir.ROUNDING_MODE.RTZ or not all(map(_numpy_can_cast, types)):
        raise NotImplementedError(f"bf16 in the interpreter: {types[0]} to {types[1]}, {rounding}")
    return _Handle(source.data.astype(_numpy_dtype(types[1])), types[1])


def _dot(builder: Any, a: Any, b: Any, accumulator: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """Multiply in fp32, as tensor cores multiply half precision."""
    x, y = (v.astype(np.float32) if v.dtype in (_BF16, np.float16) else v for v in (a.data, b.data))
    dtype = accumulator.data.dtype
    product = np.matmul(x, y, dtype=np.float32 if dtype == _BF16 else dtype)
    return _Handle((product + accumulator.data).astype(dtype, copy=False), accumulator.dtype.scalar)


def _sum(reduction: Any, value: Any) -> Any:
    if value.handle.data.dtype != _BF16:
        return _stock_sum(reduction, value)
    total = np.sum(value.handle.data.astype(np.float32), axis=reduction.axis, keepdims=reduction.keep_dims)
    return reduction.to_tensor(total, value.dtype)
