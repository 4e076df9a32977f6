"""Where the rules on kernels draw the line, on an NVIDIA GPU: legal on one side, and on the other refused before
anything runs, by the package itself or by us. Nothing here runs a kernel beyond what it can count."""

from __future__ import annotations

import pytest
import torch
from kind_values import module
from on_gpu import NEEDS_GPU, error

from mambadsl.kinds.rows import Rows

pytestmark = NEEDS_GPU
#: d_in_proj of the largest Nemotron-H: 256 heads of 64, 8 groups of 128 states.
SIZES = dict(heads=256, head_dim=64, groups=8, d_state=128)


@pytest.fixture(scope="module")
def conv():
    pytest.importorskip("causal_conv1d")
    from mambadsl.parts.causal_conv1d import kernels

    return kernels


@pytest.mark.parametrize("channels, taps, legal", [(16, 4, True), (16, 2, True), (12, 4, False), (16, 5, False)])
def test_widths_and_taps(conv, channels, taps, legal):
    """E104 and E106: the package refuses what our check refuses."""
    x = torch.randn(1, 32, channels, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(channels, taps, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)

    def bare():
        conv.extension().causal_conv1d_fwd(
            x.transpose(1, 2), weight, None, None, None, y.transpose(1, 2), None, True
        )

    if legal:
        bare()
        assert torch.equal(y, conv.forward(x, weight, None))
        return
    with pytest.raises(ValueError):
        conv.forward(x, weight, None)
    with pytest.raises(RuntimeError):
        bare()


@torch.no_grad()
@pytest.mark.parametrize("length, legal", [(61_000, True), (65_536, False)])
def test_offsets(conv, length, legal):
    """E120: 61,230 tokens of these rows are what 32 bits can count; our own kernels count in 64."""
    from mambadsl.parts.triton.core import make_core

    layer = module("mamba2", d_model=64, **SIZES).cuda().bfloat16()
    E = layer.in_proj.weight.shape[0]
    assert (length * E < 2**31) == legal
    zxbcdt_BTE = torch.randn(1, length, E, device="cuda", dtype=torch.bfloat16)
    ours = make_core()(layer, zxbcdt_BTE, Rows(), None)
    # The end of the rows again, with what they need before it: far apart in memory, and small offsets.
    lead = 4096
    again = make_core()(layer, zxbcdt_BTE[:, -2 * lead :].contiguous(), Rows(), None)
    assert error(ours[:, -lead:], again[:, -lead:]) < 5e-2
    pytest.importorskip("mamba_ssm")
    theirs = make_core(by="mamba_ssm")
    if legal:
        assert error(theirs(layer, zxbcdt_BTE, Rows(), None), ours) < 2e-2
    else:
        with pytest.raises(ValueError, match="32 bits"):
            theirs(layer, zxbcdt_BTE, Rows(), None)
