"""The SSD scan by mamba_ssm's Triton kernels: forward, and backward with the gradients written where they belong.

In: x, B and C (slices of wider rows are fine), step sizes in chunks (`steps.py`), documents counted from 0; out: y
and the states. Refuses (ValueError) tensors whose element offsets would not fit the kernels' 32 bits: they would
read and write elsewhere without a word. dtypes: float32, bfloat16, float16; sums in float32. What
chunks hand each other is kept in the dtype of x (and passed on in float32): half the bytes of the package's own way.

Letters: B batch, T time, H heads, P head_dim, N d_state, G groups, c chunks, Q tokens of a chunk, t tiles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mambadsl.parts.mamba_ssm.launch import launch, processors, smallest, strides
from mambadsl.parts.mamba_ssm.load import triton_kernels
from mambadsl.parts.triton.ssd.scan import Inputs
from mambadsl.parts.triton.ssd.steps import DecayParts

#: The kernels' element offsets are 32-bit integers.
OFFSETS = 2**31


def check_offsets(**elements: int) -> None:
    """ValueError for tensors that are too large for the kernels."""
    for name, count in elements.items():
        if count >= OFFSETS:
            raise ValueError(
                f"mamba_ssm's kernels count elements in 32 bits: {name} has {count:,}, the limit is {OFFSETS - 1:,}; "
                "use a smaller batch or shorter rows"
            )


def forward(i: Inputs, state_BHPN: Tensor | None = None, *, last: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """y [B, T, H, P] in the dtype of x; the state after the last token, float32, if `last`; the states before each
    chunk, [B, c, H, P, N] in the dtype of x."""
    before_BcHPN, last_BHPN = states_before(i, state_BHPN, last=last)
    y_BTHP, _ = triton_kernels().scan._chunk_scan_fwd(
        chunk_scores(i), i.x_BTHP, i.step_BHcQ, i.decay_BHcQ, i.C_BTGN, before_BcHPN, D=i.D_H, seq_idx=i.document_BT
    )
    return y_BTHP, last_BHPN, before_BcHPN


def states_before(
    i: Inputs, state_BHPN: Tensor | None = None, *, last: bool
) -> tuple[Tensor, Tensor | None]:
    """The states before each chunk, in the dtype of x, and the one after the last, float32, if `last`."""
    kernels, N = triton_kernels(), i.B_BTGN.shape[-1]
    B, T, H, P = i.x_BTHP.shape
    check_offsets(
        x=B * i.x_BTHP.stride(0), states=B * i.step_BHcQ.shape[2] * H * P * N,
        scores=B * i.step_BHcQ.shape[2] * i.B_BTGN.shape[2] * i.step_BHcQ.shape[3] ** 2, steps=i.step_BHcQ.numel(),
    )
    added_BcHPN = kernels.state._chunk_state_fwd(
        i.B_BTGN, i.x_BTHP, i.step_BHcQ, i.decay_BHcQ, seq_idx=i.document_BT, states_in_fp32=False
    )
    before, after = kernels.passing._state_passing_fwd(
        added_BcHPN.flatten(-2), i.decay_BHcQ[..., -1],
        initial_states=None if state_BHPN is None else state_BHPN.flatten(-2),
        seq_idx=i.document_BT, chunk_size=i.step_BHcQ.shape[-1], out_dtype=i.x_BTHP.dtype,
    )
    return before.unflatten(-1, (P, N)), after.unflatten(-1, (P, N)) if last else None


def chunk_scores(i: Inputs) -> Tensor:
    """C_i . B_j of each chunk and group, 0 across documents; only j <= i is computed. [B, c, G, Q, Q] float32"""
    return triton_kernels().bmm._bmm_chunk_fwd(
        i.C_BTGN, i.B_BTGN, i.step_BHcQ.shape[-1], seq_idx=i.document_BT, causal=True, output_dtype=torch.float32
    )


def backward(
    i: Inputs, dy_BTHP: Tensor, before_BcHPN: Tensor, dlast_BHPN: Tensor | None = None, *,
    dx: Tensor, dB: Tensor, dC: Tensor, wants_dstate: bool = False,
) -> tuple[DecayParts, Tensor | None]:
    """Writes the gradients of x, B and C; returns those of the decays in parts, and of the first state (float32)."""
    scores = chunk_scores(i)
    dafter_BcHPN, across, dstate_BHPN = _states_backward(i, dy_BTHP, before_BcHPN, dlast_BHPN, wants_dstate)
    step, dD = _dx(i, dy_BTHP, scores, dafter_BcHPN, dx)
    dB_BTGN, after = _db(i, dafter_BcHPN)
    dC_BTGN, before = _dc(i, dy_BTHP, before_BcHPN)
    dscores = _dscores(i, dy_BTHP)
    bmm = triton_kernels().bmm._bmm_chunk_bwd
    bmm(i.C_BTGN, dscores, residual=dB_BTGN, out=dB)
    bmm(i.B_BTGN, dscores.transpose(-1, -2), residual=dC_BTGN, out=dC)
    return DecayParts(step, after, before, _inside(i, dy_BTHP, scores), across, dD), dstate_BHPN


def _states_backward(i, dy_BTHP, before_BcHPN, dlast_BHPN, wants_dstate):
    """Gradients of the states after each chunk, in the dtype of x; of whole chunks' decays; of the first state."""
    kernels = triton_kernels()
    B, c, H, P, N = before_BcHPN.shape
    direct = kernels.scan._chunk_scan_bwd_dstates(
        i.C_BTGN, i.decay_BHcQ, dy_BTHP, seq_idx=i.document_BT, dtype=dy_BTHP.dtype
    ).flatten(-2)
    before = before_BcHPN.flatten(-2)
    dafter = torch.empty_like(direct)
    dstate = i.step_BHcQ.new_empty(B, H, P * N) if wants_dstate else None
    dlast = None if dlast_BHPN is None else dlast_BHPN.flatten(-2)
    kernel = kernels.passing._state_passing_bwd_kernel
    across = i.step_BHcQ.new_empty(B, c, H, math.ceil(P * N / smallest(kernel, "BLOCK_SIZE")))
    document, has_documents = i.document_BT, i.document_BT is not None
    sizes = launch(
        kernel, lambda block: (math.ceil(P * N / block["BLOCK_SIZE"]), B, H),
        dout_ptr=direct, out_ptr=before, dA_cs_ptr=i.decay_BHcQ[..., -1], dfinal_states_ptr=dlast,
        seq_idx_ptr=document, dstates_ptr=dafter, ddA_cs_ptr=across, dinitstates_ptr=dstate,
        states_converted_ptr=None, dim=P * N, nchunks=c, seqlen=dy_BTHP.shape[1], chunk_size=i.decay_BHcQ.shape[-1],
        **strides(direct, *_names("dout", "batch chunk head dim")),
        **strides(before, *_names("out", "batch chunk head dim")),
        **strides(i.decay_BHcQ[..., -1], *_names("dA_cs", "batch head chunk")),
        **strides(dlast, *_names("dfinal_states", "batch head dim")),
        **strides(document, *_names("seq_idx", "batch seqlen")),
        **strides(dafter, *_names("dstates", "batch chunk head dim")),
        **strides(across[..., 0], *_names("ddA_cs", "batch chunk head")),
        **strides(dstate, *_names("dinitstates", "batch head dim")),
        CONVERT_STATES=False, HAS_DFINAL_STATES=dlast is not None, HAS_DINITSTATES=wants_dstate,
        HAS_SEQ_IDX=has_documents,
    )
    across = across[..., : math.ceil(P * N / sizes["BLOCK_SIZE"])]
    return dafter.unflatten(-1, (P, N)), across, None if dstate is None else dstate.unflatten(-1, (P, N))


