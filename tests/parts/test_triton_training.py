"""Our Triton kernels for training equal the torch definitions: results and gradients, in Triton's interpreter."""

from __future__ import annotations

import interpreter
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mambadsl.kinds import norm
from mambadsl.kinds.mamba2 import module
from mambadsl.parts.triton import cross_entropy, gate_norm, gate_norm_kernels, launch, sums
from mambadsl.parts.triton import norm as triton_norm
from mambadsl.parts.triton.limits import WIDEST_NORM

pytestmark = interpreter.ONLY

GATES = ("silu", "sigmoid")
ORDERS = ("after_gate", "before_gate", "none")
few = settings(max_examples=12, deadline=None)
compiled = pytest.mark.parametrize("wrap", [
    pytest.param(lambda f: f, id="eager"),
    pytest.param(lambda f: torch.compile(f, backend="aot_eager", fullgraph=True), id="compiled"),
])


@pytest.fixture(autouse=True)
def _seeded(monkeypatch):
    torch.manual_seed(0)
    torch._dynamo.reset()
    # Narrow rows that are wide enough: each program takes milliseconds here.
    monkeypatch.setattr(sums, "ENOUGH", 256)


def same(mine, theirs, inputs, **close):
    """Equal results, and equal gradients of every input, for one random gradient of the result."""
    a, b = ([t.clone().requires_grad_(t.is_floating_point()) for t in inputs] for _ in range(2))
    out, truth = mine(*a), theirs(*b)
    assert out.dtype == truth.dtype and out.shape == truth.shape
    torch.testing.assert_close(out, truth, **close)
    if truth.requires_grad:
        dout = torch.randn_like(truth)
        out.backward(dout)
        truth.backward(dout)
        for x, y in zip(a, b):
            assert (x.grad is None) == (y.grad is None)
            if y.grad is not None:
                torch.testing.assert_close(x.grad, y.grad, **close)


