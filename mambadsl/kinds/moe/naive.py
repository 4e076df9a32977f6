"""The mixture of experts by definition: for each token, score, choose, run each chosen expert, sum.

Letters: B batch, T time, D d_model, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mambadsl.kinds.kind import Dims
from mambadsl.kinds.mlp.naive import hidden
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Values, Variant


def choose(logits_E: Tensor, bias_E: Tensor | None, router: Variant, top_k: int) -> dict[int, Tensor]:
    """The chosen experts of one token and their weights."""
    if router.name == "mlp":
        scores_E = torch.exp(logits_E) / torch.exp(logits_E).sum()
        order = sorted(range(len(scores_E)), key=lambda e: (-(scores_E[e] + bias_E[e]).item(), e))
        none = len(scores_E) - 1 if router.skip else None
        return {e: scores_E[e] for e in order[:top_k] if e != none}
    experts = range(len(logits_E))
    if router.name == "softmax":
        scores_E = choice_E = logits_E
    else:
        scores_E = 1 / (1 + torch.exp(-logits_E))
        choice_E = scores_E if bias_E is None else scores_E + bias_E
        experts = best_groups(choice_E.tolist(), router)
    chosen = sorted(experts, key=lambda e: (-choice_E[e].item(), e))[:top_k]

    if router.name == "softmax":
        over = range(len(logits_E)) if router.order == "before_top_k" else chosen
        largest = logits_E.max().detach()
        total = sum(torch.exp(logits_E[e] - largest) for e in over)
        weights = {e: torch.exp(logits_E[e] - largest) / total for e in chosen}
    else:
        weights = {e: scores_E[e] for e in chosen}
    if router.renorm:
        total = sum(weights.values()) + router.renorm_eps
        weights = {e: w / total for e, w in weights.items()}
    return {e: w * router.scale for e, w in weights.items()}


def router_reads(
    weights: Mapping[str, Tensor], router: Variant, x_D: Tensor, above_R: Tensor | None
) -> Tensor:
    """What the last layer of an MLP router reads."""
    w = {name.removeprefix("router."): t for name, t in weights.items()}
    r_R = w["enter.weight"] @ x_D + w["enter.bias"]
    if above_R is not None:
        r_R = r_R + w["carry_scale"] * above_R
    r_R = r_R / torch.sqrt((r_R * r_R).mean() + router.eps) * w["norm.weight"]
    for name in "fc1", "fc2":
        r_R = w[f"{name}.weight"] @ r_R + w[f"{name}.bias"]
        r_R = r_R * (1 + torch.erf(r_R / 2**0.5)) / 2
    return r_R


def best_groups(choice: list[float], router: Variant) -> list[int]:
    """Experts of the groups whose best two have the highest sum."""
    size = len(choice) // router.groups
    groups = [range(g * size, (g + 1) * size) for g in range(router.groups)]
    score = [sum(sorted((choice[e] for e in group), reverse=True)[:2]) for group in groups]
    kept = sorted(range(router.groups), key=lambda g: (-score[g], g))[: router.top_groups]
    return [e for g in kept for e in groups[g]]


def naive(
    weights: Mapping[str, Tensor], f: Values, dims: Dims, x_BTD: Tensor, tokens: Tokens, state: Any = None, *,
    router: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """router: what the router above read, before its norm, [B, T, R]."""
    up = "gate_up_proj" if f.gated else "up_proj"

    def feed(x_D: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return down @ hidden(up @ x_D, act=f.act, gated=f.gated)

    def token(x_D: Tensor, above_R: Tensor | None) -> Tensor:
        read = router_reads(weights, f.router, x_D, above_R) if f.router.name == "mlp" else x_D
        chosen = choose(weights["router.weight"] @ read, weights.get("router.bias"), f.router, f.top_k)
        inner = weights["latent_in_proj.weight"] @ x_D if f.latent else x_D
        # A token may choose no expert.
        y_D = x_D.new_zeros(weights["experts.down_proj"].shape[1])
        for e, w in chosen.items():
            y_D = y_D + w * feed(inner, weights[f"experts.{up}"][e], weights["experts.down_proj"][e])
        if f.latent:
            y_D = weights["latent_out_proj.weight"] @ y_D
        if f.shared_d_ff:
            shared = feed(x_D, weights[f"shared.{up}.weight"], weights["shared.down_proj.weight"])
            if f.shared_gate == "sigmoid":
                shared = shared / (1 + torch.exp(-weights["shared_gate.weight"] @ x_D))
            y_D = y_D + shared
        return y_D

    above = [[None] * len(x_TD) for x_TD in x_BTD] if router is None else router
    rows = [[token(x_D, a_R) for x_D, a_R in zip(x_TD, a_TR)] for x_TD, a_TR in zip(x_BTD, above)]
    return torch.stack([torch.stack(row) for row in rows]), state