def _dx(i, dy_BTHP, scores, dafter_BcHPN, dx):
    kernel = triton_kernels().combined._chunk_scan_chunk_state_bwd_dx_kernel
    (B, T, H, P), (G, N), (c, Q) = i.x_BTHP.shape, i.B_BTGN.shape[2:], i.step_BHcQ.shape[2:]
    rows = math.ceil(Q / smallest(kernel, "BLOCK_SIZE_M"))
    columns = math.ceil(P / smallest(kernel, "BLOCK_SIZE_N"))
    step = i.step_BHcQ.new_empty(columns, B, c, H, Q)
    dD = i.step_BHcQ.new_empty(rows, columns, B, c, H)
    sizes = launch(
        kernel, lambda b: (math.ceil(Q / b["BLOCK_SIZE_M"]) * math.ceil(P / b["BLOCK_SIZE_N"]), B * c, H),
        x_ptr=i.x_BTHP, cb_ptr=scores, dout_ptr=dy_BTHP, dt_ptr=i.step_BHcQ, dA_cumsum_ptr=i.decay_BHcQ,
        seq_idx_ptr=i.document_BT, D_ptr=i.D_H, b_ptr=i.B_BTGN, dstates_ptr=dafter_BcHPN, dx_ptr=dx, ddt_ptr=step,
        dD_ptr=dD, chunk_size=Q, hdim=P, dstate=N, batch=B, seqlen=T, nheads_ngroups_ratio=H // G,
        **strides(i.x_BTHP, *_names("x", "batch seqlen head hdim")),
        **strides(scores, *_names("cb", "batch chunk head csize_k csize_m")),
        **strides(dy_BTHP, *_names("dout", "batch seqlen head hdim")), **_step_strides(i),
        stride_D_head=i.D_H.stride(0),
        **strides(i.B_BTGN, *_names("b", "batch seqlen head dstate")),
        **strides(dafter_BcHPN, *_names("dstates", "batch chunk head hdim dstate")),
        **strides(dx, *_names("dx", "batch seqlen head hdim")),
        **strides(step, *_names("ddt", "tile batch chunk head csize")),
        **strides(dD, *_names("dD", "csize hdim batch chunk head")),
        HAS_D=True, D_HAS_HDIM=False, HAS_SEQ_IDX=i.document_BT is not None, BLOCK_SIZE_DSTATE=_block(N),
        IS_TRITON_22=True, DETERMINISTIC_REDUCTION=True,
    )
    rows = math.ceil(Q / sizes["BLOCK_SIZE_M"])
    columns = math.ceil(P / sizes["BLOCK_SIZE_N"])
    return step[:columns], dD[:rows, 0] if columns == 1 else dD[:rows, :columns].flatten(0, 1)


