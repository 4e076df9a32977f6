"""Functions inside the decoding kernels, and how kernels follow each other (programmatic dependent launch).

A kernel may begin while the one before it ends. It may then read weights, and state that an earlier kernel than that
one wrote; after `begin` everything. For that to hold, `begin` lets the next kernel start only after its own wait: so
at most two kernels are under way, and what the last but one wrote is there.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


def launch_options(x: torch.Tensor) -> dict[str, bool]:
    """Keyword arguments of every launch: dependent launch where the device has it (compute capability 9)."""
    return _options(x.device)


@cache
def _options(device: torch.device) -> dict[str, bool]:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return dict(PDL=False)
    return dict(PDL=True, launch_pdl=True)


@triton.jit
def begin(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Brings the lines of 128 bytes that hold these addresses into the L2 cache; not for the interpreter."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False,
        pack=1,
    )


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def activation(x, ACT: tl.constexpr):
    if ACT == "silu":
        x = silu(x)
    elif ACT == "relu":
        x = tl.maximum(x, 0.0)
    elif ACT == "relu2":
        x = tl.maximum(x, 0.0)
        x = x * x
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * tl.sigmoid(2.0 * u)
    return x


@triton.jit
def norm_scale(NORM_W, columns, mask, HAS_WEIGHT: tl.constexpr, CENTERED: tl.constexpr):
    """A norm's scale of these channels; 1 + weight where zero-centered."""
    if HAS_WEIGHT:
        scale = tl.load(NORM_W + columns, mask=mask, other=0.0).to(tl.float32)
        if CENTERED:
            scale = scale + 1.0
    else:
        scale = tl.full(columns.shape, 1.0, tl.float32)
    return scale
