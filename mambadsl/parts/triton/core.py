"""The slot `mamba2.core` in one opaque op: convolution, SSD scan and gated norm, by our kernels or mamba_ssm's.

In and out: as `kinds/mamba2/module.py`'s `core`, the definition. Every gradient of the wide input is written
where it belongs, in one buffer. Refuses (ValueError): as the convolution's and the scan's files. With a
state, the layer's narrow slots run instead.

Letters: B batch, T time, E channels of in_proj, C of the convolution, K taps, H heads, P head_dim, I = H * P,
N d_state, G groups, R = B * T rows, c chunks, Q tokens of a chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from mambadsl.kinds.mamba2 import module
from mambadsl.kinds.rows import Rows
from mambadsl.parts.triton.gate_norm_kernels import gate_norm_backward, gate_norm_forward
from mambadsl.parts.triton.ssd import steps
from mambadsl.parts.triton.ssd.kernels import MODULES, chunk_length, documents, kernels
from mambadsl.parts.triton.ssd.scan import Inputs

#: What the op keeps for its backward beside its input, the scan's output and the norm's scales: the convolution's
#: output, the states before each chunk and the step sizes; without the first; nothing (as mamba_ssm's own op).
KEEP = "all", "states", "none"


class _Sizes(NamedTuple):
    B: int
    T: int
    H: int
    P: int
    G: int
    N: int
    C: int
    Q: int

    @classmethod
    def of(cls, zxbcdt_BTE: Tensor, weight_CK: Tensor, bias_H: Tensor, P: int, G: int, Q: int) -> "_Sizes":
        (B, T, _), H, C = zxbcdt_BTE.shape, bias_H.shape[0], weight_CK.shape[0]
        return cls(B, T, H, P, G, (C - H * P) // (2 * G), C, Q)

    @property
    def I(self) -> int:  # noqa: E743
        return self.H * self.P

    @property
    def chunks(self) -> int:
        return (self.T + self.Q - 1) // self.Q

    def columns(self, zxbcdt_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z as rows [R, I], x B C together [B, T, C], dt [B, T, H]: views."""
        z, xbc, dt = zxbcdt_BTE.split([self.I, self.C, self.H], -1)
        return z.flatten(0, 1), xbc, dt

    def heads(self, xbc_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, H, P], B and C [B, T, G, N]: views."""
        S = self.G * self.N
        x, B, C = xbc_BTC.split([self.I, S, S], -1)
        return x.unflatten(-1, (self.H, self.P)), B.unflatten(-1, (self.G, self.N)), C.unflatten(-1, (self.G, self.N))


@torch.library.custom_op("mambadsl::mamba2_core", mutates_args=())
def _op(
    zxbcdt_BTE: Tensor, weight_CK: Tensor, conv_bias_C: Optional[Tensor], dt_bias_H: Tensor, A_log_H: Tensor,
    D_H: Tensor, norm_I: Optional[Tensor], document_BT: Optional[Tensor], lengths_B: Optional[Tensor],
    head_dim: int, groups: int, chunk: int, keep: str, low: float, high: Optional[float], order: str,
    norm_groups: int, eps: float, by: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [B, T, I], and what is kept: y [B, T, H, P], rstd, step sizes, decays, states, conv's output;
    empty where not. by: whose kernels."""
    s = _Sizes.of(zxbcdt_BTE, weight_CK, dt_bias_H, head_dim, groups, chunk)
    scan, conv = kernels(by)
    with torch.cuda.device_of(zxbcdt_BTE):
        z_RI, xbc_BTC, dt_BTH = s.columns(zxbcdt_BTE)
        xbc_BTC = conv.forward(xbc_BTC, weight_CK, conv_bias_C, document_BT=document_BT)
        raw = steps.Steps(dt_BTH, A_log_H, dt_bias_H, lengths_B, low, high)
        inputs = Inputs(*s.heads(xbc_BTC), *steps.forward(raw, chunk=chunk), D_H, document_BT)
        y_BTHP, _, states = scan.forward(inputs, last=False)
        out_RI, rstd_RG = gate_norm_forward(
            y_BTHP.view(-1, s.I), z_RI, norm_I, order=order, groups=norm_groups, eps=eps
        )
    return out_RI.view(s.B, s.T, s.I), y_BTHP, rstd_RG, *_kept(keep, inputs, states, xbc_BTC)


