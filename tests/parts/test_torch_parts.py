"""torch's own kernels against the reference: attention in all its forms, block masks by brute force, experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kind_values import values
from ragged import REAL, ragged
from torch.nn.attention import sdpa_kernel

from mambadsl.kinds.attend import attend, visible
from mambadsl.kinds.kind import Dims
from mambadsl.kinds.moe.module import run_experts
from mambadsl.kinds.tokens import Tokens
from mambadsl.parts.machine import Machine
from mambadsl.parts.part import Request
from mambadsl.parts.torch import accepts, attention, blocks
from mambadsl.parts.torch.attention import make_attention
from mambadsl.parts.torch.experts import grouped_experts, make_experts

H, K, P = 4, 2, 16


def qkv(batch: int, queries: int, keys: int | None = None, *, dtype=torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, queries, H, P), (batch, keys or queries, K, P), (batch, keys or queries, K, P)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def compare(part, given, queries, keys, *, real=slice(None), tolerance=1e-5, **how):
    """Results and gradients of `part` and `attend` at real tokens."""
    found = []
    for function in (part, attend):
        y = function(*given, queries, keys, scale=0.3, **how)
        weigh = torch.linspace(-1, 1, y[real].numel()).view_as(y[real]).to(y.dtype)
        found.append((y[real], *torch.autograd.grad((y[real] * weigh).sum(), given)))
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, atol=tolerance, rtol=tolerance)


SHAPES = pytest.mark.parametrize(
    "how", [dict(window=w, softcap=c, keep=k) for w, k in ((None, 0), (4, 0), (4, 3), (50, 0)) for c in (None, 0.7)],
    ids=str,
)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_rows(how, dtype):
    tokens = Tokens.plain(2, 21)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    compare(make_attention(), qkv(2, 21, dtype=dtype), tokens, tokens, tolerance=tolerance, **how)


@SHAPES
def test_documents_and_padding(how):
    tokens = ragged()
    compare(make_attention(), qkv(4, 10), tokens, tokens, real=REAL, **how)


@SHAPES
@pytest.mark.parametrize("new", [1, 5])
def test_a_past(how, new):
    all_tokens = ragged()
    tail = Tokens(all_tokens.positions_BT[:, -new:], all_tokens.segments_BT[:, -new:])
    compare(make_attention(), qkv(4, new, 10), tail, all_tokens, real=REAL[:, -new:], **how)


@SHAPES
def test_several_slices(monkeypatch, how):
    monkeypatch.setattr(attention, "MASKED_SLICE", 4)
    monkeypatch.setattr(attention, "CAPPED_SLICE", 3)
    test_documents_and_padding(how)
    test_a_past(how, 5)


def test_softcap_never_holds_all_scores():
    """The largest tensor that autograd keeps is far below [T, S]."""
    kept = []
    tokens, given = Tokens.plain(1, 1024), qkv(1, 1024)

    def note(t):
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        make_attention()(*given, tokens, tokens, scale=0.3, window=None, softcap=0.7)
    assert max(kept) <= 1024 * 256


@pytest.mark.parametrize("backend", attention.BACKENDS)
def test_every_backend_name(backend):
    tokens = Tokens.plain(1, 5)
    compare(make_attention(backend=backend), qkv(1, 5), tokens, tokens, window=None, softcap=None)


def test_unknown_backend():
    with pytest.raises(KeyError):
        make_attention(backend="fast")


@pytest.mark.parametrize("packed", [False, True])
def test_traceable_whole(packed, monkeypatch):
    """What a GPU runs, traced without graph breaks: the order of backends around SDPA, and FlexAttention."""
    monkeypatch.setattr(attention, "_preferring", lambda order, q: sdpa_kernel(order, set_priority=True))
    part = make_attention()
    tokens = ragged() if packed else Tokens.plain(4, 10)
    q, k, v = (t.detach() for t in qkv(4, 10))

    def run(q, k, v, segments, positions):
        batch = Tokens(positions, segments)
        flexed = attention.flex(q, k, v, batch, scale=0.3, window=3, softcap=0.7)
        return flexed, *(part(q, k, v, batch, batch, scale=0.3, **how) for how in forms)

    forms = [dict(window=3, softcap=0.7), dict(window=None, softcap=None), dict(window=3, softcap=None)]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    real = REAL if packed else slice(None)
    found = compiled(q, k, v, tokens.segments_BT, tokens.positions_BT)
    for y, how in zip(found, [forms[0], *forms], strict=True):
        torch.testing.assert_close(y[real], attend(q, k, v, tokens, tokens, scale=0.3, **how)[real])
    compare(torch.compile(part, fullgraph=True, backend="aot_eager"), qkv(4, 10), tokens, tokens, real=real, **forms[0])


def test_flex_refuses_narrow_heads():
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="head_dim >= 16 .* not 8"):
        attention.flex(q, q, q, Tokens.plain(1, 4), scale=1, window=2, softcap=None)


@st.composite
def batches(draw) -> Tokens:
    """Rows of documents with padding before and after each, inside them too; or plain rows."""
    length = draw(st.integers(1, 40))
    if draw(st.booleans()):
        return Tokens.plain(draw(st.integers(1, 2)), length)
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        number = st.integers(0, 3) if draw(st.booleans()) else st.just(0)
        row = sorted(draw(st.lists(number, min_size=length, max_size=length)))
        holes = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        rows.append([-1 if hole and draw(st.booleans()) else s for s, hole in zip(row, holes)])
    segments_BT = torch.tensor(rows, dtype=torch.int32)
    return Tokens(_positions(segments_BT), segments_BT)


def _positions(segments_BT: torch.Tensor) -> torch.Tensor:
    """Each token's place among the tokens of its document and row."""
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None]
    return same_BTT.tril(-1).sum(-1) * (segments_BT >= 0)


