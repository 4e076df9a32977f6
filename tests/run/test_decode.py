"""The decoding engine writes what whole forward passes do: fixed states, blocks, sampling where the logits are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import EVERYTHING, MIXERS, TAKERS, VOCAB, ids, made

from mambadsl.build.init import generator_of
from mambadsl.kinds.state import FixedState
from mambadsl.run.decode import Decoder, obstacles
from mambadsl.run.generate import generate
from mambadsl.run.sample import Sampling, draw, sample, uniforms
from mambadsl.run.stop import Step

PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11], [3, 3]]


@pytest.fixture(scope="module")
def model():
    return made(MIXERS, tie_embeddings="true")


def decoded(model, prompts, count, *, seed=0, stop=(), **how):
    capacity = max(map(len, prompts)) + count - 1
    with Decoder(model, batch=len(prompts), capacity=capacity, **how) as decoder:
        decoder.prefill(prompts, seed=seed)
        return decoder.run(count, stop=stop)


@torch.no_grad()
def uncached(model, prompt, count) -> tuple[int, ...]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


ALONE = sorted(set(MIXERS.split()) - TAKERS)


@pytest.mark.parametrize("stack", [*ALONE, "Giver Memory", "Lends Borrows M+Near", "F M A", EVERYTHING])
def test_greedy_is_the_uncached_text(stack):
    model = made(stack, tie_embeddings="true")
    wanted = [uncached(model, p, 6) for p in PROMPTS]
    for chunk in (1, 3, 2048):
        found = decoded(model, PROMPTS, 6, prefill_chunk=chunk)
        assert [one.tokens for one in found] == wanted
    assert {one.ended for one in found} == {"length"}


DRAWS = [
    dict(temperature=1.0), dict(temperature=0.7, top_k=8), dict(temperature=1.3, top_p=0.8),
    dict(temperature=1.1, top_k=20, top_p=0.9), dict(temperature=2.0, top_k=999),
]


@pytest.mark.parametrize("how", DRAWS)
def test_draws_are_those_of_generate(model, how):
    wanted = generate(model, PROMPTS, max_tokens=7, seed=5, **how)
    assert decoded(model, PROMPTS, 7, seed=5, **how) == wanted
    assert decoded(model, PROMPTS, 7, seed=6, **how) != wanted
    assert decoded(model, PROMPTS[:2], 7, seed=5, **how) == wanted[:2]


def test_stops_are_those_of_generate(model):
    text = generate(model, PROMPTS, max_tokens=16)[2].tokens
    for stop in [text[3]], [text[7:9], text[12]], [text[14:]]:
        wanted = generate(model, PROMPTS, max_tokens=16, stop=stop)
        assert decoded(model, PROMPTS, 16, stop=stop) == wanted


def test_one_decoder_for_many_prompts_and_calls(model):
    others = [[5, 5], [1, 2, 3], [60], [0, 1]]
    with Decoder(model, batch=4, capacity=20) as decoder:
        places = [t.data_ptr() for t in decoder.state.tensors()]
        for prompts in PROMPTS, others, PROMPTS:
            wanted = [one.tokens for one in generate(model, prompts, max_tokens=9)]
            decoder.prefill(prompts)
            parts = [decoder.run(n) for n in (1, 3, 5)]
            assert [sum((p[row].tokens for p in parts), ()) for row in range(4)] == wanted
        assert [t.data_ptr() for t in decoder.state.tensors()] == places


def test_two_decoders_do_not_disturb_each_other(model):
    with Decoder(model, batch=1, capacity=30) as one, Decoder(model, batch=4, capacity=30) as four:
        one.prefill(PROMPTS[:1])
        four.prefill(PROMPTS)
        steps = zip(one.steps(9), (s for s in four.steps(9) if s.row == 0))
        assert all(a == b for a, b in steps)


def test_every_step_is_heard_once(model):
    heard: list[Step] = []
    with Decoder(model, batch=4, capacity=40) as decoder:
        decoder.prefill(PROMPTS)
        found = decoder.run(21, stream=heard.append)
    for row, one in enumerate(found):
        assert tuple(s.token for s in heard if s.row == row) == one.tokens


def test_more_than_the_capacity_is_refused_before_anything_is_written(model):
    with Decoder(model, batch=1, capacity=8) as decoder:
        with pytest.raises(ValueError, match="prefill"):
            decoder.run(1)
        with pytest.raises(ValueError, match="9 tokens does not fit into a capacity of 8"):
            decoder.prefill([[1] * 9])
        with pytest.raises(ValueError, match="batch of 1, not of 2"):
            decoder.prefill([[1], [2]])
        decoder.prefill([[1, 2, 3, 4, 5]])
        before = [t.clone() for t in decoder.state.tensors()]
        with pytest.raises(ValueError, match="4 tokens after 5 do not fit .* 8"):
            decoder.run(5)
        assert all(torch.equal(a, b) for a, b in zip(before, decoder.state.tensors()))
        assert decoder.run(4)[0].tokens == uncached(model, [1, 2, 3, 4, 5], 4)
    with Decoder(model, batch=1, capacity=1) as decoder:
        decoder.prefill([[4]])
        assert decoder.run(1)[0].tokens == uncached(model, [4], 1)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_fixed_state_in_chunks_is_the_whole(data):
    model = made("M L A R")
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    T, B = max(lengths), len(lengths)
    cuts = sorted(data.draw(st.sets(st.integers(1, T), max_size=4)) - {T})
    valid = torch.arange(T) >= T - torch.tensor(lengths)[:, None]
    tokens, state = ids(B, T, seed=T), model.init_state(B, capacity=T + data.draw(st.integers(0, 3)))
    with torch.no_grad():
        wanted = model(tokens, valid=valid)
        found = [
            model(tokens[:, a:b], valid=valid[:, a:b], state=state) for a, b in zip([0, *cuts], [*cuts, T])
        ]
    found = torch.cat(found, 1)
    assert found.isfinite().all()
    torch.testing.assert_close(found[valid], wanted[valid], atol=2e-5, rtol=1e-4)
    assert state.position_B.tolist() == lengths
    assert state.layers["stack.1"]["used"].tolist() == lengths


def test_what_a_fixed_state_refuses(model):
    state, tokens = model.init_state(2, capacity=6), ids(2, 4)
    with pytest.raises(ValueError, match="one document each"):
        model(tokens, segments=torch.zeros(2, 4), state=state)
    with torch.no_grad():
        model(tokens, state=state)
    with pytest.raises(ValueError, match="4 tokens after 4 do not fit"):
        model(tokens, state=state)
    with pytest.raises(ValueError, match="at least one token"):
        model.init_state(2, capacity=0)
    with pytest.raises(ValueError, match="growing"):
        model.init_state(2).clear()


def test_a_snapshot_is_left_alone(model):
    state = model.init_state(2, capacity=9)
    with torch.no_grad():
        model(ids(2, 4), state=state)
        kept = state.copy()
        wanted = model(ids(2, 3, seed=1), state=state)
        assert state.room.used == 7 and kept.room.used == 4
        assert all(isinstance(layer, FixedState) and layer.room is kept.room for layer in kept.layers.values())
        assert torch.equal(model(ids(2, 3, seed=1), state=kept), wanted)


def test_dtypes_of_states():
    model = made("M A R", dtype="bf16")
    for asked, got in (None, torch.float32), (torch.bfloat16, torch.bfloat16):
        with Decoder(model, batch=4, capacity=20, state_dtype=asked) as decoder:
            assert decoder.state.layers["stack.0"]["ssm"].dtype == got
            assert decoder.state.layers["stack.0"]["conv"].dtype == torch.bfloat16
            assert decoder.state.layers["stack.1"]["k"].dtype == torch.bfloat16
            decoder.prefill(PROMPTS)
            assert len(decoder.run(9)[3].tokens) == 9
    full = made("M A R")
    exact, rough = (decoded(full, PROMPTS, 9, state_dtype=d) for d in (None, torch.bfloat16))
    assert exact == generate(full, PROMPTS, max_tokens=9)
    assert [len(one.tokens) for one in rough] == [9] * 4


def test_one_token_goes_through_the_fused_step(model):
    """A stand-in that does the sublayer's own maths, in place."""
    stepped = made("M Z A S", tie_embeddings="true")
    calls = []

    def step(sublayer, x_BD, position_B, state):
        from mambadsl.kinds.tokens import Tokens

        assert x_BD.is_contiguous() and isinstance(state, FixedState)
        calls.append(position_B.tolist())
        return x_BD.copy_(sublayer._add(x_BD[:, None], None, Tokens(position_B[:, None]), [state])[:, 0])

    for path in "stack.0", "stack.2":
        sublayer = stepped.get_submodule(path)
        sublayer.mixer.parts["step"], sublayer.has_step = step, True
    wanted = [one.tokens for one in generate(stepped, PROMPTS, max_tokens=6)]
    assert not calls
    assert [one.tokens for one in decoded(stepped, PROMPTS, 6)] == wanted
    lengths = [len(p) for p in PROMPTS]
    assert calls == [[n + i for n in lengths] for i in range(5) for _ in range(2)]


