"""Mamba-3 in torch. For each head, with r = 1, ... R inputs x_r and outputs y_r (of one: x_1 = x, y = y_1),

    S_t = a_t S_{t-1} + a_t (1 - l_t) dt_t sum_r x_{t-1,r} k_{t-1,r}^T + l_t dt_t sum_r x_{t,r} k_{t,r}^T
    y_{t,r} = S_t q_{t,r} + D x_{t,r}        a_t = exp(A_t dt_t)        l_t = sigmoid(trap_t)

k and q are B and C, normed, shifted by a bias of each head, and turned pair by pair through the sum of
pi tanh(angle) dt so far. Results match mamba_ssm's Mamba3 (several inputs: with each pair's two channels side by side,
where that pairs n with n + N / 2). Letters: B batch, T time, D d_model, H heads, P head_dim, I = H * P, N d_state,
G groups, R rank, A angles, E channels of in_proj, c chunks, Q tokens of a chunk, X = Q * R.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.chunks import LONGEST_CHUNK, LOWEST_LOG_DECAY, decay, in_chunks, masks, running_sums
from mambadsl.kinds.gate_norm import gate_norm
from mambadsl.kinds.mamba3.kind import KIND, in_segments
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.norm import rms_norm
from mambadsl.kinds.rows import Rows, starts
from mambadsl.kinds.tokens import Tokens

TURN = 2 * math.pi


def trapezoidal_scan(
    x_BTHRP: Tensor, k_BTHRN: Tensor, q_BTHRN: Tensor, log_decay_BTH: Tensor, now_BTH: Tensor, later_BTH: Tensor, *,
    chunk: int, segments_BT: Tensor | None = None, state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan S_t = exp(log_decay_t) (S_{t-1} + later_{t-1} sum_r x_{t-1,r} k_{t-1,r}^T) + now_t sum_r x_{t,r}
    k_{t,r}^T, y_{t,r} = S_t q_{t,r}, in float32: y_BTHRP, and S after the last token with its `later` part in it.

    S starts from `state_BHPN`, that part in it too (zeros where None), and from zeros at every later document of a row.
    log_decay: at most 0; all three 0 at padding, later 0 at the last token of a document. A token is read by itself
    with the weight `now`, by later ones with now + later: one matrix of weights inside a chunk, as for Mamba-2.
    """
    T, R = x_BTHRP.shape[1], x_BTHRP.shape[3]
    Q = min(chunk, T, LONGEST_CHUNK)

    def of_heads(t_BTHRP: Tensor) -> Tensor:
        """[B, c, H, X, ...]"""
        return in_chunks(t_BTHRP.float(), Q).transpose(2, 3).flatten(3, 4)

    def by_token(t_BcHQ: Tensor) -> Tensor:
        """The same for all inputs of a token, [B, c, H, X, 1]."""
        return t_BcHQ.repeat_interleave(R, -1)[..., None]

    document_BcQ = None if segments_BT is None else in_chunks(starts(segments_BT), Q).cumsum(2)
    sees_BcQQ, whole_BcQ, last_BcQ = masks(document_BcQ, Q, x_BTHRP.device)
    log_decay_BcQH = in_chunks(log_decay_BTH.float().clamp_min(LOWEST_LOG_DECAY), Q)
    log_decay_BcHQ = running_sums(log_decay_BcQH, document_BcQ).transpose(2, 3)
    now_BcHQ, later_BcHQ = (in_chunks(t.float(), Q).transpose(2, 3) for t in (now_BTH, later_BTH))
    x_BcHXP, k_BcHXN, q_BcHXN = of_heads(x_BTHRP), of_heads(k_BTHRN), of_heads(q_BTHRN)

    # Where j > i the exponent would be positive: there it is clamped and the pair counts 0.
    decay_BcHQQ = decay(log_decay_BcHQ[..., :, None] - log_decay_BcHQ[..., None, :])
    both_BcHQ = now_BcHQ + later_BcHQ
    weight_BcHQQ = (decay_BcHQQ * sees_BcQQ[:, :, None] * both_BcHQ[..., None, :]).tril(-1) + now_BcHQ.diag_embed()
    weight_BcHXX = weight_BcHQQ.repeat_interleave(R, -1).repeat_interleave(R, -2)
    y_BcHXP = ((q_BcHXN @ k_BcHXN.transpose(-1, -2)) * weight_BcHXX) @ x_BcHXP

    to_end_BcHQ = both_BcHQ * decay(log_decay_BcHQ[..., -1:] - log_decay_BcHQ)
    from_start_BcHQ = log_decay_BcHQ.exp()
    if document_BcQ is not None:
        from_start_BcHQ, to_end_BcHQ = from_start_BcHQ * whole_BcQ[:, :, None], to_end_BcHQ * last_BcQ[:, :, None]
    added_BcHPN = (x_BcHXP * by_token(to_end_BcHQ)).transpose(-1, -2) @ k_BcHXN

    state_BHPN = torch.zeros_like(added_BcHPN[:, 0]) if state_BHPN is None else state_BHPN.float()
    before = []
    for kept_BH11, added_BHPN in zip(from_start_BcHQ[..., -1:, None].unbind(1), added_BcHPN.unbind(1)):
        before.append(state_BHPN)
        state_BHPN = torch.addcmul(added_BHPN, kept_BH11, state_BHPN)
    read_BcHXP = q_BcHXN @ torch.stack(before, 1).transpose(-1, -2)
    y_BcHXP = torch.addcmul(y_BcHXP, read_BcHXP, by_token(from_start_BcHQ))
    return y_BcHXP.unflatten(3, (Q, R)).transpose(2, 3).flatten(1, 2)[:, :T], state_BHPN


