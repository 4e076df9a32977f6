"""Meta tokens: learned vectors before every document, which no caller sees."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import D_MODEL, VOCAB, graph, ids, made, shaken

from mambadsl.build.loss import IGNORE, cross_entropy, next_tokens
from mambadsl.build.meta import ahead, packed
from mambadsl.build.model import build
from mambadsl.build.state import describe
from mambadsl.compile import load
from mambadsl.graph.cost import costs, total
from mambadsl.graph.weights import all_weights, node_weights
from mambadsl.kinds.tokens import PADDING
from mambadsl.plan.device import DEVICES
from mambadsl.plan.from_graph import units
from mambadsl.run.decode import Decoder
from mambadsl.run.generate import generate
from mambadsl.run.step import TrainStep
from mambadsl.text.diagnostic import MdlError

M = 3
#: Attention, also through a window that sees the meta tokens, recurrences, the first embedding, a shared block.
STACK = "A R K M Delta Z B Unit F B Conv"
MORE = f"layer K = L(keep={M})"
NEAR = dict(atol=5e-5, rtol=1e-4)


def meta(stack: str = STACK, **options):
    return made(stack, more=options.pop("more", MORE), meta_tokens=M, **options)


@pytest.fixture(scope="module")
def model():
    return meta()


def by_hand(model, tokens_T):
    """Logits of one document [T, V]: the model without meta tokens, on rows that begin with their vectors."""
    w, (T,) = model.tensors(), tokens_T.shape
    x = x0 = torch.cat((w["meta.weight"], w["embed.weight"][tokens_T]))[None]
    for _, sublayer in model.sublayers():
        x = sublayer(x, x0, describe((1, M + T)))
    return (model.final_norm(x) @ w["head.weight"].T)[0, M:]


# What is computed.


def test_rows_begin_with_the_vectors(model):
    tokens = ids(2, 9)
    assert model.tensors()["meta.weight"].shape == (M, D_MODEL)
    with torch.no_grad():
        logits = model(tokens)
        assert logits.shape == (2, 9, VOCAB)
        for row in range(2):
            torch.testing.assert_close(logits[row], by_hand(model, tokens[row]), **NEAR)
        assert (logits - made(STACK, more=MORE)(tokens)).abs().max() > 0.01


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 4), length=st.integers(1, 9))
def test_packed_rows_are_laid_out_as_by_hand(data, count, length):
    documents = st.lists(st.sampled_from([PADDING, 0, 1, 2, 3]), min_size=length, max_size=length)
    rows = []
    for _ in range(2):
        row = data.draw(documents)
        rising = sorted(d for d in row if d != PADDING)
        rows.append([PADDING if d == PADDING else rising.pop(0) for d in row])
    segments = torch.tensor(rows)
    found = packed(describe((2, length), segments=segments), count)
    wanted = []
    for row in rows:
        places, seen, at = [], set(), {}
        for t, document in enumerate(row):
            if document != PADDING and document not in seen:
                seen.add(document)
                places += [(document, m, length + m) for m in range(count)]
                at[document] = count
            position = at[document] if document != PADDING else None
            places.append((document, position, t))
            if document != PADDING:
                at[document] += 1
        wanted.append(places)
    longest = max(map(len, wanted))
    assert found.tokens.length == longest
    for b, places in enumerate(wanted):
        for u in range(longest):
            document, position, origin = places[u] if u < len(places) else (PADDING, None, None)
            assert found.tokens.segments_BT[b, u] == document
            if document != PADDING:
                assert (found.tokens.positions_BT[b, u], found.from_BU[b, u]) == (position, origin)
    x = torch.randn(2, length, 5)
    assert torch.equal(found.strip(found.insert(x, torch.randn(count, 5))), x)


@torch.no_grad()
def test_packed_documents_equal_separate_ones(model):
    lengths = [[4, 1, 5, 2], [7, 5]]
    documents = [[ids(1, n, seed=7 * b + i) for i, n in enumerate(row)] for b, row in enumerate(lengths)]
    tokens = torch.cat([torch.cat(row, 1) for row in documents])
    numbers = [[i + 2 for i, n in enumerate(row) for _ in range(n)] for row in lengths]
    found = model(tokens, segments=torch.tensor(numbers))
    separate = torch.cat([torch.cat([model(d) for d in row], 1) for row in documents])
    torch.testing.assert_close(found, separate, **NEAR)


@torch.no_grad()
def test_padded_rows_equal_unpadded_ones(model):
    tokens, valid = ids(3, 9), torch.ones(3, 9, dtype=torch.bool)
    valid[0, :4], valid[1, 6:], valid[2, :2], valid[2, 7:] = False, False, False, False
    segments = torch.where(valid, 0, PADDING)
    for what in dict(valid=valid), dict(segments=segments):
        padded = model(tokens, **what)
        assert padded.isfinite().all() and padded.shape == (3, 9, VOCAB)
        for row in range(3):
            alone = model(tokens[row : row + 1, valid[row]])
            torch.testing.assert_close(padded[row, valid[row]], alone[0], **NEAR)


@torch.no_grad()
def test_positions_are_counted_in_the_document(model):
    tokens = ids(2, 6)
    torch.testing.assert_close(model(tokens, positions=torch.arange(6)), model(tokens), **NEAR)
    torch.testing.assert_close(model(tokens, last=2), model(tokens)[:, -2:], **NEAR)


# The state.


@torch.no_grad()
@pytest.mark.parametrize("capacity", [None, 12])
def test_chunks_and_steps_equal_the_whole(model, capacity):
    tokens = ids(2, 12)
    whole = model(tokens)
    for cuts in [0, 12], [0, 5, 6, 12], list(range(13)):
        state = model.init_state(2, capacity=capacity)
        assert state.empty
        chunks = [model(tokens[:, a:b], state=state) for a, b in zip(cuts, cuts[1:])]
        torch.testing.assert_close(torch.cat(chunks, 1), whole, **NEAR)
        assert state.position_B.tolist() == [M + 12] * 2 and not state.empty
    if capacity:
        with pytest.raises(ValueError, match="do not fit"):
            model(tokens[:, :1], state=state)
        with pytest.raises(ValueError, match="do not fit"):
            model(ids(2, 13), state=model.init_state(2, capacity=12))
        state.clear()
        torch.testing.assert_close(model(tokens, state=state), whole, **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("capacity", [None, 12])
def test_left_padding_over_chunks(model, capacity):
    """A row of which the first chunk has nothing but padding begins later, and has the meta tokens before it all the
    same; a copy goes on alike."""
    tokens, valid = ids(2, 12), torch.ones(2, 12, dtype=torch.bool)
    valid[0, :7] = False
    state = model.init_state(2, capacity=capacity)
    chunks = [model(tokens[:, a:b], valid=valid[:, a:b], state=state) for a, b in ((0, 5), (5, 9))]
    kept = state.copy()
    chunks.append(model(tokens[:, 9:], valid=valid[:, 9:], state=state))
    found = torch.cat(chunks, 1)
    torch.testing.assert_close(found[0, 7:], model(tokens[:1, 7:])[0], **NEAR)
    torch.testing.assert_close(found[1], model(tokens[1:])[0], **NEAR)
    torch.testing.assert_close(model(tokens[:, 9:], valid=valid[:, 9:], state=kept), chunks[-1], atol=0, rtol=0)


def test_packed_rows_and_a_state_are_refused(model):
    with pytest.raises(ValueError, match="one document each where there are meta tokens"):
        model(ids(1, 4), segments=torch.zeros(1, 4, dtype=torch.int64), state=model.init_state(1))


def test_generated_text_goes_on_from_the_whole(model):
    prompts = [[5, 7, 9, 11], [3]]
    found = generate(model, prompts, max_tokens=6)
    with Decoder(model, batch=2, capacity=12, prefill_chunk=3) as decoder:
        assert decoder.capacity == 12
        for _ in range(2):
            decoder.prefill(prompts)
            assert [line.tokens for line in decoder.run(6)] == [line.tokens for line in found]
    for prompt, line in zip(prompts, found):
        written = list(prompt)
        with torch.no_grad():
            for _ in range(6):
                written.append(int(model(torch.tensor([written]))[0, -1].argmax()))
        assert tuple(written[len(prompt) :]) == line.tokens


# Training.


def test_the_loss_is_of_real_tokens_and_the_vectors_learn():
    model, tokens = meta().train(), ids(2, 9)
    segments = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [-1] * 2])
    for what in dict(segments=segments), {}:
        model.zero_grad()
        loss = model.loss(tokens, **what)
        targets = next_tokens(tokens, **what)
        assert (targets == IGNORE).sum() > 0
        torch.testing.assert_close(loss, cross_entropy(model(tokens, **what), targets, **what))
        loss.backward()
        for path, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, path


def test_multipliers_and_norms_of_embeddings_are_not_the_vectors():
    plain = meta("A F", more="")
    doubled = meta("A F", more="", embedding_multiplier=2)
    with torch.no_grad():
        plain.embed.weight.mul_(2)
        torch.testing.assert_close(doubled(ids(1, 5)), plain(ids(1, 5)))
    wide = dict(embedding_norm="layernorm", dtype="bf16", residual_dtype="fp32")
    assert meta("A F", more="", **wide)(ids(1, 5)).isfinite().all()


def test_a_tail_reads_real_tokens():
    model, tokens = meta(more=MORE + " mtp(depths=2) { Z A }"), ids(2, 9)
    assert [d.shape for d in model.drafts(tokens)] == [(2, 9, VOCAB)] * 3
    with torch.no_grad():
        h = model.hidden(tokens)
        ahead_1 = model.ahead(0, tokens[:, 1:], h[:, :-1])
        torch.testing.assert_close(model.logits(ahead_1), model.drafts(tokens)[1][:, :-1], **NEAR)
    drafted, alone = (generate(model, tokens.tolist(), max_tokens=5, drafts=drafts) for drafts in (2, 0))
    assert [line.tokens for line in drafted] == [line.tokens for line in alone]
    model.train().loss(tokens).backward()


@torch.no_grad()
def test_streams_have_them_too():
    residual = "residual=mhc(streams=2)"
    model, tokens = meta("X Y", more=f"layer X = A({residual}) layer Y = M({residual})"), ids(2, 6)
    state = model.init_state(2)
    chunks = [model(tokens[:, a:b], state=state) for a, b in ((0, 4), (4, 6))]
    torch.testing.assert_close(torch.cat(chunks, 1), model(tokens), **NEAR)


@pytest.mark.parametrize("what", [{}, dict(segments=torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [-1] * 2]))])
def test_training_steps_are_traced_whole(what):
    plain, compiled = (meta("A K F", more=MORE).train() for _ in range(2))
    torch._dynamo.reset()
    step = TrainStep(compiled, compile=True, backend="aot_eager")
    torch.testing.assert_close(step.step(ids(2, 9), **what), plain.loss(ids(2, 9), **what))


# Stages.


KEYS = f"layer Gv = A(window=3, keep={M}, gives=kv) layer Tk = A(window=2, keep={M}, takes=kv)"


@torch.no_grad()
@pytest.mark.parametrize("stack, more", [(STACK, MORE), ("M Gv Tk M F Tk Conv A", KEYS)])
def test_stages_are_the_whole(stack, more):
    model = meta(stack, more=more)
    g = model.graph
    paths = [node.path for node in g.nodes]
    cuts = [0, 1, 3, 6, len(paths)]
    plan = [paths[a:b] for a, b in zip(cuts, cuts[1:])]
    parts = [shaken(build(g, plan=plan, stage=k).eval()) for k in range(len(plan))]
    assert ["meta.weight" in part.weights for part in parts] == [True, False, False, False]

    def run(tokens, states=None, **what):
        out = (tokens,)
        for k, part in enumerate(parts):
            out = part(*out, **what, **({} if states is None else dict(state=states[k])))
        return out

    tokens = ids(2, 7)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [-1, -1, 0, 0, 0, 0, 0]])
    assert torch.equal(run(tokens), model(tokens))
    assert parts[0](tokens)[0].shape == (2, M + 7, D_MODEL)
    real = segments >= 0
    assert torch.equal(run(tokens, segments=segments)[real], model(tokens, segments=segments)[real])
    valid = segments[1:].expand(2, 7) >= 0
    assert torch.equal(run(tokens, valid=valid)[valid], model(tokens, valid=valid)[valid])
    for capacity in None, 7:
        state = model.init_state(2, capacity=capacity)
        states = [part.init_state(2, capacity=capacity) for part in parts]
        for a, b in (0, 4), (4, 5), (5, 7):
            assert torch.equal(run(tokens[:, a:b], states), model(tokens[:, a:b], state=state))


# What it costs.


def test_costs_count_them():
    plain, with_meta = graph("A M F"), graph("A M F", meta_tokens=4)
    few, many = costs(plain, length=12), costs(with_meta, length=8)
    for path in "stack.0", "stack.1", "stack.2":
        # A row of 8 tokens has the layers' work of 12.
        assert 8 * many[path].flops.forward == 12 * few[path].flops.forward
        assert 8 * many[path].saved_bytes_per_token == 12 * few[path].saved_bytes_per_token
        assert many[path].kv_bytes_per_token == few[path].kv_bytes_per_token
        kept = few[path].state_bytes + 4 * few[path].kv_bytes_per_token
        assert many[path].state_bytes == kept
    assert many["head"] == few["head"]
    assert total(many).params == total(few).params + 4 * D_MODEL
    assert dict(node_weights(with_meta, with_meta.nodes[0]))["meta.weight"].shape == (4, D_MODEL)
    chain = {u.path: u for u in units(with_meta, device=DEVICES["h200"], length=8)}
    assert chain["stack.0"].out_bytes == 12 * D_MODEL * 2


def test_a_window_keeps_the_first_tokens():
    layers = "layer X = A(window=3, keep=2) layer Y = A(window=5)"
    cost, full = (costs(graph(name, more=layers), length=8)["stack.0"] for name in "XY")
    assert cost.state_bytes == full.state_bytes
    # Tokens see 1, 2, 3, 4, 5, 5, 5, 5.
    assert cost.flops.forward == full.flops.forward


@torch.no_grad()
def test_a_window_sees_the_first_tokens_of_its_document():
    model, tokens = made("X", more="layer X = A(window=2, keep=2, rope=none)"), ids(1, 9)
    w, (_, sub), = model.tensors(), next(model.sublayers())
    x = F.embedding(tokens, w["embed.weight"])
    described = describe((1, 9))
    for t in range(9):
        seen = sorted({p for p in (0, 1, t - 1, t) if 0 <= p <= t})
        y = sub(x[:, seen], None, describe((1, len(seen))))
        whole = sub(x, None, described)
        torch.testing.assert_close(whole[:, t], y[:, -1], **NEAR)
    state = model.init_state(1)
    parts = [model(tokens[:, t : t + 1], state=state) for t in range(9)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), **NEAR)
    assert state.layers["stack.0"]["k"].shape[1] == 3


def test_ahead_leaves_the_rows_alone():
    rows = ahead(describe((2, 3), valid=torch.tensor([[0, 1, 1], [1, 1, 0]])), 2)
    assert rows.tokens.segments_BT.tolist() == [[0, 0, -1, 0, 0], [0, 0, 0, 0, -1]]
    assert rows.tokens.positions_BT[0, 3:].tolist() == [2, 3]


# What cannot be, and the text.


def test_tokens_that_no_window_loses_are_not_kept():
    with pytest.raises(MdlError, match="`keep` needs a `window`"):
        load(text="layer A = attention(keep=4) layer M = mamba2() stack { M M A M }")


def test_the_text_comes_back():
    text = """
    model h { vocab = 50 d_model = 16 meta_tokens = 4 }
    layer M = mamba2(heads=4, head_dim=8)
    layer A = attention(heads=4, window=8, keep=meta_tokens)
    stack { M A }
    """
    program = load(text=text)
    assert program.layers.layers[1].layer.branches[0].fields.keep == 4
    assert load(text=program.expand()).layers == program.layers
    assert "meta.weight" in all_weights(program.layers)