class TestGateNorm:
    mine = staticmethod(gate_norm.make_gate_norm())

    @few
    @given(
        batch=st.integers(1, 3), time=st.integers(1, 5), groups=st.integers(1, 4), width=st.integers(1, 40),
        order=st.sampled_from(ORDERS), gate=st.sampled_from(GATES), before=st.integers(0, 9),
        after=st.integers(0, 9),
    )
    def test_equals_the_slot(self, batch, time, groups, width, order, gate, before, after):
        I = groups * width
        wide, y, weight = torch.randn(batch, time, before + I + after), torch.randn(batch, time, I), torch.randn(I)

        def call(f):
            def run(wide, y, weight):
                z = wide[..., before:before + I]
                norm = None if order == "none" else weight
                return f(y, z, norm, order=order, groups=groups, eps=1e-5, gate=gate)
            return run

        same(call(self.mine), call(module.gate_norm), (wide, y, weight), rtol=1e-4, atol=1e-5)

    @compiled
    @pytest.mark.parametrize("order, gate", [*((order, "silu") for order in ORDERS), ("before_gate", "sigmoid")])
    def test_compiles_whole(self, order, gate, wrap):
        def call(f):
            return lambda y, z, w: f(y, z, w, order=order, groups=2, eps=1e-6, gate=gate) * 2

        inputs = torch.randn(2, 3, 32), torch.randn(2, 3, 32), torch.randn(32)
        if order == "none":
            inputs = inputs[:2] + (torch.zeros(0, dtype=torch.int64),)
        same(wrap(call(self.mine)), call(module.gate_norm), inputs, rtol=1e-4, atol=1e-5)

    @compiled
    @pytest.mark.parametrize("order, gate", [("after_gate", "silu"), ("before_gate", "sigmoid")])
    def test_of_channels_of_several_ranks(self, order, gate, wrap):
        """Other rows stand in for other ranks' channels."""

        def averaged(x):
            return (x + x.flatten().flip(0).view_as(x)) / 2

        def call(f):
            def run(wide, y, w):
                return f(y, wide[..., 4:36], w, order=order, groups=2, eps=1e-6, gate=gate, averaged=averaged) * 2
            return run

        inputs = torch.randn(1, 5, 40), torch.randn(1, 5, 32), torch.randn(32)
        same(wrap(call(self.mine)), call(module.gate_norm), inputs, rtol=1e-4, atol=1e-5)

    def test_no_group_is_too_wide_for_the_table(self):
        I = 5000
        inputs = torch.randn(3, I), torch.randn(3, I), torch.randn(I)
        for order in ORDERS:
            same(
                lambda y, z, w: self.mine(y, z, w if order != "none" else None, order=order, groups=1, eps=1e-5),
                lambda y, z, w: module.gate_norm(y, z, w, order=order, groups=1, eps=1e-5),
                inputs, rtol=1e-3, atol=1e-4,
            )

    @pytest.mark.parametrize("rows", [0, 1, 37])
    def test_gradients_of_many_rows_land_in_given_buffers(self, rows):
        I, G = 24, 3
        y, dout, weight = torch.randn(rows, I), torch.randn(rows, I), torch.randn(I)
        wide = torch.randn(rows, I + 8)
        dwide = torch.full((rows, I + 8), 7.0)
        how = dict(order="after_gate", groups=G, eps=1e-5)
        _, rstd = gate_norm_kernels.gate_norm_forward(y, wide[:, 4:4 + I], weight, **how)
        dy, dz, dweight = gate_norm_kernels.gate_norm_backward(
            dout, y, wide[:, 4:4 + I], weight, rstd, dz=dwide[:, 4:4 + I], **how
        )
        truth = [t.clone().requires_grad_() for t in (y, wide, weight)]
        module.gate_norm(truth[0], truth[1][:, 4:4 + I], truth[2], **how).backward(dout)
        torch.testing.assert_close(dy, truth[0].grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dwide[:, 4:4 + I], truth[1].grad[:, 4:4 + I], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dweight, truth[2].grad, rtol=1e-4, atol=1e-4)
        assert (dwide[:, :4] == 7).all() and (dwide[:, 4 + I:] == 7).all()
        assert dz.data_ptr() == dwide[:, 4:].data_ptr()

    def test_refuses_what_does_not_fit(self):
        y = torch.randn(2, 12)
        for groups, channels in ((5, 12), (1, 2 * WIDEST_NORM)):
            y = torch.randn(2, channels)
            with pytest.raises(ValueError, match=f"{channels} channels in {groups} groups"):
                self.mine(y, y, y[0], order="after_gate", groups=groups, eps=1e-5)
        with pytest.raises(ValueError, match="stride 1"):
            t = torch.randn(12, 2).T
            gate_norm_kernels.gate_norm_forward(t, t, t[0], order="after_gate", groups=1, eps=1e-5)


class TestRmsNorm:
    @compiled
    @pytest.mark.parametrize("shape, weight, zero_centered", [
        ((2, 3, 20), True, True), ((35, 64), True, False), ((35, 64), False, False), ((9,), False, True),
    ])
    def test_equals_the_slot(self, shape, weight, zero_centered, wrap):
        mine = triton_norm.make_rms_norm()
        inputs = torch.randn(shape), torch.randn(shape[-1])

        def call(f):
            return lambda x, w: f(x, w if weight else None, eps=1e-5, zero_centered=zero_centered)

        same(wrap(call(mine)), call(norm.rms_norm), inputs, rtol=1e-4, atol=1e-5)

    @compiled
    @pytest.mark.parametrize("dtypes", [
        (torch.float32, torch.float16), (torch.float16, torch.float32), (torch.float64, torch.float32),
    ], ids=str)
    def test_in_the_dtype_asked_for(self, dtypes, wrap):
        """A wide stream goes into narrow layers: rounded once, and the gradient is wide again."""
        mine, (given, wanted) = triton_norm.make_rms_norm(), dtypes
        inputs = torch.randn(5, 40, dtype=given), torch.randn(40)

        def call(f):
            return lambda x, w: f(x, w, eps=1e-5, dtype=wanted)

        same(wrap(call(mine)), call(norm.rms_norm), inputs, rtol=2e-3, atol=1e-3)

    def test_keeps_the_dtype_of_x(self):
        x, weight = torch.randn(4, 32), torch.randn(32, dtype=torch.float16)
        mine = triton_norm.make_rms_norm()
        assert mine(x, weight, eps=1e-5).dtype == torch.float32
        assert mine(x.half(), weight.float(), eps=1e-5).dtype == torch.float16

    def test_refuses_too_wide_rows(self):
        with pytest.raises(ValueError, match="at most 16384"):
            triton_norm.make_rms_norm()(torch.randn(1, 16385), None, eps=1e-5)


