"""Names of tensors that families share, by mixer: our weight -> theirs, where the names differ."""

from __future__ import annotations

from mambadsl.adapt.tensors import Experts, Piece, Place, Rows
from mambadsl.kinds.values import Values

QKV = {f"qkv_proj.{w}": (f"q_proj.{w}", f"k_proj.{w}", f"v_proj.{w}") for w in ("weight", "bias")}
GATED = {f"gate_up_proj.{w}": (f"gate_proj.{w}", f"up_proj.{w}") for w in ("weight", "bias")}
W123 = {"gate_up_proj.weight": ("w1.weight", "w3.weight"), "down_proj.weight": "w2.weight"}


def conv(name: str, f: Values) -> Rows:
    """torch's Conv1d has an axis for the one input channel of each group."""
    return Rows(Piece(name, shape=(-1, 1, f.d_conv)))


def conv1d(f: Values, *, name: str = "conv1d") -> dict[str, Place]:
    return {"conv.weight": conv(f"{name}.weight", f), "conv.bias": f"{name}.bias"}


def mamba1(f: Values) -> dict[str, Place]:
    norms = {f"{n}_norm.weight": f"{n}_layernorm.weight" for n in ("dt", "b", "c")}
    return conv1d(f) | norms


def mamba2(f: Values) -> dict[str, Place]:
    return conv1d(f) | {"gate_norm.weight": "norm.weight"}


def gated_q(f: Values) -> dict[str, Place]:
    """q_proj holds the queries of each head and then their gates."""
    return {
        f"qkv_proj.{w}": Rows(Piece(f"q_proj.{w}", ("q", "gate"), groups=f.heads), f"k_proj.{w}", f"v_proj.{w}")
        for w in ("weight", "bias")
    }


def experts(
    f: Values, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj", below: str = "experts",
) -> dict[str, Place]:
    """A matrix an expert, or as transformers 5 holds them: all in one."""
    at = f"{below}.{{}}"
    pieces = {
        "gate_up_proj": (f"{at}.{gate}.weight", f"{at}.{up}.weight"), "up_proj": (f"{at}.{up}.weight",),
        "down_proj": (f"{at}.{down}.weight",),
    }
    return {f"experts.{n}": Experts(f.experts, *given, together=f"{below}.{n}") for n, given in pieces.items()}


def shared(name: str) -> dict[str, Place]:
    """The expert that every token passes."""
    return {
        "shared.gate_up_proj.weight": (f"{name}.gate_proj.weight", f"{name}.up_proj.weight"),
        "shared.up_proj.weight": f"{name}.up_proj.weight",
        "shared.down_proj.weight": f"{name}.down_proj.weight",
    }
