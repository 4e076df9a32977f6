"""A chain through a user's kind: each layer takes what the one above gave and gives its own; the first has none."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from mambadsl.build.model import build
from mambadsl.compile import load
from mambadsl.kinds import registry
from mambadsl.kinds.kind import RESIDUAL, Carried, Kind, Saved, linear, matmul

WIDTH = 6


def carried(f, dims):
    return (Carried("sum", (WIDTH,), fp32=True, optional=True),)


@cache
def module():
    import torch.nn.functional as F

    from mambadsl.kinds.module import KindModule

    class Module(KindModule):
        kind = LINK

        def forward(self, x_BTD, tokens, state=None, *, norm=None, sum):
            own_BTW = F.linear(x_BTD, self.in_proj.weight).float()
            total_BTW = own_BTW if sum is None else sum + own_BTW
            return F.linear(total_BTW.to(x_BTD.dtype), self.out_proj.weight), {"sum": total_BTW}

    return Module


LINK = Kind(
    name="link", doc="adds to what the link above gave", fields=(), module_code=module, gives=carried, takes=carried,
    weights=lambda f, dims: (
        *linear("in_proj", WIDTH, dims.d_in), *linear("out_proj", dims.d_model, WIDTH, init=RESIDUAL),
    ),
    state=lambda f, dims: (), flops=lambda f, dims, length: matmul(WIDTH * dims.d_in, WIDTH * dims.d_model),
    saved=lambda f, dims: Saved(dims.d_in, WIDTH),
)


@pytest.fixture
def program(monkeypatch):
    monkeypatch.setitem(registry._own, "link", LINK)
    settings = "model m { vocab = 50 d_model = 16 init_std = 0.3 }"
    return load(text=f"{settings} layer L = link() layer F = mlp(d_ff=8) stack {{ L F L L F }}")


def test_the_first_has_none_and_the_last_is_not_warned_of(program):
    assert not [d for d in program.diagnostics if d.severity != "info"]
    edges = [(e.source, e.target) for e in program.layers.edges if e.tensor == "sum"]
    assert edges == [("stack.0", "stack.2"), ("stack.2", "stack.3")]


def test_stages_carry_it_in_float32(program):
    g = program.layers
    paths = [node.path for node in g.nodes]
    tokens = torch.arange(14).view(2, 7)
    for dtype in "fp32", "bf16":
        whole = build(g, dtype=dtype)(tokens)
        for at in range(1, len(paths)):
            first, second = (build(g, plan=[paths[:at], paths[at:]], stage=k, dtype=dtype) for k in (0, 1))
            sent = dict(zip(first.stage.gives, first(tokens)))
            assert torch.equal(second(*sent.values()), whole)
            assert ("sum" in sent) == (at in (2, 3, 4))
            assert "sum" not in sent or sent["sum"].dtype == torch.float32
