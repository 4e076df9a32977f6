"""What every recurrent kind must obey, whatever it computes: each law takes a module with random weights.

The module is compared with its kind's naive definition, and with itself under another cutting of the tokens.
"""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module

import pytest
import torch
from torch import Tensor

from mambadsl.kinds.module import KindModule
from mambadsl.kinds.tokens import PADDING, Tokens

#: Padding on the left, on the right, between documents, inside one; a row of nothing but padding; numbers
#: that do not start at 0; documents of one token.
SEGMENTS = torch.tensor(
    [
        [-1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3, -1, -1],
        [0, 0, 0, 0, -1, 0, 0, 0, -1, -1, 0, 2, 2, 2, 4, -1, 4],
        [-1] * 17,
        [7] * 17,
        [0, 1, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 6],
    ],
    dtype=torch.int32,
)
LENGTH = SEGMENTS.shape[1]
TOKENS = {"plain": Tokens.plain(5, LENGTH), "packed": Tokens.packed(SEGMENTS)}
CUTS = pytest.mark.parametrize(
    "cuts", [tuple(range(1, LENGTH)), (5, 6, 13), (8,)], ids=["steps", "uneven", "halves"]
)


def real(tokens: Tokens) -> Tensor:
    if tokens.segments_BT is None:
        return torch.ones(tokens.batch, tokens.length, dtype=torch.bool)
    return tokens.segments_BT != PADDING


def inputs(module: KindModule, *, batch: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, module.dims.d_in, generator=generator)