@given(tokens=batches(), window=st.none() | st.integers(1, 30), keep=st.integers(0, 12))
@settings(max_examples=150, deadline=None)
def test_block_masks(tokens, window, keep):
    """Of the blocks, no pair with something visible is left out, and every `full` one is full."""
    blocks.BLOCK, before = 4, blocks.BLOCK
    try:
        how = dict(window=window, keep=keep)
        mask, (some, all_) = blocks.block_mask(tokens, **how), blocks.block_pairs(tokens, **how)
    finally:
        blocks.BLOCK = before
    B, T = tokens.batch, tokens.length
    shown_BTT = visible(tokens, tokens, **how)
    b, query, key = (torch.arange(n) for n in (B, T, T))
    exact = mask.mask_mod(b[:, None, None], 0, query[None, :, None], key[None, None]).expand(B, T, T)
    real_BT = torch.ones(B, T, dtype=torch.bool) if tokens.segments_BT is None else tokens.segments_BT >= 0
    assert torch.equal(exact[real_BT], shown_BTT[real_BT])
    assert exact.diagonal(dim1=1, dim2=2).all()
    J = -(-T // 4)
    padded = torch.nn.functional.pad(exact, (0, 4 * J - T, 0, 4 * J - T))
    tiles = padded.view(B, J, 4, J, 4).transpose(2, 3)
    some, all_ = some.expand(B, J, J), all_.expand(B, J, J)
    assert not (tiles.any(-1).any(-1) & ~some).any()
    assert not (all_ & ~tiles.all(-1).all(-1)).any()
    assert torch.equal(mask.to_dense()[:, 0].bool().expand(B, J, J), some | all_)
    assert_lists(mask.kv_num_blocks, mask.kv_indices, some & ~all_)
    assert_lists(mask.full_kv_num_blocks, mask.full_kv_indices, all_)
    assert_lists(mask.q_num_blocks, mask.q_indices, (some & ~all_).transpose(1, 2))
    assert_lists(mask.full_q_num_blocks, mask.full_q_indices, all_.transpose(1, 2))


def assert_lists(counts_B1J, order_B1JJ, pairs_BJJ) -> None:
    """Which blocks each block has, first in order; laid out as FlexAttention's kernels step, from row to row by the
    stride of the 1."""
    B, J = order_B1JJ.shape[0], order_B1JJ.shape[-1]
    assert counts_B1J.stride() == (J, J, 1) and order_B1JJ.stride() == (J * J, J * J, J, 1)
    rank_JJ = torch.arange(J).expand(J, J)
    dense_BJJ = torch.zeros(B, J, J, dtype=torch.bool).scatter(
        2, order_B1JJ[:, 0].long(), rank_JJ < counts_B1J[:, 0, :, None]
    )
    assert torch.equal(dense_BJJ.expand_as(pairs_BJJ), pairs_BJJ)


def test_compiled_block_masks_keep_their_layout():
    """torch.compile may give a dimension of size 1 any stride, unless the lists come out of an op."""
    segments_BT = torch.stack((torch.arange(6).repeat_interleave(128), torch.zeros(768, dtype=torch.int64))).int()
    tokens, seen = Tokens.packed(segments_BT), []

    def backend(graph, inputs):
        ops = [node for node in graph.graph.nodes if "block_lists" in str(node.target)]
        seen.extend(tuple(t.stride() for t in node.meta["example_value"]) for node in ops)
        return graph.forward

    mask = torch.compile(lambda t: blocks.block_mask(t, window=None).q_indices, fullgraph=True, backend=backend)(tokens)
    assert torch.equal(mask, blocks.block_mask(tokens, window=None).q_indices)
    assert seen == 2 * [((6, 6, 1), (36, 36, 6, 1)) * 2]


def test_block_masks_leave_out_most():
    """Documents of whole blocks see their own block only; a window of one block sees two."""
    J, T = 8, 8 * blocks.BLOCK
    documents = Tokens.packed(torch.arange(J).repeat_interleave(blocks.BLOCK)[None])
    some, all_ = blocks.block_pairs(documents, window=None)
    assert torch.equal(some[0], torch.eye(J, dtype=torch.bool)) and not all_.any()
    some, all_ = blocks.block_pairs(Tokens.plain(1, T), window=blocks.BLOCK + 1)
    assert some.sum() == 2 * J - 1
    some, all_ = blocks.block_pairs(Tokens.plain(1, T), window=None)
    assert some.sum() == J * (J + 1) // 2 and all_.sum() == J * (J - 1) // 2


def experts_case(*, gated: bool, tokens: int = 37, experts: int = 6, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    L, F, top_k = 16, 24, 2
    x = torch.randn(tokens, L, generator=g)
    # The last expert gets nothing.
    index = torch.stack([torch.randperm(experts - 1, generator=g)[:top_k] for _ in range(tokens)])
    weight = torch.rand(tokens, top_k, generator=g)
    up = torch.randn(experts, F * (1 + gated), L, generator=g) * 0.3
    down = torch.randn(experts, L, F, generator=g) * 0.3
    x, up, down = (t.bfloat16() for t in (x, up, down))
    return [t.requires_grad_() if t.is_floating_point() else t for t in (x, index, weight, up, down)]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("compiled", [False, True])
def test_experts(gated, tokens, compiled):
    case = experts_case(gated=gated, tokens=tokens)
    part = torch.compile(make_experts(), fullgraph=True, backend="aot_eager") if compiled else make_experts()
    found = []
    for function in (part, run_experts):
        y = function(*case, act="silu", gated=gated)
        weigh = torch.linspace(-1, 1, y.shape[1])
        found.append((y, *torch.autograd.grad((y.float() * weigh).sum(), [t for t in case if t.requires_grad])))
    for ours, reference in zip(*found, strict=True):
        assert ours.dtype == reference.dtype
        torch.testing.assert_close(ours, reference, atol=0.02, rtol=0.02)


def test_experts_refuse_what_grouped_mm_does():
    x, index, weight, up, down = experts_case(gated=False)
    with pytest.raises(ValueError, match="not in torch.float32"):
        grouped_experts(x.float(), index, weight, up.float(), down.float(), act="relu", gated=False)
    with pytest.raises(ValueError, match="not hidden 20"):
        grouped_experts(x, index, weight, up[:, :20], down[..., :20], act="relu", gated=False)


def request(slot: str, **fields) -> Request:
    kind = slot.partition(".")[0]
    machine = Machine("cuda", "", (9, 0))
    return Request(slot, values(kind, **fields), Dims(32, 32), None, None, True, "bf16", machine)


def test_accepts():
    assert not list(accepts.attention(request("attention.core", heads=2, head_dim=16)))
    assert list(accepts.attention(request("attention.core", heads=2, head_dim=8)))
    assert not list(accepts.experts(request("moe.experts", d_ff=24)))
    assert list(accepts.experts(request("moe.experts", d_ff=20, latent=12))) == [
        "input must be a multiple of 8, not 12", "d_ff must be a multiple of 8, not 20",
    ]
