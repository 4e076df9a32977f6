"""Decoding with a state writes what the whole forward pass would, alone and in a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import MIXERS, VOCAB, graph, made

from mambadsl.build.init import generator_of
from mambadsl.build.model import build
from mambadsl.run.generate import Step, generate, steps, stream
from mambadsl.run.sample import Sampling, distribution, sample

PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11], [3, 3]]


@pytest.fixture(scope="module")
def model():
    return made(MIXERS, tie_embeddings="true")


def uncached(model, prompt, count, sampling=Sampling(), *, seed=0, row=0) -> list[int]:
    """One full forward pass a token."""
    tokens, generator = list(prompt), generator_of(f"row {row}", seed=seed)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(sample(model(torch.tensor([tokens]))[0, -1], sampling, generator))
    return tokens[len(prompt) :]


def test_greedy_is_the_uncached_text_in_a_batch_of_unequal_prompts(model):
    found = generate(model, PROMPTS, max_tokens=14)
    for prompt, one in zip(PROMPTS, found):
        assert list(one.tokens) == uncached(model, prompt, 14)
        assert one.ended == "length"
    assert len({one.tokens for one in found}) > 1


DRAWS = [dict(temperature=1.0), dict(temperature=0.7, top_k=8), dict(temperature=1.3, top_p=0.8)]


@pytest.mark.parametrize("sampling", DRAWS)
def test_seeded_draws_are_the_uncached_ones(model, sampling):
    found = generate(model, PROMPTS, max_tokens=6, seed=5, **sampling)
    for row, (prompt, one) in enumerate(zip(PROMPTS, found)):
        assert list(one.tokens) == uncached(model, prompt, 6, Sampling(**sampling), seed=5, row=row)
    alone, = generate(model, PROMPTS[:1], max_tokens=6, seed=5, **sampling)
    assert alone == found[0]
    assert generate(model, PROMPTS, max_tokens=6, seed=6, **sampling) != found


@settings(max_examples=6, deadline=None)
@given(st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), min_size=1, max_size=4))
def test_a_batch_writes_what_each_prompt_alone_does(model, prompts):
    together = generate(model, prompts, max_tokens=6)
    assert together == [generate(model, [p], max_tokens=6)[0] for p in prompts]


def test_stops_end_a_row_and_leave_the_others(model):
    free = [g.tokens for g in generate(model, PROMPTS, max_tokens=12)]
    token = free[0][4]
    at = free[0].index(token)
    found = generate(model, PROMPTS, max_tokens=12, stop=[token])
    assert found[0].tokens == free[0][:at] and found[0].ended == "stop"
    for row, one in enumerate(found):
        wanted = free[row][: free[row].index(token)] if token in free[row] else free[row]
        assert one.tokens == wanted
    pair = free[2][5:7]
    ended = generate(model, PROMPTS, max_tokens=12, stop=[pair])[2]
    first = next(i for i in range(12) if free[2][i : i + 2] == pair)
    assert ended.ended == "stop" and ended.tokens == free[2][:first]
    mixed = generate(model, PROMPTS[2:3], max_tokens=12, stop=[pair[1], pair])[0]
    assert mixed.ended == "stop" and len(mixed.tokens) <= first


def test_streams_give_the_same_tokens(model):
    wanted = generate(model, PROMPTS, max_tokens=7)
    heard: list[Step] = []
    assert generate(model, PROMPTS, max_tokens=7, stream=heard.append) == wanted
    for row, one in enumerate(wanted):
        assert tuple(s.token for s in heard if s.row == row) == one.tokens
    assert [s.ended for s in heard[-4:]] == ["length"] * 4
    assert tuple(stream(model, PROMPTS[0], max_tokens=7)) == wanted[0].tokens
    text = wanted[0].tokens
    for stop in [text[3]], [text[2:5]], [text[2:4] + (text[4] + 1,)], [text[5:] + (0,)], [text[4:6], text[5]]:
        heard = tuple(stream(model, PROMPTS[0], max_tokens=7, stop=stop))
        assert heard == generate(model, PROMPTS[:1], max_tokens=7, stop=stop)[0].tokens


def test_the_model_is_left_as_it_was(model):
    model.train()
    try:
        lines = steps(model, PROMPTS[:1], max_tokens=5)
        next(lines)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        lines.close()
        assert model.training
    finally:
        model.eval()
    assert generate(model, [], max_tokens=5) == []
    assert generate(model, [[1]], max_tokens=0)[0].tokens == ()


def test_bf16_generates():
    narrow = made("M A R", dtype="bf16")
    assert len(generate(narrow, PROMPTS, max_tokens=4, temperature=1)[1].tokens) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[[VOCAB]]), f"from 0 to {VOCAB - 1}"),
        (dict(prompts=[1, 2]), "a list of prompts"),
        (dict(prompts=["ab"]), "a list of prompts"),
        (dict(max_tokens=-1), "max_tokens"),
        (dict(temperature=-1.0), "temperature"),
        (dict(top_k=0), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(stop=[[]]), "empty stop"),
    ],
)
def test_senseless_requests_are_refused(model, change, said):
    with pytest.raises(ValueError, match=said):
        generate(model, **{"prompts": [[1]], "max_tokens": 2, **change})


@pytest.mark.parametrize(("change", "said"), [(dict(max_tokens=2.5), "whole number"), (dict(stop="ab"), "encode")])
def test_what_is_of_another_type_is_refused(model, change, said):
    with pytest.raises(TypeError, match=said):
        generate(model, **{"prompts": [[1]], "max_tokens": 2, **change})


def test_a_tensor_of_prompts_is_a_list_of_them(model):
    assert generate(model, torch.tensor([[1, 2], [3, 0]]), max_tokens=4) == generate(
        model, [[1, 2], [3, 0]], max_tokens=4
    )


def test_a_model_without_values_does_not_write():
    with pytest.raises(ValueError, match="without values"):
        generate(build(graph("M A"), device="meta"), [[1]], max_tokens=1)


def test_a_stage_does_not_write():
    with pytest.raises(ValueError, match="one stage"):
        generate(build(graph("M | A"), stage=0), [[1]], max_tokens=1)


def test_distributions():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    ids, share = distribution(logits, Sampling(temperature=1.0))
    assert ids.tolist() == [1, 2, 0, 3]
    torch.testing.assert_close(share, logits.double().softmax(0)[ids])
    assert distribution(logits, Sampling(temperature=1.0, top_k=2))[0].tolist() == [1, 2]
    # 0.66, 0.24, 0.09, 0.01: the second is needed to reach 0.7, the third to reach 0.91.
    assert distribution(logits, Sampling(temperature=1.0, top_p=0.7))[0].tolist() == [1, 2]
    assert distribution(logits, Sampling(temperature=1.0, top_p=0.91))[0].tolist() == [1, 2, 0]
    assert distribution(logits, Sampling(temperature=1e-6, top_p=0.99))[0].tolist() == [1]
    generator = generator_of("x", seed=0)
    drawn = torch.tensor([sample(logits, Sampling(temperature=1.0), generator) for _ in range(4000)])
    torch.testing.assert_close(drawn.bincount(minlength=4) / 4000.0, logits.softmax(0), atol=0.03, rtol=0)