@few
@given(
    P=st.integers(0, 150), shape=st.sampled_from([(1,), (3, 7), (40,), (300,)]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_column_sums(P, shape, dtype):
    partial = torch.randn(P, *shape)
    found = sums.column_sums(partial, dtype)
    torch.testing.assert_close(found, partial.double().sum(0).to(dtype), rtol=1e-3, atol=1e-4)
    assert torch.equal(found, sums.column_sums(partial.clone(), dtype))


def reference_loss(x, weight, targets, *, multiplier, softcap):
    """As the model's head and its loss do it."""
    logits = F.linear(x, weight).float() * multiplier
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    counted = targets >= 0
    losses = F.cross_entropy(logits[counted], targets[counted].long(), reduction="sum")
    return losses / counted.sum().clamp_min(1)


class TestCrossEntropy:
    @few
    @given(
        rows=st.integers(1, 9), width=st.integers(1, 12), vocab=st.integers(1, 150), data=st.data(),
        chunks=st.sampled_from([None, 1, 3]), softcap=st.sampled_from([None, 3.0]),
        multiplier=st.sampled_from([1.0, 0.25, -2.0]),
    )
    def test_equals_the_head_and_its_loss(self, rows, width, vocab, data, chunks, softcap, multiplier):
        targets = torch.tensor(data.draw(st.lists(st.integers(-2, vocab - 1), min_size=rows, max_size=rows)))
        how = dict(multiplier=multiplier, softcap=softcap)
        mine = cross_entropy.make_loss(chunks=chunks)
        same(
            lambda x, w: mine(x[None], w, targets[None], **how),
            lambda x, w: reference_loss(x, w, targets, **how),
            (torch.randn(rows, width), torch.randn(vocab, width)), rtol=1e-4, atol=1e-5,
        )

    @pytest.mark.parametrize("chunks, dtype", [(2, torch.float16), (3, torch.float32)])
    def test_chunks_are_added_up(self, chunks, dtype):
        """Of 128 rows each, the last one fewer."""
        rows, vocab = 128 * chunks - 100, 40
        targets = torch.randint(-1, vocab, (2, rows // 2), dtype=torch.int32)
        inputs = torch.randn(2, rows // 2, 8).to(dtype), torch.randn(vocab, 8).to(dtype)
        mine = cross_entropy.make_loss(chunks=chunks)
        how = dict(multiplier=1.0, softcap=None)
        close = {} if dtype == torch.float16 else dict(rtol=1e-4, atol=1e-6)
        same(
            lambda x, w: mine(x, w, targets, **how),
            lambda x, w: reference_loss(x.float().flatten(0, 1), w.float(), targets.flatten(), **how),
            inputs, **({"rtol": 2e-2, "atol": 1e-3} | close),
        )

    @pytest.mark.parametrize("softcap", [None, 5.0])
    def test_rows_longer_than_a_step_and_huge_logits(self, softcap):
        vocab = 2 * cross_entropy.LAUNCH["BLOCK"] + 77
        x, weight = 60 * torch.randn(3, 4), torch.randn(vocab, 4)
        targets = torch.tensor([vocab - 1, 0, cross_entropy.LAUNCH["BLOCK"]])
        mine = cross_entropy.make_loss(chunks=1)
        how = dict(multiplier=1.0, softcap=softcap)
        same(
            lambda x, w: mine(x, w, targets, **how),
            lambda x, w: reference_loss(x, w, targets, **how), (x, weight), rtol=1e-4, atol=1e-5,
        )

    @compiled
    def test_compiles_whole(self, wrap):
        targets = torch.tensor([[1, -100, 3]])
        mine = cross_entropy.make_loss()
        how = dict(multiplier=0.5, softcap=8.0)
        same(
            wrap(lambda x, w: 3 * mine(x, w, targets, **how)),
            lambda x, w: 3 * reference_loss(x[0], w, targets[0], **how),
            (torch.randn(1, 3, 6), torch.randn(20, 6)), rtol=1e-4, atol=1e-5,
        )

    def test_a_graph_that_is_kept_gives_the_same_gradients_twice(self):
        x, w = torch.randn(4, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
        loss = 5 * cross_entropy.make_loss()(x, w, torch.arange(4))
        first = torch.autograd.grad(loss, (x, w), retain_graph=True)
        for a, b in zip(first, torch.autograd.grad(loss, (x, w))):
            assert torch.equal(a, b)

    def test_gradients_are_scaled_in_float32(self):
        """A factor that half precision does not have."""
        factor = torch.tensor(1 / 3)
        for sizes in ((2 * cross_entropy.SCALED + 5, 7), (0, cross_entropy.SCALED)):
            two = [torch.randn(size).half() for size in sizes]
            for found, t in zip(cross_entropy._scale_op(*two, factor), two):
                assert torch.equal(found, (t.float() * factor).half())

    def test_nothing_that_counts_is_zero(self):
        x, w = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
        loss = cross_entropy.make_loss()(x, w, torch.tensor([-1, -100]))
        loss.backward()
        assert loss == 0 and (x.grad == 0).all() and (w.grad == 0).all()

    def test_ignored_rows_may_hold_anything(self):
        x, w = torch.randn(3, 4), torch.randn(6, 4)
        x[1] = float("nan")
        x.requires_grad_()
        w.requires_grad_()
        targets = torch.tensor([2, -1, 5])
        loss = cross_entropy.make_loss()(x, w, targets)
        truth = reference_loss(x[[0, 2]], w, targets[[0, 2]], multiplier=1.0, softcap=None)
        torch.testing.assert_close(loss, truth)
        loss.backward()
        assert (x.grad[1] == 0).all() and x.grad[[0, 2]].isfinite().all()

    def test_a_target_outside_the_vocabulary_shows(self):
        assert cross_entropy.make_loss()(torch.randn(2, 4), torch.randn(6, 4), torch.tensor([1, 6])).isnan()

    def test_makes_only_the_gradients_that_are_wanted(self):
        calls = []
        x, w, targets = torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 4])
        for frozen, made in (((x, w), (0, 0)), ((x, w.clone().requires_grad_()), (0, 15)),
                             ((x.clone().requires_grad_(), w), (6, 0))):
            out = cross_entropy._op(*frozen, targets, 1, None, 1.0, *(t.requires_grad for t in frozen))
            calls.append(tuple(t.numel() for t in out[2:]) == made)
        assert all(calls)

    def test_refuses_shapes_that_do_not_fit(self):
        with pytest.raises(ValueError, match="of one dtype"):
            cross_entropy.linear_cross_entropy(
                torch.randn(2, 3), torch.randn(5, 3).half(), torch.tensor([0, 1]), chunks=1, softcap=None,
                multiplier=1.0,
            )


@given(rows=st.integers(1, 10**5), chunks=st.integers(1, 20))
def test_chunks_cover_the_rows_and_are_no_more_than_asked(rows, chunks):
    Q = cross_entropy.chunk_rows(rows, chunks)
    assert -(-rows // Q) <= chunks and (Q % 128 == 0 or chunks == 1)


@given(
    rows=st.integers(1, 10**5), pieces=st.integers(1, 16), held=st.sampled_from([1, 2, 4]),
    block=st.sampled_from([512, 4096, 16384]),
)
def test_programs_share_the_rows_evenly(rows, pieces, held, block):
    asked = launch.Launch(held, 4, 3, 2)
    got, programs = launch.persistent(asked, block, rows=rows, pieces=pieces, read=(torch.empty(1),) * 3)
    steps = -(-rows // held)
    each = -(-steps // programs)
    assert 1 <= programs <= max(1, 2 * 2 // pieces) and each * (programs - 1) < steps
    assert 1 <= got.stages <= 3 and got.warps == 4
