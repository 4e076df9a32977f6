"""Attention residuals: Hugging Face's modules, how wide the stream is where, and what that costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import D_MODEL, graph, ids, made
from torch import nn

from mambadsl.build.model import build
from mambadsl.build.state import describe
from mambadsl.compile import load
from mambadsl.graph.cost import costs, total
from mambadsl.graph.graph import Streams
from mambadsl.graph.json import dumps, loads
from mambadsl.graph.weights import all_weights
from mambadsl.plan.device import DEVICES
from mambadsl.plan.from_graph import units
from mambadsl.show.explorer import explorer_data
from mambadsl.text.diagnostic import MdlError
from mambadsl.train.memory import Counted

KEYS = "reads=keys, scale=auto, weight=false"
#: A and F within a block, B begins one.
MORE = """
layer A_ = A(residual=attend({form}))
layer B_ = A_(residual=attend(begins=true, {form}))
layer F_ = G(residual=attend({form}))
layer D_ = Delta(residual=attend({form}))
shared S_ = A(residual=attend({form}))
"""


def more(form: str = "norm_eps=1e-6") -> str:
    return MORE.format(form=form)


# Hugging Face's.


@torch.no_grad()
def test_blocks_are_inklings():
    """Its decoder layers and residuals, around our mixers; blocks of two of its layers, which are four of ours."""
    modeling = pytest.importorskip("transformers.models.inkling2.modeling_inkling2")
    from types import SimpleNamespace

    config, eps = SimpleNamespace(hidden_size=D_MODEL), 1e-6
    model = made(
        "[B_ F_ A_ F_]*2 B_ F_", more=more(KEYS), narrow=f"attend({KEYS})", norm=f"rmsnorm(eps={eps})"
    )
    tokens, w = ids(2, 9), model.tensors()
    subs = [sub for _, sub in model.sublayers()]

    def residual(at: str) -> nn.Module:
        module = modeling.Inkling2BlockAttentionResidual(config)
        module.load_state_dict({"query": w[f"{at}.query"]})
        return module

    def norm(at: str) -> nn.Module:
        module = modeling.Inkling2RMSNorm(D_MODEL, eps)
        module.load_state_dict({"weight": w[f"{at}.weight"]})
        return module

    class Layer(modeling.Inkling2SlidingDecoderLayer):
        def __init__(self, k: int):
            nn.Module.__init__(self)
            at, below = f"stack.{2 * k}", f"stack.{2 * k + 1}"
            self.is_block_boundary = k % 2 == 0
            self.attention_input = residual(f"{at}.residual") if k else None
            self.mlp_input = residual(f"{below}.residual")
            self.input_layernorm, self.post_attention_layernorm = norm(f"{at}.norm"), norm(f"{below}.norm")
            attention, mlp = subs[2 * k].mixer, subs[2 * k + 1].mixer
            self.__dict__["self_attn"] = lambda hidden_states, **_: (attention(hidden_states, describe((2, 9))), None)
            self.__dict__["mlp"] = lambda hidden_states: mlp(hidden_states, describe((2, 9)))
            # It has no convolutions behind them here.
            for name in "post_attention_convolution", "post_mlp_convolution":
                self.__dict__[name] = lambda hidden_states, **_: hidden_states

    assert "stack.0.residual.query" not in w
    x = F.embedding(tokens, w["embed.weight"])
    states = x.new_zeros(2, 9, 0, D_MODEL)
    for k in range(5):
        layer = Layer(k)
        new = layer(x, states)
        if layer.is_block_boundary:
            states = torch.cat((states, x.unsqueeze(-2)), -2)
        x = new
    h = norm("final_norm")(residual("narrow")(states, x)[0])
    torch.testing.assert_close(model(tokens), h @ w["head.weight"].T, atol=5e-5, rtol=0)


@torch.no_grad()
def test_queries_begin_at_the_mean():
    """Zero queries weigh all states alike; then sums of states and the block's are the usual residual sum."""
    model = made("B_ F_ B_ F_", more=more(), narrow="sum", jitter=False)
    subs = [sub for _, sub in model.sublayers()]
    tokens = describe((2, 5))
    x = F.embedding(ids(2, 5), model.tensors()["embed.weight"])
    states = [x]
    for sub in subs:
        assert all(not t.any() for path, t in sub.named_parameters() if path == "residual.query")
        y = sub.mixer(sub.norm(torch.stack(states).mean(0)), tokens)
        states = [*states, y] if sub.sub.residual.begins else [*states[:-1], states[-1] + y]
    wanted = model.logits(model.final_norm(sum(states)))
    torch.testing.assert_close(model(ids(2, 5)), wanted, atol=2e-5, rtol=1e-5)


