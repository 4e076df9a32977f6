"""gmu, and what mamba1 gives it: the scan before the gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kind_values import module
from ragged import REAL, ragged

from mambadsl.kinds.mamba1.naive import naive


def test_mamba1_gives_its_scan_before_the_gate():
    """With a gate that is the same everywhere and no projection back, the definition's output is the scan."""
    made = module("mamba1", d_model=8, d_inner=8, d_state=4, chunk=4, bias=True, gives="scan")
    with torch.no_grad():
        made.in_proj.weight[8:] = 0
        made.in_proj.bias[8:] = 1.5
        made.out_proj.weight.copy_(torch.eye(8))
        made.out_proj.bias.zero_()
        x = torch.randn(4, 10, 8, generator=torch.Generator().manual_seed(1))
        _, given = made(x, ragged())
        expected, _ = naive(made.state_dict(), made.f, made.dims, x, ragged())
    gate = F.silu(torch.tensor(1.5))
    assert given.keys() == {"scan"} and given["scan"].isfinite().all()
    torch.testing.assert_close(given["scan"][REAL], expected[REAL] / gate, rtol=1e-5, atol=1e-5)


def test_the_unit_is_its_formula():
    made = module("gmu", d_model=6, d_inner=10)
    x, scan = torch.randn(2, 3, 6), torch.randn(2, 3, 10)
    expected = (F.silu(x @ made.in_proj.weight.T) * scan) @ made.out_proj.weight.T
    torch.testing.assert_close(made(x, ragged(), scan=scan), expected)