def some_state(module: KindModule, batch: int, seed: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    empty = module.init_state(batch, dtype=torch.float32)
    return {name: torch.randn(t.shape, generator=generator) for name, t in empty.items()}


def same(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    """Equal up to `tolerance`, relative to the larger of 1 and b's largest value."""
    assert a.shape == b.shape
    if b.numel():
        difference = (a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1)
        assert difference <= tolerance, f"differs by {difference:.2e}"


def same_states(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    for name in a.keys() - {"segment"}:
        same(a[name], b[name], tolerance)
    assert torch.equal(last_segment(a), last_segment(b))


def last_segment(state: dict[str, Tensor]) -> Tensor:
    batch = next(iter(state.values())).shape[0]
    return state.get("segment", torch.zeros(batch, dtype=torch.int32))


def with_gradients(module: KindModule, call, x: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output at real tokens, and gradients of a random sum of it by the input and every weight."""
    x = x.clone().requires_grad_()
    y = call(x)[mask]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    return y.detach(), list(torch.autograd.grad((y * dy).sum(), [x, *module.parameters()]))


def is_naive(module: KindModule, tokens: Tokens) -> None:
    """Output, gradients and state are the definition's, from a state that is not empty."""
    naive = import_module(f"{module.kind.package}.naive").naive
    x = inputs(module, batch=tokens.batch, length=tokens.length)
    state, start, end = some_state(module, tokens.batch), some_state(module, tokens.batch), {}

    def defined(x: Tensor) -> Tensor:
        weights = module.state_dict(keep_vars=True)
        y, after = naive(weights, module.f, module.dims, x, tokens, start)
        end.update(after)
        return y

    y, grads = with_gradients(module, lambda x: module(x, tokens, state), x, real(tokens))
    expected, expected_grads = with_gradients(module, defined, x, real(tokens))
    same(y, expected)
    same_states(state, end)
    for grad, expected_grad in zip(grads, expected_grads):
        same(grad, expected_grad, 5e-5)


def chunks_are_whole(module: KindModule, tokens: Tokens, cuts: tuple[int, ...]) -> None:
    """Pieces of a row one after another, with the state carried, give what the whole row gives."""
    x = inputs(module, batch=tokens.batch, length=tokens.length)
    whole_state, state = some_state(module, tokens.batch), some_state(module, tokens.batch)
    whole = module(x, tokens, whole_state)
    pieces = []
    for a, b in zip((0, *cuts), (*cuts, tokens.length)):
        segments = None if tokens.segments_BT is None else tokens.segments_BT[:, a:b]
        pieces.append(module(x[:, a:b], Tokens(tokens.positions_BT[:, a:b], segments), state))
    same(torch.cat(pieces, 1)[real(tokens)], whole[real(tokens)])
    same_states(state, whole_state)


def documents_are_apart(module: KindModule) -> None:
    """Documents in one row give what each alone gives: outputs, input gradients, and the last one's state."""
    lengths = (5, 1, 2, 9)
    segments = torch.repeat_interleave(torch.arange(4, dtype=torch.int32), torch.tensor(lengths))[None]
    x = inputs(module, batch=1, length=sum(lengths))
    dy = inputs(module, batch=1, length=sum(lengths), seed=4)[..., : module.dims.d_model]
    packed, packed_state = x.clone().requires_grad_(), module.init_state(1, dtype=torch.float32)
    y = module(packed, Tokens.packed(segments), packed_state)
    (y * dy).sum().backward()
    for alone, own_dy, own_y, own_grad in zip(*(t.split(lengths, 1) for t in (x, dy, y, packed.grad))):
        alone, state = alone.clone().requires_grad_(), module.init_state(1, dtype=torch.float32)
        y_alone = module(alone, Tokens.plain(1, alone.shape[1]), state)
        (y_alone * own_dy).sum().backward()
        same(own_y, y_alone)
        same(own_grad, alone.grad)
    same_states({**packed_state, "segment": torch.zeros(1, dtype=torch.int32)}, state)
    assert packed_state["segment"].tolist() == [3]


def nothing_leaks(module: KindModule) -> None:
    """A document's outputs do not move at all when other documents and padding do; no gradient crosses."""
    tokens = TOKENS["packed"]
    x = inputs(module, batch=tokens.batch, length=tokens.length)
    for document in (0, 1, 2, 3, 4, 7):
        inside = tokens.segments_BT == document
        other = torch.where(inside[..., None], x, 100 * inputs(module, batch=5, length=LENGTH, seed=5))
        assert torch.equal(module(x, tokens)[inside], module(other, tokens)[inside])
        moved = x.clone().requires_grad_()
        module(moved, tokens)[inside].square().sum().backward()
        assert not moved.grad[~inside].any()
        assert moved.grad[inside].any(-1).any()


def padding_is_nothing(module: KindModule) -> None:
    """Rows of different lengths, padded on the left, the right, both, or within, are the rows alone; so are
    their states, and what follows from them."""
    valid = torch.zeros(4, LENGTH, dtype=torch.bool)
    valid[0, 6:] = True
    valid[1, :4] = True
    valid[2, 3:12] = True
    valid[3, [0, 1, 5, 6, 7, 8, 12, 16]] = True
    x = inputs(module, batch=4, length=LENGTH)
    state = module.init_state(4, dtype=torch.float32)
    y = module(x, Tokens.padded(valid), state)
    assert y.isfinite().all()
    following = inputs(module, batch=4, length=3, seed=6)
    y_following = module(following, Tokens.plain(4, 3), after := dict(state))
    for b in range(4):
        alone, alone_state = x[b : b + 1, valid[b]], module.init_state(1, dtype=torch.float32)
        y_alone = module(alone, Tokens.plain(1, alone.shape[1]), alone_state)
        same(y[b : b + 1, valid[b]], y_alone)
        same_states({name: t[b : b + 1] for name, t in state.items()}, alone_state)
        same(y_following[b : b + 1], module(following[b : b + 1], Tokens.plain(1, 3), alone_state))
        same_states({name: t[b : b + 1] for name, t in after.items()}, alone_state)


def other_document_forgets(module: KindModule) -> None:
    """A chunk of another document begins anew whatever the state holds, whole or token by token."""
    x = inputs(module, batch=1, length=6)
    tokens = Tokens.packed(torch.full((1, 6), 4, dtype=torch.int32))
    fresh = module(x, Tokens.plain(1, 6))
    state = some_state(module, 1)
    same(module(x, tokens, state), fresh)
    assert state["segment"].tolist() == [4]
    same(module(x, Tokens.plain(1, 6), state), fresh)
    assert last_segment(state).tolist() == [0]
    state = some_state(module, 1)
    one = torch.full((1, 1), 4, dtype=torch.int32)
    steps = [module(x[:, t : t + 1], Tokens(torch.full((1, 1), t), one), state) for t in range(6)]
    same(torch.cat(steps, 1), fresh)


def bf16_is_near(wide: KindModule, tolerance: float = 0.03) -> None:
    """Relative mean error of a bf16 module against float32, for output, input gradient and state."""
    narrow = deepcopy(wide).to(torch.bfloat16)
    wide.load_state_dict(narrow.state_dict())
    found = []
    for module, dtype in ((wide, torch.float32), (narrow, torch.bfloat16)):
        x = inputs(module, batch=2, length=40).bfloat16().to(dtype).requires_grad_()
        state = module.init_state(2, dtype=dtype)
        y = module(x, Tokens.plain(2, 40), state)
        y.float().square().mean().backward()
        assert y.dtype == dtype and x.grad.dtype == dtype
        table = module.kind.state(module.f, module.dims)
        assert all(state[s.name].dtype == (torch.float32 if s.fp32 else dtype) for s in table)
        found.append((y, x.grad, *(state[s.name] for s in table)))
    for exact, near in zip(*found):
        if not exact.numel():
            continue
        error = (near.float() - exact).abs().mean() / exact.abs().mean()
        assert error < tolerance, f"{error:.3f}"