def test_the_ends_of_a_step_go_through_their_slots():
    """Stand-ins with the slots' own maths: the text stays; without a fixed state, or with gradients, nobody calls."""
    stepped = made("M A Z", logits_multiplier=0.5, logits_softcap=2, embedding_multiplier=3, embedding_norm="rmsnorm")
    calls = []

    def embed_step(token_B, weight_VD, *, multiplier, dtype):
        calls.append("embed")
        return (weight_VD[token_B] * multiplier).to(dtype)

    def head_step(norm, x_BD, weight_VD, *, multiplier, softcap):
        calls.append("head")
        assert x_BD.is_contiguous()
        return softcap * torch.tanh(norm(x_BD) @ weight_VD.T * multiplier / softcap)

    def next_token(logits_BV, token_B, history_TB, written_1):
        calls.append("next")
        token_B.copy_(logits_BV.argmax(-1))
        history_TB[written_1] = token_B
        written_1.add_(1)

    drawn = dict(temperature=0.8, top_k=9)
    wanted, drawings = (generate(stepped, PROMPTS, max_tokens=4, seed=2, **how) for how in ({}, drawn))
    stepped.frame.update(embed_step=embed_step, head_step=head_step, next_token=next_token)
    assert decoded(stepped, PROMPTS, 4) == wanted
    assert calls == ["head", "next", *["embed", "head", "next"] * 3]
    calls.clear()
    assert decoded(stepped, PROMPTS, 4, seed=2, **drawn) == drawings
    assert calls == ["head", *["embed", "head"] * 3]
    calls.clear()
    stepped(ids(2, 1), state=stepped.init_state(2, capacity=4))
    with torch.no_grad():
        stepped(ids(2, 1), state=stepped.init_state(2))
        stepped(ids(2, 1))
        stepped(ids(2, 3), state=stepped.init_state(2, capacity=4))
    assert not calls


