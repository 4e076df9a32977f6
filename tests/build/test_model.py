"""Names, shapes, dtypes and counts; what the forward pass must keep, whatever the layers are."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import D_MODEL, EVERYTHING, MIXERS, VOCAB, graph, ids, made

from mambadsl.build.model import build
from mambadsl.build.state import describe
from mambadsl.files import MODELS
from mambadsl.graph.cost import costs, total
from mambadsl.graph.unroll import unroll
from mambadsl.graph.weights import all_weights
from mambadsl.spec.resolve import resolve
from mambadsl.syntax.read import read
from mambadsl.text.diagnostic import MdlError
from mambadsl.text.source import read as open_file

VARIANTS = {
    "untied": {},
    "tied": dict(tie_embeddings="true"),
    "layernorm": dict(norm="layernorm(eps=1e-5)", residual_dtype="fp32"),
    "rwkv": dict(norm="layernorm(eps=1e-5)", embedding_norm="layernorm(eps=1e-3)"),
    "zaya": dict(embedding_norm="affine", residual_dtype="fp32"),
    "gemma": dict(norm="rmsnorm(zero_centered=true)", embedding_multiplier=4, logits_softcap=5),
}


@pytest.fixture(scope="module")
def everything():
    return made(EVERYTHING)


@pytest.fixture(scope="module")
def mixers():
    return made(MIXERS)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_names_shapes_dtypes_are_those_of_the_table(variant, dtype):
    g = graph(EVERYTHING, **VARIANTS[variant])
    model = build(g, dtype=dtype, device="meta")
    narrow = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    table = all_weights(g)
    wanted = {p: (w.shape, torch.float32 if w.fp32 else narrow, w.trained) for p, w in table.items()}
    parameters = {p: (tuple(t.shape), t.dtype, True) for p, t in model.named_parameters()}
    buffers = {p: (tuple(t.shape), t.dtype, False) for p, t in model.named_buffers()}
    assert {**parameters, **buffers} == wanted
    assert set(model.state_dict()) == set(table)
    assert sum(p.numel() for p in model.parameters()) == total(costs(g)).params
    assert sum(b.numel() for b in model.buffers()) == total(costs(g)).buffers
    assert any(p.startswith("shared.S.") for p in table) and any(p.startswith("shared.B.1.") for p in table)
    assert ("head.weight" in table) == (variant != "tied")


@pytest.mark.parametrize("name", ["nemotron_h_8b", "jamba_v0_1", "falcon_h1_7b", "granite_4_0_h_tiny"])
def test_published_models_have_the_parameters_that_are_counted(name):
    g = unroll(resolve(read(open_file(MODELS / f"{name}.mdl"))))
    model = build(g, device="meta", dtype="bf16")
    assert sum(p.numel() for p in model.parameters()) == total(costs(g)).params > 5e9


def test_nothing_is_made_on_another_device():
    """On the meta device torch refuses to mix."""
    model = build(graph("R M L G Z H"), device="meta")
    tokens = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    state = model.init_state(2)
    for described in dict(segments=tokens), dict(state=state), dict(state=state, valid=tokens == 0, last=1):
        assert model(tokens, **described).device.type == "meta"
    assert model.loss(tokens).device.type == "meta"


def test_logits_have_a_value_for_each_token_and_are_float32():
    for dtype in "fp32", "bf16":
        logits = made("M A", dtype=dtype)(ids(2, 5))
        assert logits.shape == (2, 5, VOCAB) and logits.dtype == torch.float32


def test_softcap_and_multipliers_act_where_they_are_said():
    plain, tokens = made("A"), ids(1, 6)
    capped = made("A", logits_softcap=2, logits_multiplier=3)
    wanted = 2 * torch.tanh(3 * plain(tokens) / 2)
    torch.testing.assert_close(capped(tokens), wanted)
    doubled = made("A", embedding_multiplier=2)
    with torch.no_grad():
        plain.embed.weight.mul_(2)
    torch.testing.assert_close(doubled(tokens), plain(tokens))


def test_last_gives_the_last_logits(everything):
    tokens = ids(2, 7)
    torch.testing.assert_close(everything(tokens, last=2), everything(tokens)[:, -2:])


def test_residual_forms_are_what_they_say():
    """Each form against its formula, from the same module's parts."""
    for letter, form in ("F", "pre"), ("P", "post"), ("W", "sandwich"), ("N", "normed"), ("Narrow", "affine"):
        (_, sub), = made(letter).sublayers()
        x = torch.randn(2, 6, D_MODEL)
        described = describe((2, 6))

        def f(h):
            return sub.mixer(h, described)

        wanted = {
            "pre": lambda: x + f(sub.norm(x)),
            "post": lambda: x + sub.norm(f(x)),
            "sandwich": lambda: x + sub.post_norm(f(sub.norm(x))),
            "normed": lambda: 1.5 * sub.norm(x) + 0.5 * f(sub.norm(x)),
            "affine": lambda: (f(sub.norm(x)) + sub.residual.out_affine.bias) * sub.residual.out_affine.weight
            + (x + sub.residual.stream_affine.bias) * sub.residual.stream_affine.weight,
        }[form]()
        torch.testing.assert_close(sub(x, None, described), wanted)