def _db(i, dafter_BcHPN):
    """dB but for the scores' part, float32, and the decays after a token."""
    kernel = triton_kernels().state._chunk_state_bwd_db_kernel
    (B, T, H, P), (G, N), (c, Q) = i.x_BTHP.shape, i.B_BTGN.shape[2:], i.step_BHcQ.shape[2:]
    heads, splits = _splits(i)
    check_offsets(dB=B * T * splits * G * N)
    dB = i.step_BHcQ.new_empty(B, T, splits, G, N)
    after = i.step_BHcQ.new_empty(math.ceil(N / smallest(kernel, "BLOCK_SIZE_N")), B, c, H, Q)
    sizes = launch(
        kernel, lambda b: (math.ceil(Q / b["BLOCK_SIZE_M"]) * math.ceil(N / b["BLOCK_SIZE_N"]), B * c, splits * G),
        x_ptr=i.x_BTHP, dstates_ptr=dafter_BcHPN, b_ptr=i.B_BTGN, dt_ptr=i.step_BHcQ, dA_cumsum_ptr=i.decay_BHcQ,
        seq_idx_ptr=i.document_BT, db_ptr=dB, ddA_cumsum_ptr=after, chunk_size=Q, dstate=N, hdim=P, batch=B, seqlen=T,
        nheads=H, nheads_per_program=heads, ngroups=G,
        **strides(i.x_BTHP, *_names("x", "batch seqlen head hdim")),
        **strides(dafter_BcHPN[..., 0, 0], *_names("dstates", "batch chunk"), "states_head"),
        **strides(dafter_BcHPN[0, 0, 0], *_names("states", "hdim dstate")),
        **strides(i.B_BTGN, *_names("b", "batch seqlen head dstate")), **_step_strides(i),
        **strides(dB, *_names("db", "batch seqlen split group dstate")),
        **strides(after[0], *_names("ddA_cs", "batch chunk head csize")), stride_ddA_tile=after.stride(0),
        HAS_DDA_CS=True, HAS_SEQ_IDX=i.document_BT is not None, DETERMINISTIC_REDUCTION=True, BLOCK_SIZE_K=_block(P),
    )
    return _joined(dB), after[: math.ceil(N / sizes["BLOCK_SIZE_N"])]