def _read(states, form, w, at):
    """As the paper writes it: keys are normed states, and softmax weighs the states."""
    if len(states) == 1:
        return states[0]
    v = torch.stack(states)
    k = F.rms_norm(v, (D_MODEL,), w.get(f"{at}.keys.weight"), form.norm_eps)
    scale = D_MODEL**-0.5 if form.scale is None else form.scale
    share = torch.einsum("d, n b t d -> n b t", w[f"{at}.query"], k * scale).softmax(0)
    return torch.einsum("n b t, n b t d -> b t d", share, k if form.reads == "keys" else v)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from(["A_", "B_", "F_", "D_", "S_"]), min_size=1, max_size=6),
    st.sampled_from(["norm_eps=1e-4", KEYS]),
)
@torch.no_grad()
def test_any_blocks_are_the_definition(stack, form):
    model, tokens = made(" ".join(stack), more=more(form), narrow=f"attend({form})"), ids(2, 5)
    w = model.tensors()
    states = [F.embedding(tokens, w["embed.weight"])]
    for node, sub in model.sublayers():
        assert model.graph.streams[node.path].read == len(states)
        h = sub.norm(_read(states, sub.sub.residual, w, f"{node.owner}.residual"))
        y = sub.mixer_modules()[0](h, describe((2, 5)))
        states = [*states, y] if sub.sub.residual.begins else [*states[:-1], states[-1] + y]
    wanted = model.logits(model.final_norm(_read(states, model.graph.model.narrow, w, "narrow")))
    torch.testing.assert_close(model(tokens), wanted, atol=5e-5, rtol=1e-4)
    assert sum(p.numel() for p in model.parameters()) == total(costs(model.graph)).params


@pytest.mark.parametrize("residual, narrow", [
    ("hyper(streams=3)", "attend"), ("attend(begins=true)", "weighted"), ("attend(begins=true)", "gated(rank=3)"),
    ("attend(begins=true)", "mean"),
])
def test_every_way_to_narrow_takes_any_streams(residual, narrow):
    model = made("X Y", more=f"layer X = A(residual={residual}) layer Y = G(residual={residual})", narrow=narrow)
    model.train().loss(ids(2, 7)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert set(model.state_dict()) == set(all_weights(model.graph))


# How wide the stream is.


def test_the_stream_grows_where_blocks_begin():
    g = graph("F_ B_ F_ B_ B_ F_", more=more() + "mtp(depths=2) { A_ B_ A_ }", narrow="attend")
    found = {path: tuple(n) for path, n in g.streams.items()}
    assert [found[node.path] for node in g.layers] == [(1, 1), (1, 2), (2, 2), (2, 3), (3, 4), (4, 4)]
    assert found["embed"] == (1, 1) and found["head"] == (4, 1)
    for k in range(2):
        tail = [found[f"mtp.{k}.{at}"] for at in ("in", 0, 1, 2, "out")]
        assert tail == [(1, 1), (1, 1), (1, 2), (2, 2), (2, 1)]
    assert all(e.width == g.streams[e.target].read * D_MODEL for e in g.edges if e.tensor == "x")
    assert graph("A F").streams["stack.1"] == Streams(1, 1)
    assert loads(dumps(g)) == g
    [shown] = (node for node in explorer_data(g)["graphs"][0]["nodes"] if node["id"] == "stack.3")
    assert shown["outputsMetadata"][0]["attrs"][0]["value"] == f"batch x length x {3 * D_MODEL}"


def test_only_what_chooses_has_a_query():
    g = graph("S_ F_ B_ S_ F_", more=more() + "mtp() { F_ F_ }", narrow="attend")
    queries = {path for path in all_weights(g) if path.endswith(".query")}
    # The shared layer's second use chooses; one depth of the tail has one state, and nothing to choose at its end.
    assert queries == {"shared.S_.residual.query", "stack.4.residual.query", "narrow.query"}
    alone = graph("S_ F_ S_ B_", more=more(), narrow="attend")
    assert not [path for path in all_weights(alone) if path.startswith("shared.") and "query" in path]


@torch.no_grad()
def test_a_shared_layer_reads_what_is_there():
    model, tokens = made("S_ B_ S_ F_ S_", more=more(), narrow="attend"), ids(2, 6)
    state = model.init_state(2)
    steps = [model(tokens[:, t : t + 1], state=state) for t in range(6)]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens), atol=5e-5, rtol=1e-4)
    first = model.get_submodule("stack.0")
    x = F.embedding(tokens, model.tensors()["embed.weight"])
    y = first.mixer_modules()[0](first.norm(x), describe((2, 6)))
    torch.testing.assert_close(first((x,), None, describe((2, 6))), (x + y,))