def turns(
    turn_BTHA: Tensor, *, chunk: int, segments_BT: Tensor | None = None, state_BHA: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of each document's angles up to each token, the first one's from `state_BHA` on, and the last sum. Whole
    turns are dropped from chunk to chunk: a long row's sums would lose their digits to them."""
    (B, T, H, A), Q = turn_BTHA.shape, min(chunk, turn_BTHA.shape[1], LONGEST_CHUNK)
    document_BcQ = None if segments_BT is None else in_chunks(starts(segments_BT), Q).cumsum(2)
    sum_BcQX = running_sums(in_chunks(turn_BTHA.flatten(2), Q), document_BcQ)
    whole_BcQ = None if document_BcQ is None else (document_BcQ == 0).float()
    last_BX = sum_BcQX.new_zeros(B, H * A) if state_BHA is None else state_BHA.float().flatten(1)
    chunks = []
    for c, sum_BQX in enumerate(sum_BcQX.unbind(1)):
        before_BQX = last_BX[:, None] if whole_BcQ is None else last_BX[:, None] * whole_BcQ[:, c, :, None]
        chunks.append(sum_BQX + before_BQX)
        last_BX = chunks[-1][:, -1] % TURN
    return torch.stack(chunks, 1).flatten(1, 2)[:, :T].unflatten(-1, (H, A)), last_BX.unflatten(-1, (H, A))


def turned(t_BTHRN: Tensor, cos_BTHA: Tensor, sin_BTHA: Tensor) -> Tensor:
    """The first 2A channels turned, each with its neighbour."""
    A = cos_BTHA.shape[-1]
    first, second = t_BTHRN[..., : 2 * A].unflatten(-1, (A, 2)).unbind(-1)
    cos, sin = cos_BTHA[:, :, :, None], sin_BTHA[:, :, :, None]
    pairs = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)
    return torch.cat((pairs, t_BTHRN[..., 2 * A :]), -1)


class Inputs(NamedTuple):
    """What is made of in_proj's output before the scan; all but z and x in float32.

    b, c: normed, not shifted and turned yet. dt: 0 at padding. trap: before its sigmoid. angle: the sums so far;
    last_angle: after the last token.
    """

    z_BTI: Tensor
    x_BTHP: Tensor
    b_BTRGN: Tensor
    c_BTRGN: Tensor
    dt_BTH: Tensor
    log_decay_BTH: Tensor
    trap_BTH: Tensor
    angle_BTHA: Tensor
    last_angle_BHA: Tensor


