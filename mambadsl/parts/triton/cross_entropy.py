"""The head's matrix product and the cross entropy in one op that never holds all logits.

In: the head's input and weight, and targets, on a GPU; out: the loss. The gradients are made in the forward:
for each chunk of rows cuBLAS makes the logits, a Triton kernel turns them into losses and, in place, into their
gradients, and cuBLAS multiplies those back. The backward only scales by the gradient that comes in. Refuses
(ValueError) shapes that do not fit together; a target of V or more makes the loss NaN.

The gradients kept are those of the sum: dividing by the count before the products would push float16's
small probabilities out of its range, and bfloat16 and float32 do not care.

Letters: B batch, T time, D d_model, V vocab, R rows (B * T), Q rows of a chunk.
"""

from collections.abc import Callable
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Logits of a chunk at most: enough rows for full-speed products, little memory.
CHUNK_BYTES = 2**30
#: One or two chunks add up dW in the weight's dtype; more would round too often and use float32.
ROUNDED_CHUNKS = 2
#: Columns of a step at most, and how: two programs of a multiprocessor leave their rows in the L2 for the second pass.
LAUNCH = {"BLOCK": 8192, "STAGES": 3, "num_warps": 16, "maxnreg": 64}
#: Elements of a gradient that one program scales.
SCALED = 8192


@triton.jit
def _logits(raw, multiplier, softcap, SOFTCAP: tl.constexpr):
    logits = raw.to(tl.float32) * multiplier
    if SOFTCAP:
        logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)  # tanh
    return tl.where(raw == float("-inf"), raw.to(tl.float32), logits)


@triton.jit
def _loss_kernel(
    logits_ptr, target_ptr, loss_ptr, multiplier, softcap,
    V: tl.constexpr, ROW: tl.constexpr, SOFTCAP: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    OUT: tl.constexpr = float("-inf")
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * ROW
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < V)
    # Before the first reduction, whose barrier keeps the second pass from overwriting it.
    aim = _logits(tl.load(row_ptr + target, mask=known, other=0.0), multiplier, softcap, SOFTCAP)

    top = float("-inf")
    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        logits = _logits(tl.load(row_ptr + column, mask=column < ROW, other=OUT), multiplier, softcap, SOFTCAP)
        higher = tl.maximum(top, tl.max(logits, 0))
        sums = sums * tl.exp(top - higher) + tl.exp(logits - higher)
        top = higher
    target = target.to(tl.int32)
    log_sum = top + tl.log(tl.sum(sums, 0))
    tl.store(loss_ptr + row, tl.where(target < 0, 0.0, tl.where(known, log_sum - aim, float("nan"))))

    if GRAD:
        for start in tl.range(0, V, BLOCK, num_stages=STAGES):
            column = start + tl.arange(0, BLOCK)
            logits = _logits(tl.load(row_ptr + column, mask=column < ROW, other=OUT), multiplier, softcap, SOFTCAP)
            grad = (tl.exp(logits - log_sum) - tl.where(column == target, 1.0, 0.0)) * multiplier
            if SOFTCAP:
                grad = grad * (1.0 - (logits / softcap) * (logits / softcap))
            grad = tl.where(target < 0, 0.0, grad)
            tl.store(row_ptr + column, grad.to(logits_ptr.dtype.element_ty), mask=column < ROW)