def _kept(keep: str, inputs: Inputs, states: Tensor, xbc_BTC: Tensor) -> tuple[Tensor, ...]:
    """Step sizes, decays, states, conv's output; empty where not kept."""
    tensors = inputs.step_BcHQ, inputs.decay_BcHQ, states, xbc_BTC
    count = {"all": 4, "states": 3, "none": 0}[keep]
    return (*tensors[:count], *(t.new_empty(0) for t in tensors[count:]))


@_op.register_fake
def _(
    zxbcdt_BTE, weight_CK, conv_bias_C, dt_bias_H, A_log_H, D_H, norm_I, document_BT, lengths_B, head_dim, groups,
    chunk, keep, low, high, order, norm_groups, eps, by,
):
    s = _Sizes.of(zxbcdt_BTE, weight_CK, dt_bias_H, head_dim, groups, chunk)
    new, fp32 = zxbcdt_BTE.new_empty, torch.float32
    step = (s.B, s.chunks, s.H, s.Q) if keep != "none" else (0,)
    states = (s.B, s.chunks, s.H, s.P, s.N) if keep != "none" else (0,)
    xbc = (s.B, s.T, s.C) if keep == "all" else (0,)
    return (
        new(s.B, s.T, s.I), new(s.B, s.T, s.H, s.P), new(s.B * s.T, 0 if order == "none" else norm_groups, dtype=fp32),
        new(step, dtype=fp32), new(step, dtype=fp32), new(states), new(xbc),
    )


