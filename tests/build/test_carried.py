"""What layers give to layers below: who reads whose, in sums, shared blocks, stages, the `mtp` tail, in decoding."""

from __future__ import annotations

import pytest
import torch
from small_models import graph, ids, made, shaken
from torch import Tensor

from mambadsl.build.model import build
from mambadsl.build.stage import stages
from mambadsl.graph.cost import costs, total
from mambadsl.graph.exchange import layers_from_networkx, to_networkx
from mambadsl.graph.json import dumps, loads
from mambadsl.graph.write import write
from mambadsl.run.generate import generate

#: A giver of each sort, branches that take, an own cache between, and a second giver.
STACK = "Giver Lends F Borrows M+Near Memory A Lends Near Memory+Borrows"


def carried(g) -> list[tuple[str, str, str]]:
    return [(e.source, e.target, e.tensor) for e in g.edges if e.tensor in g.carried]


def cut(g, cuts: list[int]):
    paths = [node.path for node in g.nodes]
    return [paths[a:b] for a, b in zip([0, *cuts], [*cuts, len(paths)])]


def run(parts, tokens: Tensor, states=None, **keywords) -> Tensor:
    out = (tokens,)
    for k, part in enumerate(parts):
        out = part(*out, **keywords, **({} if states is None else dict(state=states[k])))
    return out


def test_the_nearest_layer_above_is_read():
    assert carried(graph(STACK)) == [
        ("stack.1", "stack.3", "kv"), ("stack.1", "stack.4", "kv"), ("stack.0", "stack.5", "scan"),
        ("stack.7", "stack.8", "kv"), ("stack.0", "stack.9", "scan"), ("stack.7", "stack.9", "kv"),
    ]


def test_uses_of_shared_layers_and_depths_of_the_tail_read_their_own():
    more = "shared Pair = [Giver Memory]\nmtp(depths=2) { Pair F }"
    g = graph("Pair F Memory Pair Pair Memory", more=more)
    assert carried(g) == [
        ("stack.0", "stack.1", "scan"), ("stack.0", "stack.3", "scan"), ("stack.4", "stack.5", "scan"),
        ("stack.6", "stack.7", "scan"), ("stack.6", "stack.8", "scan"),
        ("mtp.0.0", "mtp.0.1", "scan"), ("mtp.1.0", "mtp.1.1", "scan"),
    ]
    model = made("Pair F Memory Pair Pair Memory", more=more)
    assert all(logits.isfinite().all() for logits in model.drafts(ids(2, 9)))
    stack = made("Pair F Memory Pair Pair Memory", more="shared Pair = [Giver Memory]")
    assert torch.equal(model(ids(2, 9)), stack(ids(2, 9)))


def test_graphs_come_back_from_text_json_and_networkx():
    g = graph(STACK)
    assert loads(dumps(g)) == g
    assert layers_from_networkx(to_networkx(g)) == g
    assert "takes=kv" in write(g) and "gives=scan" in write(g)


def test_only_what_is_read_later_crosses():
    g = graph(STACK)
    wanted = {
        1: ("x",), 2: ("x", "scan"), 3: ("x", "kv", "scan"), 5: ("x", "kv", "scan"), 6: ("x", "scan"),
        9: ("x", "kv", "scan"), 10: ("x", "scan", "kv"), 11: ("x",),
    }
    for start, takes in wanted.items():
        assert sorted(stages(g, cut(g, [start]))[1].takes) == sorted(takes), start
        assert stages(g, cut(g, [start]))[1].takes[0] == "x"