def test_what_is_given_aside_is_read_by_the_next_layer():
    """Zamba's block: x + mamba(norm(x + t)), t = Proj(Side(x, x0)), without additions inside."""
    model, tokens, described = made("F Side Proj M"), ids(2, 6), describe((2, 6))
    ff, side, proj, scan = (sub for _, sub in model.sublayers())
    x0 = model.embed.weight[tokens]
    x = ff(x0, x0, described)
    t = proj.mixer(side.mixer(side.norm(torch.cat([x, x0], -1)), described), described)
    torch.testing.assert_close(side(x, x0, described), side.mixer(side.norm(torch.cat([x, x0], -1)), described))
    wanted = x + scan.mixer(scan.norm(x + t), described)
    torch.testing.assert_close(scan(x, x0, described, t_BTD=t), wanted)
    logits = model.final_norm(wanted) @ (model.embed if model.graph.tied else model.head).weight.T
    torch.testing.assert_close(model(tokens), logits)


def test_a_sum_has_one_norm_and_its_own_multipliers():
    (_, sub), = made("H").sublayers()
    x, tokens = torch.randn(2, 6, D_MODEL), describe((2, 6))
    h = sub.norm(x)
    wanted = x + 0.3 * sub.get_submodule("0")(1.25 * h, tokens) + 0.9 * sub.get_submodule("1")(h, tokens)
    torch.testing.assert_close(sub(x, None, tokens), wanted)


@pytest.mark.parametrize("stack", ["M Z", "M S F S"])
def test_the_first_embedding_is_carried(stack):
    model, tokens, described = made(stack, embedding_multiplier=3), ids(2, 5), describe((2, 5))
    x = x0 = 3 * model.embed.weight[tokens]
    for node, sub in model.sublayers():
        h = torch.cat((x, x0), -1) if node.layer.sub.input == "with_embedding" else x
        mixer, = sub.mixer_modules()
        x = x + mixer(sub.norm(h), described)
    torch.testing.assert_close(model(tokens), model.final_norm(x) @ model.head.weight.T)


def test_shared_layers_are_one_and_keep_their_own_state():
    model = made("S M S")
    tokens = ids(1, 8)
    state = model.init_state(1)
    assert {"stack.0", "stack.1", "stack.2"} == set(state.layers)
    whole = model(tokens)
    parts = [model(tokens[:, :3], state=state), model(tokens[:, 3:], state=state)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, 12), max_size=4, unique=True).map(sorted), seed=st.integers(0, 99))
def test_chunks_with_a_state_equal_the_whole(mixers, cuts, seed):
    tokens = ids(2, 13, seed=seed)
    state = mixers.init_state(2)
    with torch.no_grad():
        whole = mixers(tokens)
        chunks = [mixers(tokens[:, a:b], state=state) for a, b in zip([0, *cuts], [*cuts, 13])]
    torch.testing.assert_close(torch.cat(chunks, 1), whole, atol=5e-5, rtol=1e-4)
    assert state.position_B.tolist() == [13, 13]


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_packed_documents_equal_separate_ones(everything, lengths, seed):
    documents = [ids(1, n, seed=seed + i) for i, n in enumerate(lengths)]
    segments = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], 1)
    with torch.no_grad():
        packed = everything(torch.cat(documents, 1), segments=segments)
        separate = torch.cat([everything(d) for d in documents], 1)
    torch.testing.assert_close(packed, separate, atol=5e-5, rtol=1e-4)


SIDES = st.tuples(st.integers(0, 4), st.integers(0, 4))


@settings(max_examples=8, deadline=None)
@given(pads=st.lists(SIDES, min_size=2, max_size=3), seed=st.integers(0, 99))
def test_padded_rows_equal_unpadded_ones(everything, pads, seed):
    length = 9
    valid = torch.zeros(len(pads), length, dtype=torch.bool)
    for row, (left, right) in enumerate(pads):
        valid[row, left : length - right] = True
    tokens = ids(len(pads), length, seed=seed)
    with torch.no_grad():
        padded = everything(tokens, valid=valid)
        assert padded.isfinite().all()
        for row in range(len(pads)):
            alone = everything(tokens[row : row + 1, valid[row]])
            torch.testing.assert_close(padded[row, valid[row]], alone[0], atol=5e-5, rtol=1e-4)


