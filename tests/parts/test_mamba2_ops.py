"""mamba_ssm's kernels in their slots equal the definitions, in Triton's interpreter; the CUDA extensions are
played by stand-ins. What needs the package's own sources is skipped where they are not installed."""

from __future__ import annotations

import contextlib
import importlib.util
import types

import interpreter
import pytest
import torch
from kind_values import module
from stand_ins import ConvExtension, SelectiveScanExtension

from mambadsl.kinds.mamba1.module import selective_scan as selective_scan_definition
from mambadsl.kinds.mamba2.module import step_sizes
from mambadsl.kinds.ssd import ssd as ssd_definition
from mambadsl.kinds.tokens import Tokens
from mambadsl.parts.causal_conv1d import kernels as conv_kernels
from mambadsl.parts.causal_conv1d.conv import make_conv
from mambadsl.parts.mamba_ssm import launch, load, selective, ssd
from mambadsl.parts.triton import conv as triton_conv
from mambadsl.parts.triton import core
from mambadsl.parts.triton.core import make_core
from mambadsl.parts.triton.scan import make_scan
from mambadsl.parts.triton.ssd import steps
from mambadsl.parts.triton.ssd.kernels import chunk_length, documents

SEGMENTS = torch.tensor([[3] * 7 + [4] * 20 + [3] * 13, [0] * 16 + [1] * 19 + [-1] * 5], dtype=torch.int32)


def near(mine, theirs, tolerance=2e-5):
    """Within `tolerance` of the norm."""
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
    assert (mine - theirs).norm() <= tolerance * (theirs.norm() + 1e-6)