def _common_dtype(*tensors: Tensor) -> torch.dtype:
    dtypes = {t.dtype for t in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


@torch.library.custom_op("mambadsl::mamba2_core_backward", mutates_args=())
def _backward_op(
    dout_BTI: Tensor, y_BTHP: Tensor, rstd_RG: Tensor, step: Tensor, decay: Tensor, states: Tensor, xbc: Tensor,
    zxbcdt_BTE: Tensor, weight_CK: Tensor, conv_bias_C: Optional[Tensor], dt_bias_H: Tensor,
    A_log_H: Tensor, D_H: Tensor, norm_I: Optional[Tensor], document_BT: Optional[Tensor],
    lengths_B: Optional[Tensor], head_dim: int, groups: int, chunk: int, keep: str, low: float,
    high: Optional[float], order: str, norm_groups: int, eps: float, by: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of zxbcdt; of conv's weight and bias, flat; of A_log, dt_bias and D [3, H], in their dtype if it is
    one; of the norm's weight (empty without one)."""
    s = _Sizes.of(zxbcdt_BTE, weight_CK, dt_bias_H, head_dim, groups, chunk)
    scan, conv = kernels(by)
    with torch.cuda.device_of(zxbcdt_BTE):
        z_RI, xbc_in_BTC, dt_BTH = s.columns(zxbcdt_BTE)
        dzxbcdt_BTE = zxbcdt_BTE.new_empty(zxbcdt_BTE.shape)
        dz_RI, dxbc_in_BTC, ddt_BTH = s.columns(dzxbcdt_BTE)
        dy_RI, _, dnorm_I = gate_norm_backward(
            dout_BTI.contiguous().view(-1, s.I), y_BTHP.view(-1, s.I), z_RI, norm_I, rstd_RG, order=order,
            groups=norm_groups, eps=eps, dz=dz_RI,
        )
        raw = steps.Steps(dt_BTH, A_log_H, dt_bias_H, lengths_B, low, high)
        if keep != "all":
            xbc = conv.forward(xbc_in_BTC, weight_CK, conv_bias_C, document_BT=document_BT)
        kept = steps.forward(raw, chunk=chunk) if keep == "none" else (step, decay)
        inputs = Inputs(*s.heads(xbc), *kept, D_H, document_BT)
        if keep == "none":
            states, _ = scan.states_before(inputs, last=False)
        dxbc_BTC = torch.empty_like(xbc)
        dx, dB, dC = s.heads(dxbc_BTC)
        parts, _ = scan.backward(inputs, dy_RI.view_as(y_BTHP), states, dx=dx, dB=dB, dC=dC)
        dheads_3H = steps.backward(raw, parts, ddt=ddt_BTH, dtype=_common_dtype(A_log_H, dt_bias_H, D_H))
        _, dconv, _ = conv.backward(
            dxbc_BTC, xbc_in_BTC, weight_CK, conv_bias_C, document_BT=document_BT, dx=dxbc_in_BTC
        )
    return dzxbcdt_BTE, dconv, dheads_3H, y_BTHP.new_empty(0) if norm_I is None else dnorm_I


@_backward_op.register_fake
def _(
    dout_BTI, y_BTHP, rstd_RG, step, decay, states, xbc, zxbcdt_BTE, weight_CK, conv_bias_C, dt_bias_H, A_log_H, D_H,
    norm_I, document_BT, lengths_B, head_dim, groups, chunk, keep, low, high, order, norm_groups, eps, by,
):
    weights = weight_CK.numel() + (0 if conv_bias_C is None else conv_bias_C.numel())
    return (
        zxbcdt_BTE.new_empty(zxbcdt_BTE.shape), weight_CK.new_empty(weights),
        A_log_H.new_empty(3, A_log_H.shape[0], dtype=_common_dtype(A_log_H, dt_bias_H, D_H)),
        y_BTHP.new_empty(0) if norm_I is None else norm_I.new_empty(norm_I.shape),
    )


def _save(ctx, inputs, output):
    ctx.settings = inputs[9:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *inputs[:9])


def _backward(ctx, dout_BTI, *_):
    if dout_BTI is None:
        return (None,) * (9 + len(ctx.settings))
    saved = ctx.saved_tensors
    weight_CK, conv_bias_C, dt_bias_H, A_log_H, D_H, norm_I = saved[7:13]
    dzxbcdt_BTE, dconv, (dA_log_H, ddt_bias_H, dD_H), dnorm_I = _backward_op(dout_BTI, *saved, *ctx.settings)
    taps = weight_CK.numel()
    return (
        dzxbcdt_BTE, dconv[:taps].view_as(weight_CK), None if conv_bias_C is None else dconv[taps:],
        ddt_bias_H.to(dt_bias_H.dtype), dA_log_H.to(A_log_H.dtype), dD_H.to(D_H.dtype),
        None if norm_I is None else dnorm_I, None, None, *(None for _ in ctx.settings),
    )


_op.register_autograd(_backward, setup_context=_save)


def make_core(
    *, chunk: int | None = None, keep: str = "states", by: str = "triton"
) -> Callable[[Any, Tensor, Rows, dict[str, Any] | None], Tensor]:
    """The function of the slot `mamba2.core`.

    chunk: tokens that the kernels compute together, a power of two (None: as suits the layer). keep: one of KEEP, from
    most memory and least time to least memory. by: whose kernels, one of MODULES. None of them changes the result.
    ValueError for other values.
    """
    for name, given, legal in ("keep", keep, KEEP), ("by", by, tuple(MODULES)):
        if given not in legal:
            raise ValueError(f"{name} must be one of {', '.join(legal)}, not {given!r}")
    if chunk is not None:
        chunk_length(chunk, chunk, of=by)

    def core(layer: Any, zxbcdt_BTE: Tensor, rows: Rows, state: dict[str, Any] | None) -> Tensor:
        if state is not None:
            return module.core(layer, zxbcdt_BTE, rows, state)
        f = layer.f
        low, high = f.dt_limit
        Q = chunk_length(f.chunk, chunk, of=by, dtype=zxbcdt_BTE.dtype)
        out_BTI, *_ = _op(
            zxbcdt_BTE.contiguous(), layer.conv.weight, layer.conv.bias, layer.dt_bias, layer.A_log, layer.D,
            None if f.gated_norm == "none" else layer.gate_norm.weight, documents(rows.segments_BT),
            rows.lengths_B, f.head_dim, f.groups, Q, keep, float(low),
            None if high is None else float(high), f.gated_norm, f.norm_groups, f.norm_eps, by,
        )
        return out_BTI

    return core
