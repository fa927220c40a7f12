"""Make Triton's interpreter (3.8.0) honour bfloat16, by giving it a real numpy bf16 dtype (ml_dtypes).

Stock behaviour: bf16 is kept as uint16 bit patterns, so +,*,tl.dot,tl.sum/max on bf16 silently work on
integers, and fp32->bf16 truncates.  Call install() once, before any kernel runs (conftest.py).
Only for TRITON_INTERPRET=1.  Optional: tf32=True rounds fp32 dot operands as the tensor core would.
"""

import numpy as np
import ml_dtypes
import triton.language as tl
from triton.runtime import interpreter as I

BF16 = np.dtype(ml_dtypes.bfloat16)


def _tf32(x):
    u = np.ascontiguousarray(x).view(np.uint32)
    u = (u + np.uint32(0x0FFF) + ((u >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return u.view(np.float32)


def install(tf32=False):
    if getattr(I, "_bf16_shim", False):
        return
    B, stock_np_dtype, stock_cast, stock_f2f = (
        I.InterpreterBuilder,
        I._get_np_dtype,
        I.InterpreterBuilder.cast_impl,
        I.InterpreterBuilder.create_fp_to_fp,
    )

    def np_dtype(t):
        return BF16 if not isinstance(t, tl.pointer_type) and t.scalar == tl.bfloat16 else stock_np_dtype(t)

    def numpy_like(t):  # types for which numpy's own astype is right (RTNE)
        return t.is_standard_floating() or t.is_int()

    def cast_impl(self, src, dst):
        s, d = src.dtype.scalar, dst.scalar
        if tl.bfloat16 in (s, d) and numpy_like(s) and numpy_like(d):
            return I.TensorHandle(src.data.astype(np_dtype(d)), d)
        return stock_cast(self, src, dst)

    def fp_to_fp(self, src, dst, mode):
        s, d = src.dtype.scalar, dst.scalar
        if numpy_like(s) and numpy_like(d) and mode != I._ir.ROUNDING_MODE.RTZ:
            return I.TensorHandle(src.data.astype(np_dtype(d)), d)
        if BF16 in (src.data.dtype,):
            src = I.TensorHandle(src.data.view(np.uint16), src.dtype)
        h = stock_f2f(self, src, dst, mode) if d != tl.bfloat16 else None
        if h is None:
            bits = I._convert_float(src.data, s, d, mode).astype(np.uint16)
            h = I.TensorHandle(bits.view(BF16), d)
        return h

    def dot(self, a, b, d, input_precision, max_imprecise):
        x, y = a.data, b.data
        if a.dtype.scalar.is_fp8() or b.dtype.scalar.is_fp8():
            x, y = (I._convert_float(v.data, v.dtype.scalar, tl.float16, None).view(np.float16) for v in (a, b))
        elif x.dtype == BF16 or x.dtype == np.float16:
            x, y = x.astype(np.float32), y.astype(np.float32)
        elif tf32 and x.dtype == np.float32 and input_precision == I._ir.INPUT_PRECISION.TF32:
            x, y = _tf32(x), _tf32(y)
        r = np.matmul(x, y, dtype=d.data.dtype if d.data.dtype != BF16 else np.float32) + d.data
        return I.TensorHandle(r.astype(d.data.dtype, copy=False), d.dtype.scalar)

    def atomic_rmw(self, op, ptr, val, mask, sem, scope):
        if val.data.dtype != BF16:
            return stock_rmw(self, op, ptr, val, mask, sem, scope)
        out = np.zeros(val.data.shape, BF16)
        fn = {I._ir.ATOMIC_OP.FADD: lambda o, v: o + v, I._ir.ATOMIC_OP.XCHG: lambda o, v: v}[op]
        for ix in np.ndindex(val.data.shape):  # sequential, one lane at a time
            if mask.data[ix]:
                one = np.ones((1,), bool)
                p = ptr.data[ix].reshape(1)
                old = I._interpreter.load(p, one, np.zeros(1, BF16), BF16)
                I._interpreter.store(p, np.asarray(fn(old, val.data[ix]), BF16).reshape(1), one)
                out[ix] = old[0]
        return I.TensorHandle(out, val.dtype.scalar)

    stock_rmw = B.create_atomic_rmw
    I._get_np_dtype = np_dtype
    B.cast_impl, B.create_fp_to_fp, B.create_dot, B.create_atomic_rmw = cast_impl, fp_to_fp, dot, atomic_rmw
    B.get_bf16 = lambda self, v: I.TensorHandle(np.array([v], BF16), tl.bfloat16)
    stock_sum = I.ReduceOps.sum

    def red_sum(self, x):  # numpy would accumulate bf16 in bf16 sequentially; the GPU tree also rounds per step
        if x.handle.data.dtype != BF16:
            return stock_sum(self, x)
        return self.to_tensor(
            np.sum(x.handle.data.astype(np.float32), axis=self.axis, keepdims=self.keep_dims), x.dtype
        )

    I.ReduceOps.sum = red_sum
    I._bf16_shim = True
