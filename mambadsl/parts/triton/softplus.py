"""softplus as kernels compute it."""

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + exp(x)) with the rounding of 1 + exp(x) taken out again (dt is often below 0.001)."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    near = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, near)