def _dc(i, dy_BTHP, before_BcHPN):
    """dC but for the scores' part, float32, and the decays before a token."""
    kernel = triton_kernels().scan._chunk_scan_bwd_dc_kernel
    (B, T, H, P), (G, N), (c, Q) = i.x_BTHP.shape, i.B_BTGN.shape[2:], i.step_BHcQ.shape[2:]
    heads, splits = _splits(i)
    dC = i.step_BHcQ.new_empty(B, T, splits, G, N)
    before = i.step_BHcQ.new_empty(math.ceil(N / smallest(kernel, "BLOCK_SIZE_N")), B, c, H, Q)
    sizes = launch(
        kernel, lambda b: (math.ceil(Q / b["BLOCK_SIZE_M"]) * math.ceil(N / b["BLOCK_SIZE_N"]), B * c, splits * G),
        dout_ptr=dy_BTHP, prev_states_ptr=before_BcHPN, C_ptr=i.C_BTGN, dA_cumsum_ptr=i.decay_BHcQ,
        seq_idx_ptr=i.document_BT, dc_ptr=dC, ddA_cumsum_ptr=before, chunk_size=Q, dstate=N, hdim=P, batch=B,
        seqlen=T, nheads=H, nheads_per_program=heads, ngroups=G,
        **strides(dy_BTHP, *_names("dout", "batch seqlen head hdim")),
        **strides(before_BcHPN, *_names("prev_states", "batch chunk head hdim dstate")),
        **strides(i.C_BTGN, *_names("C", "batch seqlen head dstate")),
        **{name: n for name, n in _step_strides(i).items() if not name.startswith("stride_dt_")},
        **strides(dC, *_names("dc", "batch seqlen split group dstate")),
        **strides(before[0], *_names("ddA_cs", "batch chunk head csize")), stride_ddA_tile=before.stride(0),
        HAS_DDA_CS=True, HAS_SEQ_IDX=i.document_BT is not None, DETERMINISTIC_REDUCTION=True, BLOCK_SIZE_K=_block(P),
    )
    return _joined(dC), before[: math.ceil(N / sizes["BLOCK_SIZE_N"])]


