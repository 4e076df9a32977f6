"""Mixture of experts in torch: a router in float32, then one product per expert that has tokens.

Letters: N tokens (batch * time), D width that the router reads, E experts, K top_k, F hidden width of
one expert (2F where gated: [gate | up]), L width that the experts read and write, R d_router.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambadsl.kinds.activations import activate
from mambadsl.kinds.balance import Balanced
from mambadsl.kinds.module import Holder
from mambadsl.kinds.moe.kind import KIND
from mambadsl.kinds.norm import rms_norm
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Variant


def route(
    x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None, *, router: Variant, top_k: int
) -> tuple[Tensor, Tensor]:
    """Each token's experts and their weights: index_NK int64, weight_NK float32.

    router: a form of `kind.ROUTER`. bias_E is added for choosing only. Equal scores: the expert of the
    lower number first. Of `mlp`, x is what its last layer reads; a token that chooses no expert has number 0 and weight
    0, so that shapes are the same whatever is chosen.
    """
    logits_NE = F.linear(x_ND.float(), weight_ED.float())
    if router.name == "softmax":
        index_NK = best(logits_NE, top_k)
        if router.order == "before_top_k":
            weight_NK = logits_NE.softmax(-1).gather(-1, index_NK)
        else:
            weight_NK = logits_NE.gather(-1, index_NK).softmax(-1)
    elif router.name == "mlp":
        scores_NE = logits_NE.softmax(-1)
        index_NK = best(scores_NE.detach() + bias_E, top_k)
        weight_NK = scores_NE.gather(-1, index_NK)
        if router.skip:
            none_NK = index_NK == len(weight_ED) - 1
            index_NK, weight_NK = index_NK.masked_fill(none_NK, 0), weight_NK.masked_fill(none_NK, 0)
        return index_NK, weight_NK
    else:
        scores_NE = logits_NE.sigmoid()
        choice_NE = scores_NE.detach() if bias_E is None else scores_NE.detach() + bias_E
        index_NK = best(limit_groups(choice_NE, groups=router.groups, top_groups=router.top_groups), top_k)
        weight_NK = scores_NE.gather(-1, index_NK)
    if router.renorm:
        weight_NK = weight_NK / (weight_NK.sum(-1, keepdim=True) + router.renorm_eps)
    return index_NK, weight_NK * router.scale


def shares(logits_NC: Tensor, router: Variant) -> Tensor:
    """Each token's scores of all that it can choose, as parts of 1."""
    if router.name != "sigmoid":
        return logits_NC.softmax(-1)
    scores_NC = logits_NC.sigmoid()
    return scores_NC / (scores_NC.sum(-1, keepdim=True) + 1e-20)


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, highest first; a stable sort, since torch.topk leaves the
    order of equal scores open."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def limit_groups(choice_NE: Tensor, *, groups: int, top_groups: int) -> Tensor:
    """-inf for experts outside the `top_groups` groups whose best two experts have the highest sum."""
    if top_groups >= groups:
        return choice_NE
    choice_NGE = choice_NE.unflatten(-1, (groups, -1))
    pair_NG2 = choice_NGE.sort(dim=-1, descending=True).values[..., :2]
    chosen = best(pair_NG2.sum(-1), top_groups)
    out_NG = torch.ones_like(pair_NG2[..., 0], dtype=torch.bool).scatter(-1, chosen, False)
    return choice_NGE.masked_fill(out_NG[..., None], float("-inf")).flatten(-2)


def run_experts(
    x_NL: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    up_EFL: Tensor,
    down_ELF: Tensor,
    *,
    act: str,
    gated: bool,
) -> Tensor:
    """The weighted sum of each token's experts, [N, L] in the dtype of x; summed in float32.

    One matrix product per expert with tokens, in any width and dtype. torch's grouped_mm is as fast on
    a CPU but wants aligned widths; on a GPU a part does better than both.
    """
    experts, top_k = up_EFL.shape[0], index_NK.shape[1]
    order = index_NK.flatten().argsort(stable=True)
    counts = index_NK.flatten().bincount(minlength=experts).tolist()
    # unbind: its backward pass makes one gradient of all experts, not one as large for each expert.
    jobs = zip(x_NL[order // top_k].split(counts), up_EFL.unbind(), down_ELF.unbind())
    found = [
        F.linear(activate(F.linear(x, up), act=act, gated=gated), down) for x, up, down in jobs if x.shape[0]
    ]
    place = torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=order.device))
    y_NKL = torch.cat(found)[place].unflatten(0, (-1, top_k))
    return (y_NKL * weight_NK[..., None]).sum(1).to(x_NL.dtype)