def core(layer: Module, projected_BTE: Tensor, rows: Rows, state: dict[str, Any] | None) -> Tensor:
    """From in_proj's output to out_proj's input [B, T, I]; reads and writes `state`."""
    i, f = layer.inputs(projected_BTE, rows, state), layer.f
    share_BTH, cos_sin = torch.sigmoid(i.trap_BTH), (i.angle_BTHA.cos(), i.angle_BTHA.sin())
    k_BTHRN = turned(layer.shifted(i.b_BTRGN, layer.b_bias), *cos_sin)
    q_BTHRN = turned(layer.shifted(i.c_BTRGN, layer.c_bias), *cos_sin)
    x_BTHRP, earlier_BTH = layer.mixed(i.x_BTHP), (1 - share_BTH) * i.dt_BTH
    y_BTHRP, ssm = layer.parts["scan"](
        x_BTHRP, k_BTHRN, q_BTHRN, i.log_decay_BTH, share_BTH * i.dt_BTH, _next(earlier_BTH, rows),
        chunk=f.chunk, segments_BT=rows.segments_BT, state_BHPN=layer.started(state, rows, earlier_BTH),
    )
    layer.keep(state, rows, i, ssm)
    y_BTHRP = y_BTHRP + layer.D.float()[:, None, None] * x_BTHRP
    return layer.gated(y_BTHRP.to(i.z_BTI.dtype), i.z_BTI)