def _dscores(i, dy_BTHP):
    """[B, c, G, Q, Q] float32, 0 above the diagonal and across documents."""
    kernel = triton_kernels().scan._chunk_scan_bwd_dcb_kernel
    (B, T, H, P), G, (c, Q) = i.x_BTHP.shape, i.B_BTGN.shape[2], i.step_BHcQ.shape[2:]
    heads, splits = _splits(i)
    check_offsets(scores=B * c * splits * G * Q * Q)
    dscores = i.step_BHcQ.new_empty(B, c, splits, G, Q, Q)
    launch(
        kernel, lambda b: (math.ceil(Q / b["BLOCK_SIZE_M"]) * math.ceil(Q / b["BLOCK_SIZE_N"]), B * c, splits * G),
        x_ptr=i.x_BTHP, dout_ptr=dy_BTHP, cb_ptr=None, dt_ptr=i.step_BHcQ, dA_cumsum_ptr=i.decay_BHcQ,
        seq_idx_ptr=i.document_BT, dcb_ptr=dscores, ddA_cumsum_ptr=None, chunk_size=Q, hdim=P, batch=B, seqlen=T,
        nheads=H, nheads_per_program=heads, ngroups=G,
        **strides(i.x_BTHP, *_names("x", "batch seqlen head hdim")),
        **strides(dy_BTHP, *_names("dout", "batch seqlen head hdim")),
        **strides(None, *_names("cb", "batch chunk head csize_m csize_n")), **_step_strides(i),
        **strides(dscores, *_names("dcb", "batch chunk split group csize_m csize_n")),
        **strides(None, *_names("ddA_cs", "batch chunk head csize_m csize_n")),
        HAS_DDA_CS=False, HAS_SEQ_IDX=i.document_BT is not None, BLOCK_SIZE_K=_block(P),
    )
    return _joined(dscores)


def _inside(i, dy_BTHP, scores):
    """Decays between pairs of a chunk."""
    kernel = triton_kernels().scan._chunk_scan_bwd_ddAcs_stable_kernel
    (B, T, H, P), G, (c, Q) = i.x_BTHP.shape, i.B_BTGN.shape[2], i.step_BHcQ.shape[2:]
    inside = i.step_BHcQ.new_empty(math.ceil(Q / smallest(kernel, "BLOCK_SIZE_M")), B, c, H, Q)
    sizes = launch(
        kernel, lambda b: (math.ceil(Q / b["BLOCK_SIZE_M"]), B * c, H),
        x_ptr=i.x_BTHP, dout_ptr=dy_BTHP, dt_ptr=i.step_BHcQ, dA_cumsum_ptr=i.decay_BHcQ, cb_ptr=scores,
        ddA_cumsum_ptr=inside, chunk_size=Q, hdim=P, batch=B, seqlen=T, nheads_ngroups_ratio=H // G,
        **strides(i.x_BTHP, *_names("x", "batch seqlen head hdim")),
        **strides(dy_BTHP, *_names("dout", "batch seqlen head hdim")),
        **{name: n for name, n in _step_strides(i).items() if not name.startswith("stride_seq_idx_")},
        **strides(scores, *_names("cb", "batch chunk head csize_m csize_n")),
        **strides(inside, *_names("ddA_cs", "csize_m batch chunk head csize_n")), BLOCK_SIZE_K=_block(P),
    )
    return inside[: math.ceil(Q / sizes["BLOCK_SIZE_M"])]


def _step_strides(i: Inputs) -> dict[str, int]:
    return {
        **strides(i.step_BHcQ, *_names("dt", "batch head chunk csize")),
        **strides(i.decay_BHcQ, *_names("dA_cs", "batch head chunk csize")),
        **strides(i.document_BT, *_names("seq_idx", "batch seqlen")),
    }


def _splits(i: Inputs) -> tuple[int, int]:
    """Heads that a program adds up, and in how many pieces a group's heads are cut: enough to fill the GPU."""
    (B, H, c, _), G = i.step_BHcQ.shape, i.B_BTGN.shape[2]
    heads = max(1, min(H // G, math.ceil(B * c * H / processors(i.x_BTHP.device))))
    return heads, math.ceil(H // G / heads)


def _joined(split: Tensor) -> Tensor:
    """The sum over dim 2; a view where it has one element."""
    return split.squeeze(2) if split.shape[2] == 1 else split.sum(2)


def _block(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _names(tensor: str, dims: str) -> list[str]:
    return [f"{tensor}_{dim}" for dim in dims.split()]