@pytest.mark.parametrize("cuts", [[3], [5], [6], [9], [3, 5, 9], [2, 4, 6, 8, 10]])
@pytest.mark.parametrize("capacity", [None, 16])
def test_stages_decode_as_the_whole_does(cuts, capacity):
    """In chunks; with a state that grows also documents and padding. A stage that takes keys and values from before it
    keeps them, once."""
    whole = made(STACK)
    parts = [shaken(build(whole.graph, plan=cut(whole.graph, cuts), stage=k).eval()) for k in range(len(cuts) + 1)]
    tokens = ids(2, 12)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2], [-1, -1, 0, 0, 0, 0, -1, 1, 1, 1, 1, -1]])
    for given in (None, segments) if capacity is None else (None,):
        real = torch.ones(2, 12, dtype=torch.bool) if given is None else given >= 0
        what = {} if given is None else dict(segments=given)
        with torch.no_grad():
            expected = whole(tokens, **what)
            assert torch.equal(run(parts, tokens, **what)[real], expected[real])
            state = whole.init_state(2, capacity=capacity)
            states = [part.init_state(2, capacity=capacity) for part in parts]
            for a, b in (0, 4), (4, 5), (5, 6), (6, 12):
                some = {name: t[:, a:b] for name, t in what.items()}
                found = run(parts, tokens[:, a:b], states, **some)
                assert torch.equal(found, whole(tokens[:, a:b], state=state, **some))
                torch.testing.assert_close(found[real[:, a:b]], expected[:, a:b][real[:, a:b]], atol=1e-5, rtol=1e-4)
    kept = [sorted(path for path, one in s.layers.items() if "k" in one) for s in states]
    assert sorted({path for one in kept for path in one}) == ["stack.1", "stack.6", "stack.7"]
    assert all(len(one) <= 3 for one in kept)


def test_keys_and_values_are_kept_and_counted_once():
    model = made(STACK)
    state = model.init_state(2)
    model(ids(2, 5), state=state)
    assert [path for path, one in state.layers.items() if "k" in one] == ["stack.1", "stack.6", "stack.7"]
    assert not state.layers["stack.3"] and not state.layers["stack.8"]
    own = total(costs(graph("Giver Lends F A Lends")))
    assert total(costs(model.graph)).kv_bytes_per_token == own.kv_bytes_per_token == 3 * 2 * 2 * 6 * 2
    assert sum(t.numel() for t in model.get_submodule("stack.3").state_dict().values()) < sum(
        t.numel() for t in model.get_submodule("stack.1").state_dict().values()
    )


def test_a_snapshot_of_a_stage_s_state_leaves_the_cache_alone():
    g = graph(STACK)
    parts = [shaken(build(g, plan=cut(g, [5]), stage=k).eval()) for k in (0, 1)]
    states = [part.init_state(1) for part in parts]
    run(parts, ids(1, 6), states)
    snapshot = [state.copy() for state in states]
    first = run(parts, ids(1, 3, seed=1), states)
    assert torch.equal(run(parts, ids(1, 3, seed=1), snapshot), first)


def test_recomputed_layers_give_and_take_the_same():
    more = "layer G2 = Giver(recompute=true)\nlayer L2 = Lends(recompute=true)\nlayer B2 = Borrows(recompute=true)\n"
    kept = made("Giver Lends F Borrows Memory Borrows").train()
    again = made("G2 L2 F B2 Memory(recompute=true) B2", more=more).train()
    for model in kept, again:
        model.loss(ids(2, 9)).backward()
    for path, p in kept.named_parameters():
        torch.testing.assert_close(again.get_parameter(path).grad, p.grad)


def test_narrow_weights_carry_narrow_tensors():
    g = graph(STACK, residual_dtype="fp32")
    first = build(g, plan=cut(g, [5]), stage=0, dtype="bf16")
    dtypes = dict(zip(first.stage.gives, (t.dtype for t in first(ids(2, 5)))))
    assert dtypes == {"x": torch.float32, "kv": torch.bfloat16, "scan": torch.bfloat16}


def test_the_tail_drafts_with_keys_of_its_own():
    model = made("Lends Borrows", more="mtp(depths=2) { Lends F Borrows }")
    prompts = [[1, 2, 3, 4, 5], [6]]
    plain = made("Lends Borrows")
    for prompt in prompts:
        assert generate(model, [prompt], max_tokens=8, drafts=2)[0].tokens == generate(
            plain, [prompt], max_tokens=8
        )[0].tokens


def test_takers_mix_tokens_where_their_givers_do():
    """Laws that go by depth count them (lambda of differential attention)."""
    more = "layer Last = Apart(window=none)"
    g = graph("Giver F Lends Memory Borrows F Last", more=more)
    assert g.depths["stack.6"] == (4, 5)
