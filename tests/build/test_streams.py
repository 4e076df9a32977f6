"""Several residual streams: what is computed, by definition and by Hugging Face's modules, and what always holds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import D_MODEL, graph, ids, made, shaken
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mambadsl.build.carried import closed
from mambadsl.build.model import build
from mambadsl.build.residual import scaled
from mambadsl.build.state import describe
from mambadsl.build.streams import widen
from mambadsl.compile import load
from mambadsl.graph.cost import costs, total
from mambadsl.graph.weights import all_weights
from mambadsl.kinds.residual import FORMS
from mambadsl.plan.from_graph import units
from mambadsl.run.generate import generate
from mambadsl.run.step import TrainStep
from mambadsl.text.diagnostic import MdlError

#: residual, and what fits it as `narrow`.
WAYS = {
    "hyper": ("hyper(streams=3)", "sum"),
    "mhc": ("mhc(streams=4, iterations=5)", "mean"),
    "weighted": ("mhc(streams=2, norm_eps=1e-5)", "weighted(norm_eps=1e-5)"),
    "gated": ("gated(streams=3, rank=5)", "gated(rank=7)"),
    "attend": ("attend(begins=true)", "attend"),
    "keys": ("attend(begins=true, reads=keys, scale=auto, weight=false)", "attend(reads=keys, scale=3)"),
}
every_way = pytest.mark.parametrize("way", WAYS)
#: Attention, a recurrence, a sum, a shared block of two uses, the first embedding, recomputation, a gate's bottleneck.
STACK = "A_ D_ F_ H_ S_ B_ F_ S_ B_ Z_ C_ W_"


def layers(residual: str) -> str:
    within = residual.replace("begins=true", "begins=false")
    return f"""
    layer A_ = A(residual={within})
    layer D_ = Delta(residual={residual})
    layer F_ = G(residual={residual}, norm=layernorm(bias=true))
    layer H_ = M(out_multiplier=0.3, residual={within}) + A(in_multiplier=1.5)
    layer Z_ = A(input=with_embedding, residual={residual})
    layer C_ = F(recompute=true, residual={within})
    layer W_ = L(residual={residual}, norm=rmsnorm(zero_centered=true))
    shared S_ = A(residual={within}, adapter=lora(rank=2))
    shared B_ = [M(residual={within}) G(residual={residual})]
    """


def options(way: str) -> dict:
    residual, narrow = WAYS[way]
    return dict(more=layers(residual), narrow=narrow)


@pytest.fixture(scope="module")
def models():
    return {way: made(STACK, **options(way)) for way in WAYS}


# What is computed.


def _norm(x, weight=None, eps=1e-5):
    normed = x / (x.square().mean() + eps).sqrt()
    return normed if weight is None else normed * weight


def _hyper(w, form, streams, f):
    """One token, stream by stream. streams: N vectors [D]."""
    n = form.streams
    raw = [torch.tanh(w["residual.proj.weight"] @ _norm(x, eps=form.norm_eps)) for x in streams]
    pre_b, post_b, mix_b = w["residual.bias"].split([n, n, n * n])
    s = w["residual.scale"]
    pre = [s[0] * raw[i][0] + pre_b[i] for i in range(n)]
    post = [s[1] * raw[i][1] + post_b[i] for i in range(n)]
    mix = [[s[2] * raw[i][2 + j] + mix_b[i * n + j] for j in range(n)] for i in range(n)]
    return _mixed(w, form, streams, f, pre, post, mix)


def _mhc(w, form, streams, f):
    n = form.streams
    raw = w["residual.proj.weight"] @ _norm(torch.cat(streams), eps=form.norm_eps)
    s, b = w["residual.scale"], w["residual.bias"]
    pre = [torch.sigmoid(s[0] * raw[i] + b[i]) + form.eps for i in range(n)]
    post = [2 * torch.sigmoid(s[1] * raw[n + i] + b[n + i]) for i in range(n)]
    mix = [[(s[2] * raw[2 * n + i * n + j] + b[2 * n + i * n + j]).exp() for j in range(n)] for i in range(n)]
    mix = [[m / sum(row) + form.eps for m in row] for row in mix]
    for k in range(form.iterations):
        if k:
            mix = [[m / (sum(row) + form.eps) for m in row] for row in mix]
        sums = [sum(row[j] for row in mix) + form.eps for j in range(n)]
        mix = [[m / sums[j] for j, m in enumerate(row)] for row in mix]
    if form.iterations > 3:
        assert all(abs(sum(row) - 1) < 1e-2 for row in mix)
    return _mixed(w, form, streams, f, pre, post, mix)


def _mixed(w, form, streams, f, pre, post, mix):
    n = form.streams
    y = f(_norm(sum(p * x for p, x in zip(pre, streams)), w["norm.weight"]))
    return [sum(mix[i][j] * streams[i] for i in range(n)) + post[j] * y for j in range(n)]


def _gated(w, form, streams, f):
    n = form.streams
    normed = [_norm(x, g) for x, g in zip(streams, w["residual.norm.weight"].chunk(n))]
    y = f(_gated_mean(w, "residual.", normed))
    post = 2 * torch.sigmoid(w["residual.inject_proj.weight"] @ torch.cat(normed) / n)
    return [x + p * y for x, p in zip(streams, post)]


def _gated_mean(w, at, normed):
    n = len(normed)
    gates = torch.sigmoid(w[f"{at}up_proj.weight"] @ F.silu(w[f"{at}down_proj.weight"] @ torch.cat(normed) / n))
    return sum(g * x for g, x in zip(gates.chunk(n), normed)) / n


def _attend(w, form, streams, f):
    y = f(_norm(_attended(w, "residual.", form, streams), w["norm.weight"]))
    return [*streams, y] if form.begins else [*streams[:-1], streams[-1] + y]


def _attended(w, at, form, states):
    if len(states) == 1:
        return states[0]
    keys = [_norm(s, w.get(f"{at}keys.weight"), eps=form.norm_eps) for s in states]
    scale = len(states[0]) ** -0.5 if form.scale is None else form.scale
    raw = [(scale * w[f"{at}query"] @ k).exp() for k in keys]
    return sum(r / sum(raw) * v for r, v in zip(raw, keys if form.reads == "keys" else states))


NAIVE = {"hyper": _hyper, "mhc": _mhc, "weighted": _mhc, "gated": _gated, "attend": _attend, "keys": _attend}


@every_way
def test_a_layer_is_the_definition(way):
    residual, narrow = WAYS[way]
    within = residual.replace("begins=true", "begins=false")
    more = f"layer X = G(residual={residual}) layer Y = F(residual={within})"
    model = made("Y X Y X Y", more=more, narrow=narrow)
    n, w = model.graph.streams["embed"].given, model.tensors()
    tokens = ids(1, 3)
    with torch.no_grad():
        found = []
        for token in tokens[0]:
            streams = [w["embed.weight"][token]] * n
            for node, sub in model.sublayers():
                own = {k: v for k, v in sub.named_parameters()}

                def f(h):
                    return sub.mixer(h[None, None], describe((1, 1)))[0, 0]

                streams = NAIVE[way](own, sub.sub.residual, streams, f)
            found.append(w["head.weight"] @ _ended(w, model.graph.model.narrow, streams))
        torch.testing.assert_close(model(tokens)[0], torch.stack(found), atol=2e-5, rtol=1e-4)


def _ended(w, narrow, streams):
    n = len(streams)
    if narrow.name == "attend":
        return _norm(_attended(w, "narrow.", narrow, streams), w["final_norm.weight"])
    if narrow.name == "gated":
        return _gated_mean(w, "narrow.", [_norm(x, g) for x, g in zip(streams, w["narrow.norm.weight"].chunk(n))])
    if narrow.name == "weighted":
        raw = w["narrow.proj.weight"] @ _norm(torch.cat(streams), eps=narrow.norm_eps)
        share = torch.sigmoid(raw * w["narrow.scale"] + w["narrow.bias"]) + narrow.eps
    else:
        share = [1 / n if narrow.name == "mean" else 1] * n
    return _norm(sum(s * x for s, x in zip(share, streams)), w["final_norm.weight"])


def test_hyper_connections_begin_as_the_residual_sum():
    """arXiv:2409.19606, equation 14: with initial values the model is the one without them."""
    more = "layer A_ = A(residual=hyper(streams=3)) layer F_ = G(residual=hyper(streams=3))"
    plain, several = made("A G A G A", jitter=False), made("A_ F_ A_ F_ A_", more=more, jitter=False)
    bias = several.tensors()["stack.4.residual.bias"]
    assert bias.tolist() == [0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1]
    tokens = ids(2, 7)
    torch.testing.assert_close(several(tokens), plain(tokens), atol=1e-5, rtol=1e-5)


# Hugging Face's modules, with the same weights.


def _filled(module: nn.Module, **weights: torch.Tensor) -> nn.Module:
    assert set(module.state_dict()) == set(weights)
    module.load_state_dict(weights)
    return module.eval()


def _qwen(tensors, at: str, *, streams: int, rank: int, inject: bool):
    modeling = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    from types import SimpleNamespace

    config = SimpleNamespace(hc_count=streams, hidden_size=D_MODEL, hc_lowrank=rank, rms_norm_eps=1e-5)
    names = dict(hc_norm="norm", input_mix_weight_down="down_proj", input_mix_weight_up="up_proj")
    names |= {"block_inject_weight": "inject_proj"} if inject else {}
    weights = {f"{theirs}.weight": tensors[f"{at}.{ours}.weight"] for theirs, ours in names.items()}
    return _filled(modeling.Qwen4ExpTextGatedResidual(config, use_combine=inject), **weights)


@torch.no_grad()
def test_gated_streams_are_qwens():
    form = "residual=gated(rank=6)"
    more = f"layer M_ = Delta({form}) layer A_ = A({form}) layer F_ = G({form})"
    norm = "rmsnorm(zero_centered=true)"
    model = made("M_ F_ A_ F_", more=more, norm=norm, narrow="gated(rank=6)")
    tokens, w = ids(2, 9), model.tensors()
    x = F.embedding(tokens, w["embed.weight"]).repeat(1, 1, 4)
    for node, sub in model.sublayers():
        mixed, old, inject = _qwen(w, f"{node.path}.residual", streams=4, rank=6, inject=True)(x)
        y = sub.mixer(mixed, describe((2, 9)))
        x = old + (y.unsqueeze(-2) * inject.unsqueeze(-1)).flatten(-2)
    h = _qwen(w, "narrow", streams=4, rank=6, inject=False)(x)
    torch.testing.assert_close(model(tokens), h @ w["head.weight"].T, atol=5e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family, prefix, narrow", [
    ("glm5_next", "Glm5NextText", "mean"), ("deepseek_v4", "DeepseekV4", "weighted(eps=1e-5, norm_eps=1e-4)"),
])
def test_manifold_constrained_streams_are_glms_and_deepseeks(family, prefix, narrow):
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    from types import SimpleNamespace

    config = SimpleNamespace(
        hc_mult=4, hc_sinkhorn_iters=7, hc_eps=1e-5, rms_norm_eps=1e-4, hidden_size=D_MODEL
    )
    form = "residual=mhc(iterations=7, eps=1e-5, norm_eps=1e-4)"
    more = f"layer M_ = Delta({form}) layer A_ = A({form}) layer F_ = G({form})"
    model = made("M_ F_ A_ F_", more=more, narrow=narrow, norm="rmsnorm(eps=1e-4)")
    tokens, w = ids(2, 9), model.tensors()
    x = F.embedding(tokens, w["embed.weight"])[:, :, None].expand(-1, -1, 4, -1).contiguous()
    for node, sub in model.sublayers():
        at = f"{node.path}.residual"
        theirs = _filled(
            getattr(modeling, f"{prefix}HyperConnection")(config),
            fn=w[f"{at}.proj.weight"], base=w[f"{at}.bias"], scale=w[f"{at}.scale"],
        )
        post, comb, collapsed = theirs(x)
        y = sub.mixer(sub.norm(collapsed), describe((2, 9)))
        x = post.unsqueeze(-1) * y.unsqueeze(-2) + comb.mT @ x
    if narrow == "mean":
        h = getattr(modeling, f"{prefix}HyperHead")()(x)
    else:
        own = {f"hc_{theirs}": w[f"narrow.{ours}"] for theirs, ours in
               (("fn", "proj.weight"), ("base", "bias"), ("scale", "scale"))}
        h = _filled(getattr(modeling, f"{prefix}HyperHead")(config), **own)(x)
    logits = model.final_norm(h) @ w["head.weight"].T
    torch.testing.assert_close(model(tokens), logits, atol=5e-5, rtol=0)


# What must always hold.


@every_way
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_names_shapes_dtypes_are_those_of_the_table(way, dtype):
    g = graph(STACK, **options(way))
    table = all_weights(g)
    model = build(g, dtype=dtype, device="meta")
    narrow = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert {p: (tuple(t.shape), t.dtype) for p, t in model.state_dict().items()} == {
        p: (w.shape, torch.float32 if w.fp32 else narrow) for p, w in table.items()
    }
    assert sum(p.numel() for p in model.parameters()) == total(costs(g)).params
    assert {p for p, w in table.items() if w.fp32} == {
        p for p, t in build(g, device="meta").bfloat16().state_dict().items() if t.dtype == torch.float32
    }
    assert not {p for p, w in table.items() if w.decay and p.endswith(("bias", "scale"))}


@every_way
def test_every_weight_learns(way, models):
    model = made(STACK, **options(way)).train()
    model.loss(ids(2, 9)).backward()
    for path, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, path


@every_way
@torch.no_grad()
def test_chunks_documents_and_padding(way, models):
    model, tokens = models[way], ids(2, 12)
    near = dict(atol=5e-5, rtol=1e-4)
    whole, state = model(tokens), model.init_state(2)
    cuts = [0, 5, 6, 7, 12]
    chunks = [model(tokens[:, a:b], state=state) for a, b in zip(cuts, cuts[1:])]
    torch.testing.assert_close(torch.cat(chunks, 1), whole, **near)
    fixed = model.init_state(2, capacity=12)
    steps = [model(tokens[:, t : t + 1], state=fixed) for t in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, **near)
    segments = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [-1] * 3 + [0] * 7 + [-1] * 2])
    packed = model(tokens, segments=segments)
    assert packed.isfinite().all()
    for row, a, b in (0, 0, 5), (0, 5, 9), (0, 9, 12), (1, 3, 10):
        torch.testing.assert_close(packed[row, a:b], model(tokens[row : row + 1, a:b])[0], **near)
    torch.testing.assert_close(model(tokens, last=2), whole[:, -2:], **near)


@every_way
def test_stages_are_the_whole(way, models):
    whole, tokens = models[way], ids(2, 7)
    g = whole.graph
    paths = [node.path for node in g.nodes]
    cuts = [0, 1, 5, 9, len(paths) - 1, len(paths)]
    plan = [paths[a:b] for a, b in zip(cuts, cuts[1:])]
    parts = [shaken(build(g, plan=plan, stage=k).eval()) for k in range(len(plan))]
    out = (tokens,)
    for part in parts:
        assert not isinstance(out, tuple) or len(out) == len(part.stage.takes)
        out = part(*(out if isinstance(out, tuple) else (out,)))
        if isinstance(out, tuple):
            assert out[0].shape == (2, 7, g.streams[part.stage.paths[-1]].given * D_MODEL)
            assert all(x.shape == (2, 7, D_MODEL) for x in out[1:])
    assert torch.equal(out, whole(tokens))


@every_way
def test_recomputing_changes_no_gradient(way):
    residual, narrow = WAYS[way]
    found = []
    for recompute in "false", "true":
        more = f"layer X = M(residual={residual}, recompute={recompute}) layer Y = G(residual={residual})"
        model = made("X Y X", more=more, narrow=narrow).train()
        model.loss(ids(2, 9)).backward()
        found.append({p: t.grad for p, t in model.named_parameters()})
    for path, grad in found[0].items():
        torch.testing.assert_close(found[1][path], grad, atol=1e-6, rtol=1e-5)


@every_way
def test_training_steps_are_traced_whole(way):
    residual, narrow = WAYS[way]
    more = f"layer X = A(residual={residual}) layer Y = G(residual={residual})"
    plain, compiled = (made("X Y", more=more, narrow=narrow).train() for _ in range(2))
    torch._dynamo.reset()
    step = TrainStep(compiled, compile=True, backend="aot_eager")
    torch.testing.assert_close(step.step(ids(2, 9)), plain.loss(ids(2, 9)))
    plain.loss(ids(2, 9)).backward()
    for (path, p), (_, q) in zip(plain.named_parameters(), compiled.named_parameters()):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-6, rtol=1e-4, msg=path)


@every_way
@torch.no_grad()
def test_a_tail_has_streams_of_its_own(way):
    residual, narrow = WAYS[way]
    more = f"layer X = A(residual={residual}) layer Y = G(residual={residual}) mtp(depths=2) {{ X Y }}"
    model, tokens = made("X Y", more=more, narrow=narrow), ids(2, 9)
    assert set(model.state_dict()) == set(all_weights(model.graph))
    n, w = model.graph.streams["mtp.0.in"].given, model.tensors()
    h, x0 = model.hidden(tokens), F.embedding(tokens, w["embed.weight"])
    depth = model.get_submodule("mtp.0")
    x = widen(depth.join(x0[:, 1:], h[:, :-1]), n)
    x = (x,) if model.graph.blocks else x
    for node, sub in model.sublayers():
        if node.depth == 0:
            x = sub(x, None, describe((2, 8)))
    wanted = model.logits(depth.final_norm(depth.narrow(closed(x))))
    torch.testing.assert_close(model.drafts(tokens)[1][:, :-1], wanted, atol=2e-5, rtol=1e-4)
    drafted, alone = (generate(model, tokens.tolist(), max_tokens=5, drafts=drafts) for drafts in (2, 0))
    assert [line.tokens for line in drafted] == [line.tokens for line in alone]


def test_the_streams_have_the_dtype_that_is_asked_for():
    for way in WAYS:
        for residual_dtype, wanted in ("model", torch.bfloat16), ("fp32", torch.float32):
            model = made(STACK, dtype="bf16", residual_dtype=residual_dtype, **options(way))
            seen = []
            for _, sub in model.sublayers():
                sub.register_forward_hook(lambda module, args, out: seen.append(closed(out).dtype))
            assert model(ids(1, 4)).isfinite().all()
            assert set(seen) == {wanted}


@every_way
def test_flops_are_what_is_multiplied(way):
    residual, narrow = WAYS[way]
    g = graph("X X", more=f"layer X = G(residual={residual})", narrow=narrow)
    model, length = build(g), 16
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(ids(2, length))
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    table = costs(g, length=length)
    weights = sum(table[node.path].flops.backward_weight for node in g.nodes)
    assert products == float(weights) * 2 * length
    plain = costs(graph("G G"), length=length)
    assert total(table).flops.forward > total(plain).flops.forward


def test_all_streams_cross_a_cut():
    g = graph("X X", more="layer X = G(residual=mhc(streams=4))")
    units_of = {u.path: u for u in units(g, device=_device(), length=8)}
    plain = {u.path: u for u in units(graph("G G"), device=_device(), length=8)}
    for path in "embed", "stack.0", "stack.1":
        assert units_of[path].out_bytes == 4 * plain[path].out_bytes == 4 * 8 * D_MODEL * 2
    assert {e.width for e in g.edges if e.tensor == "x"} == {4 * D_MODEL}
    again = graph("X X", more="layer X = G(residual=mhc(streams=4), recompute=true)")
    kept = {u.path: u.activation_bytes for u in units(again, device=_device(), length=8)}
    assert kept["stack.0"] == 4 * D_MODEL * 2 * 8


def _device():
    from mambadsl.plan.device import DEVICES

    return DEVICES["h200"]


# What cannot be.

HEAD = "model m { vocab = 50 d_model = 16 } layer F = mlp(d_ff=32) layer M = mamba2(heads=4, head_dim=8) "


@pytest.mark.parametrize("text, said", [
    ("layer H = M(residual=hyper) stack { H F }", "`stack.1` has one residual stream and `stack.0` 4"),
    ("layer H = M(residual=mhc(streams=2)) stack { F H }", "`stack.1` has 2 residual streams and `stack.0` one"),
    ("layer H = M(residual=mhc) layer S = F(residual=aside) stack { H S H }", "`stack.1` has one"),
    ("layer H = M(residual=mhc) stack { H H(residual=mhc(streams=3)) }", "`stack.1` has 3 residual streams"),
    ("layer H = M(residual=mhc) stack { H } mtp() { F }", "`mtp.0.0` has one residual stream"),
])
def test_layers_of_different_streams_are_refused(text, said):
    with pytest.raises(MdlError) as caught:
        load(text=HEAD + text)
    found = [d for d in caught.value.diagnostics if d.severity == "error"]
    assert [d.code.id for d in found] == ["E710"] and said in found[0].message


def test_one_stream_is_not_narrowed():
    with pytest.raises(MdlError, match="every layer has one residual stream"):
        load(text=HEAD.replace("}", "narrow = sum }", 1) + "stack { M F }")


@every_way
def test_the_text_comes_back(way):
    residual, narrow = WAYS[way]
    head = HEAD.replace("}", f"narrow = {narrow} }}", 1)
    program = load(text=head + f"layer H = M(residual={residual}) stack {{ H*3 }}")
    assert load(text=program.expand()).layers == program.layers


def test_every_form_has_a_class():
    from mambadsl.build.sublayer import WAYS

    assert set(WAYS) == set(FORMS)
    assert scaled(1, 1) == 1