class Module(KindModule):
    """Slots: in_proj, out_proj (x, weight, bias) -> y as F.linear; scan as `trapezoidal_scan`; gate_norm as
    `gate_norm`, on rows of T * R; core as in this file. The methods are for those who fill `core`."""

    kind = KIND
    ENTRY = "in_proj"
    REFERENCE = {
        "in_proj": F.linear, "scan": trapezoidal_scan, "gate_norm": gate_norm, "out_proj": F.linear, "core": core,
    }

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None
    ) -> Tensor:
        rows = Rows.of(tokens, state)
        projected_BTE = self.enter(rows.pack(x_BTD), self.in_proj, norm)
        y_BTI = self.parts["core"](self, projected_BTE, rows, state)
        return rows.unpack(self.parts["out_proj"](y_BTI, self.out_proj.weight, self.out_proj.bias))

    def inputs(self, projected_BTE: Tensor, rows: Rows, state: dict[str, Any] | None) -> Inputs:
        f = self.f
        z_BTI, x_BTI, B, C, dt, A, trap, angle = projected_BTE.split([size for _, size in in_segments(f)], -1)
        dt_BTH = rows.without_padding(F.softplus(dt.float() + self.dt_bias.float()))
        turn_BTHA = math.pi * torch.tanh(angle.float())[:, :, None] * dt_BTH[..., None]
        angle_BTHA, last_BHA = turns(
            turn_BTHA, chunk=f.chunk, segments_BT=rows.segments_BT, state_BHA=rows.past(state, "angle")
        )
        b_BTRGN, c_BTRGN = (
            rms_norm(t.float().unflatten(-1, (f.rank, f.groups, f.d_state)), norm.weight, eps=f.norm_eps)
            for t, norm in ((B, self.b_norm), (C, self.c_norm))
        )
        return Inputs(
            z_BTI, x_BTI.unflatten(-1, (f.heads, f.head_dim)), b_BTRGN, c_BTRGN, dt_BTH,
            -F.softplus(A.float()).clamp_min(f.a_floor) * dt_BTH, trap.float(), angle_BTHA, last_BHA,
        )

    def shifted(self, b_BTRGN: Tensor, bias_HRN: Tensor) -> Tensor:
        """B or C of every head, float32 [B, T, H, R, N]."""
        return b_BTRGN.transpose(2, 3).repeat_interleave(self.f.heads // self.f.groups, 2) + bias_HRN.float()

    def mixed(self, x_BTHP: Tensor) -> Tensor:
        """A head's R inputs, float32 [B, T, H, R, P]."""
        x_BTH1P = x_BTHP.float()[..., None, :]
        return x_BTH1P if self.f.rank == 1 else x_BTH1P * self.rank_x.float()

    def started(self, state: dict[str, Any] | None, rows: Rows, earlier_BTH: Tensor) -> Tensor | None:
        """The state before the first token, with what that token's step gives to the token before it: earlier,
        (1 - sigmoid(trap)) dt."""
        if state is None:
            return None
        x_BHRP = self.mixed(rows.past(state, "x")[:, None])[:, 0]
        k_BHRN = rows.past(state, "k").float()
        added_BHPN = x_BHRP.transpose(-1, -2) @ k_BHRN
        return rows.past(state, "ssm").float() + added_BHPN * earlier_BTH[:, 0, :, None, None]

    def keep(self, state: dict[str, Any] | None, rows: Rows, i: Inputs, ssm_BHPN: Tensor) -> None:
        """Writes the state after each row's last real token."""
        if state is None:
            return
        angle_B1HA, b_B1RGN, x_B1HP = (_last(t, rows)[:, None] for t in (i.angle_BTHA, i.b_BTRGN, i.x_BTHP))
        k_B1HRN = turned(self.shifted(b_B1RGN, self.b_bias), angle_B1HA.cos(), angle_B1HA.sin())
        after = dict(angle=i.last_angle_BHA, k=k_B1HRN[:, 0], x=x_B1HP[:, 0])
        rows.keep(state, ssm=ssm_BHPN, **{name: _read(t_B, state[name], rows) for name, t_B in after.items()})

    def gated(self, y_BTHRP: Tensor, z_BTI: Tensor) -> Tensor:
        """The gate, the norm, and one output of a head's R."""
        f, weight_I = self.f, None if self.f.gated_norm == "none" else self.gate_norm.weight
        how = dict(order=f.gated_norm, groups=f.heads, eps=f.norm_eps)
        if f.rank == 1:
            return self.parts["gate_norm"](y_BTHRP.flatten(2), z_BTI, weight_I, **how)
        z_BTHRP = z_BTI.unflatten(-1, (f.heads, 1, f.head_dim)) * self.rank_z.to(z_BTI.dtype)
        y_BXI, z_BXI = (t.transpose(2, 3).flatten(3).flatten(1, 2) for t in (y_BTHRP, z_BTHRP))
        y_BXI = self.parts["gate_norm"](y_BXI, z_BXI, weight_I, **how)
        y_BTRHP = y_BXI.unflatten(1, (-1, f.rank)).unflatten(-1, (f.heads, f.head_dim))
        return (y_BTRHP.float() * self.rank_out.float().transpose(0, 1)).sum(2).flatten(2).to(z_BTI.dtype)


def _next(t_BTH: Tensor, rows: Rows) -> Tensor:
    """The next token's values, 0 where it is of another document or there is none."""
    t_BTH = F.pad(t_BTH[:, 1:], (0, 0, 0, 1))
    if rows.segments_BT is None:
        return t_BTH
    return torch.where(F.pad(starts(rows.segments_BT)[:, 1:], (0, 1))[..., None], 0, t_BTH)


def _last(t_BT: Tensor, rows: Rows) -> Tensor:
    """The last real token's of each row (any, where it has none)."""
    if rows.lengths_B is None:
        return t_BT[:, -1]
    index_B = (rows.lengths_B - 1).clamp_min(0).view(-1, *(1,) * (t_BT.dim() - 1))
    return t_BT.gather(1, index_B.expand(-1, 1, *t_BT.shape[2:]))[:, 0]


def _read(after_B: Tensor, before_B: Tensor, rows: Rows) -> Tensor:
    """What is after each row; before it, where it has no real token."""
    if rows.lengths_B is None:
        return after_B
    read_B = (rows.lengths_B > 0).view(-1, *(1,) * (after_B.dim() - 1))
    return torch.where(read_B, after_B.to(before_B.dtype), before_B)