#: It counts tokens on the host: no CUDA graph can hold it.
run_experts.waits = True


def run_shared(
    x_ND: Tensor, up_FD: Tensor, down_DF: Tensor, gate_1D: Tensor | None, *, act: str, gated: bool
) -> Tensor:
    """The expert that every token passes, [N, d_model], times sigmoid(gate . x) if there is a gate."""
    y_ND = F.linear(activate(F.linear(x_ND, up_FD), act=act, gated=gated), down_DF)
    return y_ND if gate_1D is None else y_ND * F.linear(x_ND, gate_1D).sigmoid()


class Module(Balanced):
    """REFERENCE: `route`, `run_experts`, `run_shared`; parts take and give the same."""

    kind = KIND
    REFERENCE = {"router": route, "experts": run_experts, "shared": run_shared}

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, router: Tensor | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """router: what the MLP of the router above read, before its norm, [B, T, R]."""
        f, form = self.f, dict(act=self.f.act, gated=self.f.gated)
        up = "gate_up_proj" if f.gated else "up_proj"
        x_ND = x_BTD.flatten(0, 1)
        read = x_ND
        if f.router.name == "mlp":
            carried_NR = self._carried(x_ND, router)
            read = self._router_reads(carried_NR)
        route = self.parts["router"](read, self.router.weight, self.router.bias, router=f.router, top_k=f.top_k)
        if self.told is not None and torch.is_grad_enabled():
            route = self._telling(read, *route, tokens)
        inner_NL = F.linear(x_ND, self.latent_in_proj.weight) if f.latent else x_ND
        y_ND = self.parts["experts"](
            inner_NL, *route, getattr(self.experts, up), self.experts.down_proj, **form
        )
        if f.latent:
            y_ND = F.linear(y_ND, self.latent_out_proj.weight)
        if f.shared_d_ff:
            gate = self.shared_gate.weight if f.shared_gate == "sigmoid" else None
            weights = getattr(self.shared, up).weight, self.shared.down_proj.weight, gate
            y_ND = y_ND + self.parts["shared"](x_ND, *weights, **form)
        y_BTD = y_ND.unflatten(0, x_BTD.shape[:2])
        return (y_BTD, {"router": carried_NR.unflatten(0, x_BTD.shape[:2])}) if self.gives else y_BTD

    def _telling(
        self, read_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        """The same experts and weights, whose backward pass tells of them."""
        f, logits_NC, scores_NC = self.f, None, None
        if f.aux_loss or f.z_loss:
            logits_NC = F.linear(read_ND.float(), self.router.weight.float())
            scores_NC = shares(logits_NC, f.router)
        counted_NK = (weight_NK.detach() != 0).float() if f.router.values.get("skip") else None
        how = dict(counted_NK=counted_NK, scores_NC=scores_NC, logits_NC=logits_NC)
        return index_NK, self.telling(index_NK, weight_NK, tokens=tokens, **how)

    def _carried(self, x_ND: Tensor, above_BTR: Tensor | None) -> Tensor:
        """What an MLP router makes of x, and of what the router above did, float32 [N, R]."""
        mine_NR = _float_linear(x_ND, self.router.enter)
        if above_BTR is None:
            return mine_NR
        return mine_NR + above_BTR.flatten(0, 1).float() * self.router.carry_scale.float()

    def _router_reads(self, carried_NR: Tensor) -> Tensor:
        """What the last layer of an MLP router reads, float32 [N, R]."""
        router = self.router
        r_NR = rms_norm(carried_NR, router.norm.weight, eps=self.f.router.eps)
        for layer in router.fc1, router.fc2:
            r_NR = F.gelu(_float_linear(r_NR, layer))
        return r_NR


def _float_linear(x: Tensor, layer: Holder) -> Tensor:
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())
