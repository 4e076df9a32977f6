"""Every shipped model with small sizes: what makes each model itself stays, and the fused kernels still take it.

    program = shrunk("nemotron_h_8b")               # all its layers
    program = shrunk("nemotron_h_8b", repeats=2)    # nothing in the pattern is repeated more often than that
    program = shrunk("nemotron_h_8b", repeats=0)    # nothing in the pattern comes twice, however it is grouped

What is kept: the pattern, groups and grouped heads, windows (shorter), rope, norms, multipliers, routers, tied
tables, forms of residuals, and heads whose channels are no power of two. Kernels are compiled for each size, so layers
of a kind share theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

from mambadsl.compile import Program, compile_file, load
from mambadsl.files import MODELS
from mambadsl.graph.graph import Role
from mambadsl.kinds.values import Values
from mambadsl.syntax import tree
from mambadsl.syntax.read import read
from mambadsl.text.source import from_text

SHIPPED = sorted(path.stem for path in MODELS.glob("*.mdl") if path.stem != "std")

#: init_std: layers add about as much to the stream as they find there, so that none can be wrong unseen.
MODEL = dict(d_model=64, vocab=256, context=128, init_std=0.15)
WINDOW = 12
WIDEST_HEAD = 256


def _mamba1(f: Values) -> dict[str, Any]:
    return dict(d_inner=128, heads=min(f.heads, 2), dt_rank=8, d_state=16, chunk=32)


def _mamba2(f: Values) -> dict[str, Any]:
    """In eights for the convolution, in sixteens for FP8."""
    power_of_2 = f.head_dim & (f.head_dim - 1) == 0
    return dict(heads=16, head_dim=16 if power_of_2 else 48, d_state=32, groups=min(f.groups, 2), chunk=32)


def _attention(f: Values) -> dict[str, Any]:
    """As many query heads to a pair of keys and values as the model has; wider heads than kernels like stay so."""
    kv_heads = min(f.kv_heads, 2)
    head_dim = 64 if f.head_dim <= WIDEST_HEAD else WIDEST_HEAD + 8
    small = dict(heads=f.heads // f.kv_heads * kv_heads, kv_heads=kv_heads, head_dim=head_dim)
    return small if f.window is None else {**small, "window": WINDOW}


def _cca(f: Values) -> dict[str, Any]:
    return _attention(f)


def _mlp(f: Values) -> dict[str, Any]:
    return dict(d_ff=128)


def _moe(f: Values) -> dict[str, Any]:
    experts = max(8, 2 * f.router.values.get("groups", 1))
    small = dict(experts=experts, top_k=min(f.top_k, 3), d_ff=32, shared_d_ff=min(f.shared_d_ff, 64))
    return small if f.latent is None else {**small, "latent": 32}


def _short_conv(f: Values) -> dict[str, Any]:
    return dict(d_inner=64)


def _gated_delta_net(f: Values) -> dict[str, Any]:
    heads = 4
    return dict(heads=heads, key_heads=heads * f.key_heads // f.heads, key_dim=16, value_dim=32, chunk=32)


def _linear(f: Values) -> dict[str, Any]:
    return {}


def _rg_lru(f: Values) -> dict[str, Any]:
    return dict(d_inner=64, blocks=2, chunk=32)


def _kimi_delta(f: Values) -> dict[str, Any]:
    ranks = {name: 16 for name in ("decay_rank", "gate_rank") if f[name] is not None}
    return dict(heads=4, key_dim=32, value_dim=32, chunk=32, **ranks)


def _mla(f: Values) -> dict[str, Any]:
    small = dict(heads=4, nope_dim=32, rope_dim=16, value_dim=32, kv_rank=64)
    return small if f.q_rank is None else {**small, "q_rank": 48}


def _lightning(f: Values) -> dict[str, Any]:
    return dict(heads=4, head_dim=32, chunk=32)


def _mlstm(f: Values) -> dict[str, Any]:
    return dict(heads=4, key_dim=16, value_dim=32, chunk=32)


def _wkv4(f: Values) -> dict[str, Any]:
    return dict(d_inner=64, chunk=32)


def _channel_mix(f: Values) -> dict[str, Any]:
    return dict(d_ff=128)


def _mamba3(f: Values) -> dict[str, Any]:
    return dict(heads=8, head_dim=32, d_state=32, groups=min(f.groups, 2), chunk=32)


def _gmu(f: Values) -> dict[str, Any]:
    return dict(d_inner=128)


#: Kind -> the fields to set, from those of the whole model.
SMALL: Mapping[str, Callable[[Values], dict[str, Any]]] = {
    "mamba1": _mamba1, "mamba2": _mamba2, "attention": _attention, "mlp": _mlp, "moe": _moe,
    "short_conv": _short_conv, "gated_delta_net": _gated_delta_net, "rg_lru": _rg_lru,
    "kimi_delta": _kimi_delta, "mla": _mla, "linear": _linear, "lightning": _lightning, "mamba3": _mamba3,
    "mlstm": _mlstm, "wkv4": _wkv4, "channel_mix": _channel_mix, "gmu": _gmu, "cca": _cca,
}


@cache
def whole(name: str) -> Program:
    """The model as it is shipped."""
    return load(MODELS / f"{name}.mdl")


def settings(name: str) -> dict[str, Any]:
    """What `set=` of `mambadsl.load` makes the model small with."""
    found: dict[str, Any] = dict(MODEL)
    for node in whole(name).layers.nodes:
        if node.role is Role.LAYER:
            for mixer in node.layer.branches:
                found |= {f"{mixer.name}.{field}": value for field, value in SMALL[mixer.kind](mixer.fields).items()}
    return found


@cache
def shrunk(name: str, *, repeats: int | None = None, more: str = "") -> Program:
    """repeats: at most so many of anything in the pattern; 0: each layer of it once. more: statements to add, a `parts`
    block, say."""
    text = (MODELS / f"{name}.mdl").read_text(encoding="utf-8")
    file = read(from_text(f"{text}\n{more}\n", name=f"{name}.mdl"))
    if repeats is not None:
        # A fact of the file speaks of all its layers; those of a changed file are not checked either.
        file = _shorter(file, repeats)
    return compile_file(file, set=settings(name))


def distinct(*, repeats: int) -> list[str]:
    """Of models that differ only in what was cut away (Mamba's five sizes, say), one: the first."""
    first: dict[tuple, str] = {}
    for name in SHIPPED:
        graph = shrunk(name, repeats=repeats).layers
        nodes = tuple((n.path, n.owner, n.layer and (n.layer.sub, *((m.kind, m.fields, m.branch)
                      for m in n.layer.branches))) for n in graph.nodes)
        first.setdefault((graph.model, nodes), name)
    return sorted(first.values())


def _shorter(value: Any, repeats: int) -> Any:
    """A piece of the syntax tree, with the counts in it cut."""
    if isinstance(value, tuple):
        return tuple(_shorter(v, repeats) for v in value)
    if not isinstance(value, (tree.Node, tree.File)) or not is_dataclass(value):
        return value
    changed = {f.name: _shorter(getattr(value, f.name), repeats) for f in fields(value)}
    if isinstance(value, tree.Repeat):
        changed["count"] = min(value.count, repeats)
    if isinstance(value, tree.Pattern) and not repeats:
        changed["items"] = tuple(dict.fromkeys(_leaves(value)))
    return replace(value, **changed)


def _leaves(value: Any) -> Iterator[Any]:
    match value:
        case tree.Pattern():
            for item in value.items:
                yield from _leaves(item)
        case tree.Group():
            yield from _leaves(value.pattern)
        case tree.Repeat():
            yield from _leaves(value.item)
        case tree.Cut():
            pass
        case _:
            yield value