# What it costs.


def test_a_cut_is_crossed_by_the_states_above_it():
    g = graph("B_ F_ B_ F_", more=more(), narrow="attend")
    sent = {u.path: u.out_bytes for u in units(g, device=DEVICES["h200"], length=8)}
    one = 8 * D_MODEL * 2
    assert [sent[path] // one for path in ("embed", "stack.0", "stack.1", "stack.2", "stack.3")] == [1, 2, 2, 3, 3]
    again = graph("B_ F_ B_ F_", more=more().replace("))\n", "), recompute=true)\n"))
    kept = [u.activation_bytes for u in units(again, device=DEVICES["h200"], length=8)][1:5]
    assert kept == [one] * 4


def test_flops_and_memory_grow_with_the_states():
    table = costs(graph("B_ A_ B_ A_", more=more(), narrow="attend"), length=8)
    plain = costs(graph("A A A A"), length=8)
    rows = [(table[f"stack.{i}"], plain[f"stack.{i}"]) for i in range(4)]
    own = [a.flops.forward - b.flops.forward for a, b in rows]
    assert own == [0, 2 * 4 * D_MODEL, 2 * 4 * D_MODEL, 3 * 4 * D_MODEL]
    kept = [a.saved_bytes_per_token - b.saved_bytes_per_token for a, b in rows]
    assert kept == [0, *(2 * D_MODEL + n * 3 * 4 for n in (2, 2, 3))]
    assert [a.params - b.params for a, b in rows] == [0, 2 * D_MODEL, 2 * D_MODEL, 2 * D_MODEL]
    assert table["head"].flops.forward - plain["head"].flops.forward == 3 * 4 * D_MODEL


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_layers_keep_the_same_states(dtype):
    """Of 24 layers, the last ones choose from 7 states: each keeps what it adds, as one does that only adds."""
    held = []
    for stack, narrow in ("[B_ F_ F_ F_]*6", "attend"), ("[A G G G]*6", "mean"):
        model = made(stack, more=more(), narrow=narrow, d_model=96, dtype=dtype).train()
        model.loss(ids(2, 16)).backward()
        with Counted() as used:
            loss = model.loss(ids(2, 16))
            held.append(used.held)
        del loss
    stream = 2 * 16 * 96 * (2 if dtype == "bf16" else 4)
    # A state more than the stream of one that adds, next to what narrowing reads side by side: 7, and once in float32.
    assert held[0] - held[1] < (24 * 1.3 + 3 * 7) * stream


# What cannot be.

HEAD = "model m { vocab = 50 d_model = 16 } layer F = mlp(d_ff=32) layer M = mamba2(heads=4, head_dim=8) "


@pytest.mark.parametrize("text, code, said", [
    ("layer H = M(residual=attend) stack { H*3 }", "E713", "none begins a block"),
    ("layer H = M(residual=attend(begins=true)) stack { H F }", "E710", "`stack.1` has one residual stream and "),
    ("layer H = M(residual=attend) stack { F H }", "E710", "`stack.1` has a residual stream for each block"),
    ("layer H = M(residual=attend) layer S = F(residual=mhc) stack { H(residual=attend(begins=true)) S }", "E710",
     "`stack.1` has 4 residual streams and `stack.0` a residual stream for each block"),
    ("layer H = M(residual=attend(begins=true)) layer S = F(residual=aside) stack { H S H }", "E710", "`stack.1`"),
    ("layer H = M(residual=attend(begins=true)) stack { H } mtp() { F }", "E710", "`mtp.0.0` has one"),
    ("layer H = M(residual=attend(begins=1)) stack { H }", "E040", "must be `true` or `false`"),
    ("layer H = M(residual=attend(scale=0)) stack { H }", "E040", "greater than 0"),
])
def test_layers_that_keep_other_states_are_refused(text, code, said):
    with pytest.raises(MdlError) as caught:
        load(text=HEAD + text)
    found = [d for d in caught.value.diagnostics if d.severity == "error"]
    assert [d.code.id for d in found] == [code] and said in found[0].message


def test_the_text_says_only_what_is_not_usual():
    more = f"layer H = M(residual=attend(begins=true, {KEYS})) "
    program = load(text=HEAD.replace("}", f"narrow = attend({KEYS}) }}", 1) + more + "stack { H*3 }")
    again = load(text=program.expand())
    assert again.layers == program.layers and again.layers.model.narrow.scale is None
    assert build(again.layers, device="meta").graph == program.layers
