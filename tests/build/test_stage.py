"""A model in stages is the model: values, weights, gradients, states, whatever the cuts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import graph, ids, made, shaken

from mambadsl.build.model import build
from mambadsl.build.stage import at_marks, stages
from mambadsl.graph.weights import all_weights
from mambadsl.text.diagnostic import MdlError

#: Shared layers and blocks on several stages, the first embedding read early and late, layers aside of the stream, what
#: layers give to others below.
STACK = "R S M B F S A B W Z N Aside Proj M Giver Aside Z Memory Tuned Low Lends Tuned F+Memory M+Near Borrows "
STACK += "First Narrow Next Squeezed Next"
OPTIONS = dict(tie_embeddings="true", residual_dtype="fp32", embedding_multiplier=2, embedding_norm="layernorm")


def split(stack: str, cuts: list[int], *, dtype="fp32", **options):
    """The stages of a model cut before these nodes."""
    g = graph(stack, **options)
    paths = [node.path for node in g.nodes]
    plan = [paths[a:b] for a, b in zip([0, *cuts], [*cuts, len(paths)])]
    return [shaken(build(g, plan=plan, stage=k, dtype=dtype).eval()) for k in range(len(plan))]


def run(stages, tokens, states=None, **keywords):
    out = (tokens,)
    for k, stage in enumerate(stages):
        state = {} if states is None else dict(state=states[k])
        out = stage(*out, **keywords, **state)
    return out


NODES = len(STACK.split()) + 2 + 2 + 2 + 2

cut_lists = st.lists(st.integers(1, NODES - 1), min_size=1, max_size=5, unique=True).map(sorted)


@settings(max_examples=12, deadline=None)
@given(cuts=cut_lists)
def test_stages_in_turn_are_the_whole_bit_for_bit(cuts):
    whole, parts = made(STACK, **OPTIONS), split(STACK, cuts, **OPTIONS)
    tokens = ids(2, 7)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [-1, -1, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        assert torch.equal(run(parts, tokens), whole(tokens))
        packed = run(parts, tokens, segments=segments)
        assert torch.equal(packed[segments >= 0], whole(tokens, segments=segments)[segments >= 0])
        state, states = whole.init_state(2), [p.init_state(2) for p in parts]
        for a, b in (0, 4), (4, 5), (5, 7):
            assert torch.equal(run(parts, tokens[:, a:b], states), whole(tokens[:, a:b], state=state))
    together = {}
    for part in parts:
        for path, tensor in part.tensors().items():
            assert path not in together or torch.equal(together[path], tensor)
            together[path] = tensor
    assert set(together) == set(all_weights(whole.graph)) == set(whole.tensors())
    for path, tensor in whole.tensors().items():
        assert torch.equal(tensor, together[path])


def test_gradients_of_stages_add_up_to_the_whole():
    whole, parts = made(STACK, **OPTIONS), split(STACK, [3, 7, 10], **OPTIONS)
    tokens = ids(2, 7)
    whole(tokens).square().mean().backward()
    run(parts, tokens).square().mean().backward()
    for path, parameter in whole.named_parameters():
        grads = [p.get_parameter(path).grad for p in parts if path in p.weights]
        torch.testing.assert_close(sum(grads), parameter.grad, atol=1e-6, rtol=1e-4, msg=path)
    assert sum("embed.weight" in p.weights for p in parts) == 2


def test_only_what_is_needed_crosses():
    g = graph("M Z M A")
    paths = [n.path for n in g.nodes]
    found = stages(g, [paths[:2], paths[2:3], paths[3:]])
    assert [s.takes for s in found] == [("tokens",), ("x", "x0"), ("x",)]
    g = graph("M Side Proj M A")
    paths = [n.path for n in g.nodes]
    for cut, takes in (2, ("x", "x0")), (3, ("x", "t")), (4, ("x", "t")), (5, ("x",)):
        assert stages(g, [paths[:cut], paths[cut:]])[1].takes == takes
    assert [s.gives for s in found] == [("x", "x0"), ("x",), ("logits",)]
    first = build(g, plan=[paths[:2], paths[2:]], stage=0)
    x, x0 = first(ids(2, 3))
    assert x.shape == x0.shape == (2, 3, 16)
    with pytest.raises(TypeError, match="takes x, x0"):
        build(g, plan=[paths[:2], paths[2:]], stage=1)(x)


def test_a_checkpoint_of_the_whole_fits_any_stage():
    whole = made(STACK, **OPTIONS)
    for part in split(STACK, [4, 9], **OPTIONS):
        wanted = {path: tensor for path, tensor in whole.state_dict().items() if path in part.weights}
        part.load_state_dict(wanted, strict=True)


def test_the_marks_of_the_text_are_stages():
    g = graph("M A | F M | A")
    assert [s.paths for s in at_marks(g)] == [
        ("embed", "stack.0", "stack.1"), ("stack.2", "stack.3"), ("stack.4", "head"),
    ]
    parts = [build(g, stage=k) for k in range(3)]
    whole = build(g)
    assert torch.equal(run(parts, ids(1, 5)), whole(ids(1, 5)))
    assert {len(p.weights) for p in parts} != {len(whole.weights)}


def test_a_plans_stages_are_built():
    from types import SimpleNamespace

    g = graph("M A F")
    lists = ("embed", "stack.0"), ("stack.1", "stack.2", "head")
    plan = SimpleNamespace(stages=[SimpleNamespace(paths=paths) for paths in lists])
    assert build(g, plan=plan, stage=1).stage.paths == lists[1]
    assert build(g, plan=plan).stage.count == 1


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ([["embed", "stack.0"], ["head"]], "no stage has `stack.1`"),
        ([["embed", "stack.0", "stack.0"], ["stack.1", "head"]], "`stack.0` is in 2"),
        ([["embed", "stack.1"], ["stack.0", "head"]], "comes where `stack.0` should"),
        ([["embed", "stack.0", "stack.1", "head"], []], "stage 1 has no layers"),
        ([["embed", "stack.0"], ["stak.1", "stack.1", "head"]], "no layer `stak.1`"),
    ],
)
def test_stages_that_are_not_the_model_are_refused(plan, said):
    with pytest.raises(MdlError) as caught:
        build(graph("M A"), plan=plan, stage=0, device="meta")
    assert any(d.code.id == "E904" and said in d.message for d in caught.value.diagnostics), str(caught.value)


def test_a_stage_that_is_not_there_is_refused():
    with pytest.raises(MdlError, match="no stage 1"):
        build(graph("M A"), stage=1, device="meta")
    with pytest.raises(MdlError, match="no stage -1"):
        build(graph("M | A"), stage=-1, device="meta")