def test_what_cannot_be_captured_is_said(model):
    assert obstacles(made("M", more="mtp { E }")) == []
    assert obstacles(model) == [] and obstacles(made("M E E")) == ["`E`: moe.experts waits for the device"]
    with pytest.raises(ValueError, match="CUDA device"):
        Decoder(model, batch=1, capacity=4, graph=True)


@given(
    st.lists(st.lists(st.sampled_from([-2.5, -1.0, -0.0, 0.0, 0.5, 0.5, 3.0, 4.25]), min_size=5, max_size=5),
             min_size=1, max_size=4),
    st.floats(0.1, 3), st.none() | st.integers(1, 7), st.none() | st.floats(0.05, 1), st.integers(0, 9),
)
def test_draw_is_sample(rows, temperature, top_k, top_p, seed):
    logits_BV, sampling = torch.tensor(rows), Sampling(temperature, top_k, top_p)
    uniform_TB = uniforms(len(rows), 3, seed=seed)
    generators = [generator_of(f"row {row}", seed=seed) for row in range(len(rows))]
    for uniform_B in uniform_TB:
        wanted = [sample(logits_V, sampling, g) for logits_V, g in zip(logits_BV, generators)]
        assert draw(logits_BV, sampling, uniform_B).tolist() == wanted
    assert draw(logits_BV, Sampling(), uniform_TB[0]).tolist() == [row.index(max(row)) for row in rows]


def test_uniform_numbers_are_those_of_single_draws():
    generator = generator_of("row 1", seed=3)
    singly = [torch.rand((), dtype=torch.float64, generator=generator).item() for _ in range(50)]
    assert uniforms(2, 50, seed=3)[:, 1].tolist() == singly


def test_the_vocabulary_bounds_what_is_drawn(model):
    tokens = [t for one in decoded(model, PROMPTS, 30, temperature=50.0) for t in one.tokens]
    assert min(tokens) >= 0 and max(tokens) < VOCAB and len(set(tokens)) > 20