def losses(
    logits_QV: Tensor, targets_Q: Tensor, losses_Q: Tensor, *, multiplier: float = 1.0, softcap: float | None = None,
    grad: bool = True, launch: dict[str, int] = LAUNCH,
) -> None:
    """Writes each row's loss, 0 where the target is negative; with `grad`, its gradient over the logits.

    Rows are read and written up to their stride, so that vocabularies of odd size still move in whole vectors.
    What lies behind a row must be -inf, and is overwritten.
    """
    Q, V = logits_QV.shape
    if V < launch["BLOCK"]:
        block = triton.next_power_of_2(V)
        launch = {**launch, "BLOCK": block, "num_warps": min(launch["num_warps"], max(1, block // 256))}
    if Q:
        with torch.cuda.device_of(logits_QV):
            _loss_kernel[Q,](
                logits_QV, targets_Q, losses_Q, multiplier, softcap or 1.0,
                V=V, ROW=logits_QV.stride(0), SOFTCAP=softcap is not None, GRAD=grad, **launch,
            )


@torch.library.custom_op("mambadsl::linear_cross_entropy", mutates_args=())
def _op(
    x_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, chunks: int, softcap: Optional[float], multiplier: float,
    grad_x: bool, grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (R, D), V = x_RD.shape, weight_VD.shape[0]
    losses_R = x_RD.new_empty(R, dtype=torch.float32)
    dx_RD = x_RD.new_empty((R, D) if grad_x else 0)
    dweight_VD = _Sum(weight_VD, chunks) if grad_weight else None
    Q = chunk_rows(R, chunks)
    # Rows start at multiples of 64 elements whatever the vocabulary, as cuBLAS and vector loads like it.
    logits_QV = x_RD.new_empty(min(Q, R), triton.cdiv(V, 64) * 64)
    behind, logits_QV = logits_QV[:, V:], logits_QV[:, :V]
    for first in range(0, R, Q):
        x_QD = x_RD[first:first + Q]
        chunk_QV = logits_QV[:len(x_QD)]
        torch.mm(x_QD, weight_VD.T, out=chunk_QV)
        if behind.numel():
            behind.fill_(float("-inf"))
        losses(
            chunk_QV, targets_R[first:first + Q], losses_R[first:first + Q],
            multiplier=multiplier, softcap=softcap, grad=grad_x or grad_weight,
        )
        if grad_x:
            torch.mm(chunk_QV, weight_VD, out=dx_RD[first:first + Q])
        if grad_weight:
            dweight_VD.add(chunk_QV.T, x_QD)
    dweight_VD = dweight_VD.result() if grad_weight else weight_VD.new_empty(0)
    return losses_R.sum(), (targets_R >= 0).sum(), dx_RD, dweight_VD


@_op.register_fake
def _(x_RD, weight_VD, targets_R, chunks, softcap, multiplier, grad_x, grad_weight):
    return (
        x_RD.new_empty((), dtype=torch.float32), x_RD.new_empty((), dtype=torch.int64),
        x_RD.new_empty(x_RD.shape if grad_x else 0), weight_VD.new_empty(weight_VD.shape if grad_weight else 0),
    )


def _save(ctx, inputs, output):
    _, count, dx_RD, dweight_VD = output
    ctx.mark_non_differentiable(count, dx_RD, dweight_VD)
    ctx.set_materialize_grads(False)  # Else zeros as large as dweight for those three.
    ctx.grad_x, ctx.grad_weight = inputs[-2:]
    ctx.save_for_backward(dx_RD, dweight_VD)


def _backward(ctx, dtotal, *_):
    # Not in place: a graph that is kept may come here twice, and autograd takes over a fresh tensor uncopied.
    dx_RD, dweight_VD = _scale_op(*ctx.saved_tensors, dtotal)
    return dx_RD if ctx.grad_x else None, dweight_VD if ctx.grad_weight else None, *[None] * 6


_op.register_autograd(_backward, setup_context=_save)


@triton.jit
def _scale_kernel(a_ptr, b_ptr, a_out, b_out, factor_ptr, a_size, b_size, a_programs, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    factor = tl.load(factor_ptr).to(tl.float32)
    if program < a_programs:
        place = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        scaled = tl.load(a_ptr + place, mask=place < a_size, eviction_policy="evict_first").to(tl.float32) * factor
        tl.store(a_out + place, scaled.to(a_out.dtype.element_ty), mask=place < a_size)
    else:
        place = (program - a_programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        scaled = tl.load(b_ptr + place, mask=place < b_size, eviction_policy="evict_first").to(tl.float32) * factor
        tl.store(b_out + place, scaled.to(b_out.dtype.element_ty), mask=place < b_size)


@torch.library.custom_op("mambadsl::scale_two", mutates_args=())
def _scale_op(a: Tensor, b: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) times a scalar on the device, in float32, in one pass at the memory's speed: torch's product with a
    scalar tensor of another dtype moves one element at a time, and rounds the scalar first."""
    a, b = a.contiguous(), b.contiguous()
    out = torch.empty_like(a), torch.empty_like(b)
    programs = [triton.cdiv(t.numel(), SCALED) for t in (a, b)]
    if sum(programs):
        with torch.cuda.device_of(a):
            _scale_kernel[sum(programs),](
                a, b, *out, factor, a.numel(), b.numel(), programs[0], BLOCK=SCALED, num_warps=8
            )
    return out


@_scale_op.register_fake
def _(a, b, factor):
    return a.new_empty(a.shape), b.new_empty(b.shape)


class _Sum:
    """The sum over chunks of dlogits^T x: in the weight's dtype for few chunks, else in float32."""

    def __init__(self, like_VD: Tensor, chunks: int):
        dtype = like_VD.dtype if chunks <= ROUNDED_CHUNKS else torch.float32
        self.sum_VD, self.dtype, self.empty = torch.empty_like(like_VD, dtype=dtype), like_VD.dtype, True

    def add(self, dlogits_VQ: Tensor, x_QD: Tensor) -> None:
        sum_VD, wide = self.sum_VD, self.sum_VD.dtype != x_QD.dtype
        if wide and not x_QD.is_cuda:  # Torch widens inside a product on GPUs only.
            dlogits_VQ, x_QD, wide = dlogits_VQ.float(), x_QD.float(), False
        match self.empty, wide:
            case True, False:
                torch.mm(dlogits_VQ, x_QD, out=sum_VD)
            case True, True:
                torch.ops.aten.mm.dtype_out(dlogits_VQ, x_QD, sum_VD.dtype, out=sum_VD)
            case False, False:
                sum_VD.addmm_(dlogits_VQ, x_QD)
            case False, True:
                torch.ops.aten.addmm.dtype_out(sum_VD, dlogits_VQ, x_QD, sum_VD.dtype, out=sum_VD)
        self.empty = False

    def result(self) -> Tensor:
        return self.sum_VD.zero_() if self.empty else self.sum_VD.to(self.dtype)


def chunk_rows(rows: int, chunks: int) -> int:
    """Rows of a chunk: a multiple of 128 unless one chunk holds all."""
    return max(1, rows) if chunks == 1 else triton.cdiv(max(1, rows), chunks * 128) * 128


def linear_cross_entropy(
    x_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, *, chunks: int, softcap: float | None, multiplier: float
) -> tuple[Tensor, Tensor]:
    """(Sum over the rows that count of their cross entropy, float32; how many count, int64), both scalars.

    The logits are multiplier * x weight^T, then softcap * tanh(logits / softcap). targets_R: int64, negative
    where nothing counts. Makes gradients only where autograd will ask for them.
    """
    (R, D), V = x_RD.shape, weight_VD.shape[0]
    if weight_VD.shape != (V, D) or targets_R.shape != (R,) or x_RD.dtype != weight_VD.dtype or chunks < 1:
        raise ValueError(
            "the loss takes x [R, D] and weight [V, D] of one dtype, targets [R] and at least one chunk, not "
            f"{list(x_RD.shape)} {x_RD.dtype}, {list(weight_VD.shape)} {weight_VD.dtype}, "
            f"{list(targets_R.shape)}, {chunks} chunks"
        )
    grads = [torch.is_grad_enabled() and t.requires_grad for t in (x_RD, weight_VD)]
    total, count, _, _ = _op(
        x_RD.contiguous(), weight_VD, targets_R.long().contiguous(), chunks, softcap, float(multiplier), *grads
    )
    return total, count


def make_loss(*, chunks: int | None = None) -> Callable[..., Tensor]:
    """loss(x_BTD, weight_VD, targets_BT, *, multiplier, softcap) -> mean cross entropy of the tokens that count,
    a float32 scalar, 0 where none does. chunks: default, as many as keep a chunk's logits in CHUNK_BYTES."""

    def loss(
        x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, *, multiplier: float = 1.0, softcap: float | None = None
    ) -> Tensor:
        x_RD = x_BTD.flatten(0, -2).to(weight_VD.dtype)
        logits_bytes = x_RD.shape[0] * weight_VD.shape[0] * weight_VD.element_size()
        total, count = linear_cross_entropy(
            x_RD, weight_VD, targets_BT.flatten(), chunks=chunks or max(1, -(-logits_bytes // CHUNK_BYTES)),
            softcap=softcap, multiplier=multiplier,
        )
        return total / count.clamp_min(1)

    return loss