def test_packed_chunks_go_on_in_their_documents(mixers):
    """Documents that cross a chunk's border, chunks of nothing but padding, and rows that differ."""
    tokens = ids(2, 10)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2], [-1, -1, -1, -1, 0, 0, 0, 0, 0, 1]])
    with torch.no_grad():
        whole = mixers(tokens, segments=segments)
        state = mixers.init_state(2)
        chunks = [
            mixers(tokens[:, a:b], segments=segments[:, a:b], state=state)
            for a, b in ((0, 3), (3, 5), (5, 6), (6, 10))
        ]
    real = segments >= 0
    torch.testing.assert_close(torch.cat(chunks, 1)[real], whole[real], atol=5e-5, rtol=1e-4)
    assert state.position_B.tolist() == [3, 1] and state.segment_B.tolist() == [2, 1]


def test_a_copy_of_a_state_is_a_snapshot(mixers):
    tokens = ids(1, 9)
    with torch.no_grad():
        state = mixers.init_state(1)
        mixers(tokens[:, :4], state=state)
        kept, spoilt = state.copy(), state.copy()
        for tensor in (t for layer in spoilt.layers.values() for t in layer.values()):
            tensor.zero_()
        first = mixers(tokens[:, 4:], state=state)
        torch.testing.assert_close(first, mixers(tokens)[:, 4:], atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(mixers(tokens[:, 4:], state=kept), first, atol=0, rtol=0)


def test_bf16_is_near_fp32():
    tokens = ids(2, 8)
    for stack, limit in ("R M A L F G P W N Z C H B S", 0.06), ("M A", 0.03):
        with torch.no_grad():
            wide = made(stack, jitter=False)(tokens)
            narrow = made(stack, jitter=False, dtype="bf16")(tokens)
            mixed = made(stack, jitter=False, dtype="bf16", residual_dtype="fp32")(tokens)
        for logits in narrow, mixed:
            assert ((logits - wide).abs().mean() / wide.abs().mean()).item() < limit


def test_the_stream_has_the_dtype_that_is_asked_for():
    for residual_dtype, wanted in ("model", torch.bfloat16), ("fp32", torch.float32):
        model = made("M A F P W N H", dtype="bf16", residual_dtype=residual_dtype)
        seen, inside = [], []
        for _, sub in model.sublayers():
            sub.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
            for mixer in sub.mixer_modules():
                mixer.register_forward_hook(lambda module, args, out: inside.append(out.dtype))
        model(ids(1, 4))
        assert set(seen) == {wanted} and set(inside) == {torch.bfloat16}


def test_recompute_gives_the_same_gradients():
    for stack in "C F", "M F":
        model = made(stack).train()
        model.loss(ids(2, 9)).backward()
        found = {p: t.grad for p, t in model.named_parameters()}
        if stack == "C F":
            recomputed = found
    for path, grad in found.items():
        torch.testing.assert_close(recomputed[path], grad, atol=0, rtol=0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made("C C").train()(ids(1, 8))
        kept = len(saved)
        saved.clear()
        made("M M").train()(ids(1, 8))
    assert kept < len(saved) / 2, "recompute keeps less"


def test_dropout_only_in_training():
    model = made("D", more="layer D = F(dropout=0.5)")
    tokens = ids(1, 6)
    torch.testing.assert_close(model(tokens), model(tokens), atol=0, rtol=0)
    torch.manual_seed(0)
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_every_weight_gets_a_gradient(everything):
    model = copy.deepcopy(everything).train()
    loss = model.loss(ids(3, 12))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.dim() == 0
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), path
        assert parameter.grad.abs().sum() > 0 or ".experts." in path, path


def test_loss_ignores_padding_and_other_documents():
    model, tokens = made("M A"), ids(1, 8)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, -1, -1]])
    logits = model(tokens, segments=segments)
    logp = logits.log_softmax(-1)
    counted = [0, 1, 3, 4]
    wanted = -sum(logp[0, t, tokens[0, t + 1]] for t in counted) / len(counted)
    torch.testing.assert_close(model.loss(tokens, segments=segments), wanted)
    valid = torch.tensor([[True] * 6 + [False] * 2])
    plain = model.loss(tokens[:, :6])
    torch.testing.assert_close(model.loss(tokens, valid=valid), plain)
    targets = torch.full_like(tokens, -1)
    assert model.loss(tokens, targets).item() == 0
    targets[0, 2] = 5
    torch.testing.assert_close(model.loss(tokens, targets), -model(tokens).log_softmax(-1)[0, 2, 5])