def noise(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results(function, tensors, **how):
    """Two outputs of a function, and the gradients of a random combination of them; None where no input."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    outs = function(*leaves[:-1], leaves[-1], **how)
    sum((out.float() * noise(*out.shape, seed=9)).sum() for out in outs).backward()
    return [*outs, *(t.grad for t in leaves if t is not None)]


class TestSelectiveScan:
    @pytest.fixture(autouse=True)
    def extension(self, monkeypatch):
        made = SelectiveScanExtension()
        monkeypatch.setattr(selective, "selective_scan_extension", lambda: made)

    @staticmethod
    def case(state: bool, B=2, T=11, I=6, N=5):
        dt = noise(B, T, I, seed=1).abs() * 0.3
        dt[1, 9:] = 0
        return [
            noise(B, T, I), dt, -noise(I, N, seed=2).exp(), noise(B, T, N, seed=3), noise(B, T, N, seed=4),
            noise(I, seed=5), noise(B, I, N, seed=6) if state else None,
        ]

    @staticmethod
    def call(scan):
        return lambda *t, **how: scan(*t[:-1], chunk=4, state_BIN=t[-1], **how)

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("state", [False, True])
    @pytest.mark.parametrize("packed", [False, True])
    def test_equals_the_definition(self, packed, state, compiled):
        segments = torch.tensor([[1] * 4 + [0] * 1 + [1] * 6, [2] * 11]) if packed else None
        scan = selective.make_selective_scan()
        scan = torch.compile(scan, fullgraph=True, backend="aot_eager") if compiled else scan
        tensors = self.case(state)
        mine = results(self.call(scan), tensors, segments_BT=segments)
        theirs = results(self.call(selective_scan_definition), tensors, segments_BT=segments)
        for a, b in zip(mine, theirs, strict=True):
            near(a, b)

    def test_a_document_sees_nothing_of_another(self):
        segments = torch.tensor([[0] * 5 + [1] * 6] * 2)
        tensors = self.case(True)
        whole = self.call(selective.make_selective_scan())(*tensors, segments_BT=segments)
        later = [t[:, 5:] if i in (0, 1, 3, 4) else t for i, t in enumerate(tensors[:-1])]
        alone = self.call(selective.make_selective_scan())(*later, None)
        assert torch.equal(whole[0][:, 5:], alone[0]) and torch.equal(whole[1], alone[1])

    @pytest.mark.parametrize("packed", [False, True])
    def test_a_layer_compiles_whole(self, packed):
        mine = module("mamba1", chunk=16)
        mine.parts["scan"] = selective.make_selective_scan()
        tokens = Tokens.packed(SEGMENTS) if packed else Tokens.plain(2, 40)
        x, weights = noise(2, 40, mine.in_proj.weight.shape[1]), list(mine.parameters())
        whole = torch.compile(mine, fullgraph=True, dynamic=False, backend="aot_eager")
        found, truth = (torch.autograd.grad(f(x, tokens).square().sum(), weights) for f in (whole, mine))
        for a, b in zip(found, truth, strict=True):
            near(a, b)

    def test_refuses_in_numbers(self):
        with pytest.raises(ValueError, match="up to 256 states, not 300"):
            selective._check(1, 8, 300, 16)
        with pytest.raises(ValueError, match="the input has 2,147,483,648"):
            selective._check(2, 2**10, 16, 2**20)
        with pytest.raises(ValueError, match="its states has 2,147,483,648"):
            selective._check(2**10, 2**12, 256, 2**8)


class TestRefusals:
    @pytest.mark.parametrize("chunk", [8, 48, 512])
    @pytest.mark.parametrize("make", [make_core, make_scan])
    def test_chunk(self, make, chunk):
        for by, most in ("triton", 128), ("mamba_ssm", 256):
            with pytest.raises(ValueError, match=f"power of two from 16 to {most}, not {chunk}"):
                make(chunk=chunk, by=by)

    def test_keep(self):
        with pytest.raises(ValueError, match="all, states, none, not 'some'"):
            make_core(keep="some")
        with pytest.raises(ValueError, match="triton, mamba_ssm, not 'cuda'"):
            make_core(by="cuda")

    def test_offsets(self):
        ssd.check_offsets(x=2**31 - 1)
        with pytest.raises(ValueError, match="states has 2,147,483,648, the limit is 2,147,483,647"):
            ssd.check_offsets(x=5, states=2**31)

    def test_no_package(self, monkeypatch):
        monkeypatch.setattr(load.importlib.machinery.PathFinder, "find_spec", lambda name: None)
        monkeypatch.setattr(load, "NAME", "no_such_mamba_ssm")
        with pytest.raises(ImportError, match="no_such_mamba_ssm is not installed"):
            load._package()


@pytest.mark.parametrize("wanted, got", [(4096, 128), (128, 128), (127, 64), (64, 64), (40, 32), (3, 16)])
def test_the_chunk_that_suits_a_layer(wanted, got):
    for by in ("triton", "mamba_ssm"):
        assert chunk_length(wanted, None, of=by) == got
        assert chunk_length(wanted, 32, of=by) == 32
    # Ours are short of registers in float32.
    assert chunk_length(wanted, None, of="triton", dtype=torch.float32) == min(got, 64)


def test_documents_are_counted_from_zero():
    assert documents(None) is None
    counted = documents(torch.tensor([[7, 7, 2, 7, 7], [0, 0, 0, 0, -1]]))
    assert counted.dtype == torch.int32 and counted.tolist() == [[0, 0, 1, 2, 2], [0, 0, 0, 0, 1]]


@interpreter.only
class TestSteps:
    """The sums and gradients around the package's kernels; they are our own."""

    B, T, H, Q = 2, 37, 9, 16

    @pytest.mark.parametrize("limit", [(0, None), (0.3, 0.9), (0, 1.1)])
    def test_forward(self, limit):
        raw, bias, A_log = noise(self.B, self.T, self.H + 3) * 3, noise(self.H, seed=2), noise(self.H, seed=3)
        raw[0, 0, 3], raw[0, 1, 3] = 30.0, -30.0
        lengths = torch.tensor([self.T, 20])
        given = steps.Steps(raw[..., 3:], A_log, bias, lengths, *limit)
        step, decay = steps.forward(given, chunk=self.Q)
        real = torch.arange(self.T) < lengths[:, None]
        truth = torch.where(real[..., None], step_sizes(raw[..., 3:], bias, limit=limit), 0)
        padded = torch.nn.functional.pad(truth, (0, 0, 0, -self.T % self.Q)).unflatten(1, (-1, self.Q))
        torch.testing.assert_close(step, padded.transpose(2, 3), atol=0, rtol=2e-6)
        sums = (padded * -A_log.exp()).cumsum(2).transpose(2, 3)
        torch.testing.assert_close(decay, sums, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("raw, inside", [(True, True), (False, True), (True, False)])
    def test_backward(self, raw, inside):
        c = -(-self.T // self.Q)
        tile = (self.B, c, self.H, self.Q)
        parts = steps.DecayParts(
            noise(2, *tile, seed=1), noise(3, *tile, seed=2), noise(1, *tile, seed=3), noise(2, *tile, seed=4),
            noise(self.B, c, self.H, 5, seed=5), noise(4, self.B, c, self.H, seed=6),
        )
        parts.after[..., 0] = float("nan")
        if not inside:
            parts = parts._replace(inside=None)
        leaves = [noise(self.B, self.T, self.H), noise(self.H, seed=7), noise(self.H, seed=8)]
        if not raw:
            leaves[0] = leaves[0].abs()
        dt, A, bias = leaves = [t.requires_grad_() for t in leaves]
        size = step_sizes(dt, bias, limit=(0.2, 1.5)) if raw else dt
        padded = torch.nn.functional.pad(size, (0, 0, 0, -self.T % self.Q))
        padded = padded.unflatten(1, (-1, self.Q)).transpose(2, 3)
        decay = padded * (-A.exp() if raw else A)[:, None]
        after = parts.after.sum(0).nan_to_num()
        d_decay = after.cumsum(-1) + parts.before.sum(0).flip(-1).cumsum(-1).flip(-1)
        d_decay = d_decay + (parts.inside.sum(0) if inside else 0)
        d_decay = d_decay + parts.across.sum(-1, keepdim=True)
        ((padded * parts.step.sum(0)).sum() + (decay * d_decay).sum()).backward()
        how = (bias.detach(), None, 0.2, 1.5) if raw else ()
        ddt = torch.zeros(self.B, self.T, self.H)
        dA, dbias, dD = steps.backward(steps.Steps(dt.detach(), A.detach(), *how), parts, ddt=ddt)
        near(ddt, dt.grad)
        near(dA, A.grad)
        near(dD, parts.D.sum((0, 1, 2)))
        if raw:
            near(dbias, bias.grad)


PACKAGE = importlib.util.find_spec("mamba_ssm") is not None
MISSING = pytest.mark.skipif(not PACKAGE, reason="needs the sources of mamba_ssm")


@interpreter.only
@pytest.mark.parametrize("by", ["triton", pytest.param("mamba_ssm", marks=MISSING)])
class TestKernels:
    """The ops with our kernels, and with the package's."""

    @pytest.fixture(autouse=True)
    def on_a_cpu(self, monkeypatch):
        """One configuration for each of the package's kernels, the smallest blocks; no device to choose."""
        from triton.runtime.autotuner import Autotuner

        monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
        small = types.SimpleNamespace(multi_processor_count=2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: small)
        for made in vars(load.triton_kernels()).values() if PACKAGE else ():
            for kernel in vars(made).values():
                if isinstance(kernel, Autotuner):
                    kernel.configs = sorted(kernel.configs, key=lambda c: sum(c.kwargs.values()))[:1]
        convolution = ConvExtension()
        monkeypatch.setattr(conv_kernels, "extension", lambda: convolution)

    @staticmethod
    def call(scan):
        return lambda *t, **how: scan(*t[:-1], chunk=16, state_BHPN=t[-1], **how)

    @pytest.mark.parametrize("packed, state, P, N, G, chunk, split", [
        (False, False, 16, 16, 1, 16, False),
        (True, True, 16, 16, 2, 16, True),
        (False, True, 48, 40, 1, 64, False),
    ])
    def test_scan(self, by, packed, state, P, N, G, chunk, split, monkeypatch):
        monkeypatch.setattr(ssd, "processors", lambda device: 1000 if split else 2)
        B, T, H = 2, 40, 4 if split else 2
        dt = noise(B, T, H, seed=1).abs() * 0.4
        tensors = [
            noise(B, T, H, P), dt, -noise(H, seed=2).exp(), noise(B, T, G, N, seed=3), noise(B, T, G, N, seed=4),
            noise(H, seed=5), noise(B, H, P, N, seed=6) if state else None,
        ]
        segments = SEGMENTS.clamp_min(1) if packed else None
        if packed:
            dt[1, 35:] = 0
        mine = results(self.call(make_scan(chunk=chunk, by=by)), tensors, segments_BT=segments)
        theirs = results(self.call(ssd_definition), tensors, segments_BT=segments)
        for a, b in zip(mine, theirs, strict=True):
            near(a, b)

    @staticmethod
    def layers(by, **fields):
        both = [module("mamba2", head_dim=16, d_state=16, chunk=16, **fields) for _ in range(2)]
        conv = {"triton": triton_conv.make_conv, "mamba_ssm": make_conv}[by]
        both[0].parts |= {"conv": conv(), "scan": make_scan(by=by)}
        return both

    @staticmethod
    def trained(layer, call, tokens):
        x = noise(2, 40, 32).requires_grad_()
        y = call(x, tokens)
        (y * noise(*y.shape, seed=5)).sum().backward()
        return y, x.grad, *(p.grad for p in layer.parameters())

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("order, keep, more", [
        ("after_gate", "states", dict(heads=8, groups=2)),
        ("before_gate", "all", dict(heads=2, conv_bias=False, dt_limit=(0.1, 1.0))),
        ("none", "none", dict(heads=2)),
    ])
    def test_core(self, by, order, keep, more, packed):
        mine, reference = self.layers(by, gated_norm=order, **more)
        mine.parts["core"] = make_core(keep=keep, by=by)
        tokens = Tokens.packed(SEGMENTS) if packed else Tokens.plain(2, 40)
        for a, b in zip(self.trained(mine, mine, tokens), self.trained(reference, reference, tokens), strict=True):
            near(a, b)

    @pytest.mark.parametrize("packed", [False, True])
    def test_scan_of_lightning(self, by, packed):
        """As many groups as heads, steps of 1, and decays that have no gradient."""
        mine, reference = (module("lightning", heads=2, head_dim=16, chunk=16) for _ in range(2))
        mine.parts["scan"] = make_scan(by=by)
        tokens = Tokens.packed(SEGMENTS) if packed else Tokens.plain(2, 40)
        for a, b in zip(self.trained(mine, mine, tokens), self.trained(reference, reference, tokens), strict=True):
            near(a, b)

    def test_core_compiles_whole(self, by):
        for keep in ("all", "none"):
            mine, reference = self.layers(by, heads=2)
            mine.parts["core"] = make_core(keep=keep, by=by)
            tokens = Tokens.packed(SEGMENTS)
            whole = torch.compile(mine, fullgraph=True, backend="aot_eager")
            truth = self.trained(reference, reference, tokens)
            for a, b in zip(self.trained(mine, whole, tokens), truth, strict=True):
                near(a, b)

    @pytest.mark.parametrize("keep", ["all", "states", "none"])
    def test_fakes_have_the_shapes_of_the_real(self, by, keep):
        layer, _ = self.layers(by, heads=2)
        given = (
            noise(1, 20, layer.in_proj.weight.shape[0]), layer.conv.weight, layer.conv.bias, layer.dt_bias,
            layer.A_log, layer.D, layer.gate_norm.weight, None, None, 16, 1, 16, keep, 0.0, None, "after_gate",
            1, 1e-5, by,
        )
        given = [t.detach() if isinstance(t, torch.Tensor) else t for t in given]
        torch.library.opcheck(core._op._opoverload, tuple(given), test_utils=("test_schema", "test_faketensor"))
        outs = core._op(*given)
        back = (torch.ones_like(outs[0]), *outs[1:], *given)
        torch.library.opcheck(core._backward_op._opoverload, back, test_utils=("test_schema", "test_faketensor"))

    def test_prompts_in_pieces(self, by):
        mine, reference = self.layers(by, heads=2)
        mine.parts["core"] = make_core(by=by)
        x, states = noise(2, 40, 32), [layer.init_state(2, dtype=torch.float32) for layer in (mine, reference)]
        with torch.no_grad():
            for lo, hi in ((0, 17), (17, 40)):
                tokens = Tokens.packed(SEGMENTS[:, lo:hi])
                a, b = (layer(x[:, lo:hi], tokens, s) for layer, s in zip((mine, reference), states))
                near(a, b)
        for name in states[1]:
            near(states[0][name].float(), states[1][name].float())

    def test_the_tuned_kernel_is_called_itself(self, by):
        tensors = [
            noise(1, 20, 2, 16), noise(1, 20, 2).abs(), -noise(2).exp(), noise(1, 20, 1, 16), noise(1, 20, 1, 16),
            noise(2), None,
        ]
        first = results(self.call(make_scan(by=by)), tensors)
        assert by != "mamba_ssm" or launch._CHOSEN
        for a, b in zip(first, results(self.call(make_scan(by=by)), tensors), strict=True):
            assert torch.equal(a, b)