def test_float32_weights_stay_so():
    model = made("M R E", dtype="fp32")
    before = {p: t.clone() for p, t in model.tensors().items()}
    for narrowed in copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model).half():
        for path, tensor in narrowed.tensors().items():
            wide = model.weights[path].fp32
            assert (tensor.dtype == torch.float32) == wide, path
            if wide:
                assert torch.equal(tensor, before[path])
    part = copy.deepcopy(model)
    part.stack.bfloat16()
    assert part.tensors()["stack.0.mixer.A_log"].dtype == torch.float32
    assert part.tensors()["stack.0.mixer.in_proj.weight"].dtype == torch.bfloat16
    assert copy.deepcopy(model).double().tensors()["stack.0.mixer.A_log"].dtype == torch.float64
    logits = copy.deepcopy(model).bfloat16()(ids(1, 5))
    torch.testing.assert_close(logits, model(ids(1, 5)), atol=0.2, rtol=0.2)


def test_autocast_and_compile_run():
    model, tokens = made("M A F"), ids(1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(tokens)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, model(tokens), atol=0.15, rtol=0.15)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))


def test_a_failure_names_the_layer_and_its_place():
    model = made("[M F]*2 A")
    model.stack["3"].mixer.f = None
    with pytest.raises(AttributeError) as caught:
        model(ids(1, 4))
    notes = "\n".join(caught.value.__notes__)
    assert "in layer `stack.3` (`F`)" in notes and "used at small.mdl:" in notes
    assert "2 of 2" in notes and "layer F = mlp(d_ff=20, act=relu2)" in notes


def test_wrong_inputs_are_told_apart():
    model = made("M A")
    with pytest.raises(ValueError, match=f"from 0 to {VOCAB - 1}"):
        model(torch.tensor([[1, VOCAB]]))
    with pytest.raises(ValueError, match=r"tokens \[batch, time\]"):
        model(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="segments.*must be"):
        model(ids(2, 4), segments=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="must not go down"):
        model(ids(1, 4), segments=torch.tensor([[0, 1, 0, 0]]))
    with pytest.raises(ValueError, match="1 rows"):
        model(ids(2, 4), state=model.init_state(1))
    for dtype in "fp7", 3, torch.int32:
        with pytest.raises(ValueError, match="dtype"):
            build(graph("M"), dtype=dtype)
    with pytest.raises(ValueError, match="`abacus` cannot be used"):
        build(graph("M"), device="abacus")
    for tokens, words in ([[1, 2]], "not list"), (ids(1, 2).to(torch.int8), "int64 or int32"):
        with pytest.raises(TypeError, match=words):
            model(tokens)
    with pytest.raises(TypeError, match="`segments` must be a tensor"):
        model(ids(1, 2), segments=[[0, 1]])
    with pytest.raises(TypeError, match="`init_state`"):
        model(ids(1, 2), state={})
    with pytest.raises(ValueError, match="at least 1, not 0"):
        model(ids(1, 2), last=0)
    with pytest.raises(ValueError, match="at least one row"):
        model.init_state(0)


def test_wrong_targets_are_told_apart():
    model = made("M A")
    with pytest.raises(ValueError, match=f"less than {VOCAB}.*there is {VOCAB + 3}"):
        model.loss(ids(1, 2), torch.tensor([[1, VOCAB + 3]]))
    with pytest.raises(ValueError, match=r"targets must be \[1, 2\]"):
        model.loss(ids(1, 2), torch.tensor([[1]]))
    paths = [node.path for node in model.graph.nodes]
    part = build(model.graph, plan=[paths[:2], paths[2:]], stage=0)
    with pytest.raises(ValueError, match="of a whole model"):
        part.loss(ids(1, 2))


def test_what_is_not_built_is_said():
    def refused(stack, more="", **options):
        with pytest.raises(MdlError) as caught:
            build(graph(stack, more=more), device="meta", **options)
        return caught.value.diagnostics

    adapted, = refused("M T M T", "layer T = R(adapter=lora(rank=2))")
    assert adapted.code.id == "E901" and "`x_proj` and `dt_proj` in layer `stack.1`" in adapted.message
    assert adapted.span.line > 1
    tail, = refused("M", "layer T = R(adapter=lora(rank=2)) mtp { T }")
    assert tail.code.id == "E901" and "mtp.0.0" in tail.message and tail.span is not None
    fitting, = refused("V", "layer V = A(input=with_embedding, residual=normed)")
    assert fitting.code.id == "E906"
    if not torch.cuda.is_available():
        missing = refused("M", parts="fused")
        assert {d.code.id for d in missing} == {"E902"} and all("not on cpu" in d.notes[0] for d in missing)
        slots = ["model.norm", "model.loss", "mamba2.conv", "mamba2.scan", "mamba2.gate_norm"]
        assert [d.message.split("`")[1] for d in missing] == slots
    unknown, = refused("M", parts="refrence")
    assert unknown.code.id == "E902" and "reference" in unknown.help[0]


def test_auto_says_what_it_chose():
    found = build(graph("M"), parts="auto", device="meta").assignment
    assert found.asked == "auto" and all(c.why for row in found.rows for c in row.choices)
    if not torch.cuda.is_available():
        assert found.used == ("reference",)
