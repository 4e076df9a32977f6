"""Norms against Hugging Face's and torch's, and their weights against the tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNorm
from transformers.models.zaya.modeling_zaya import ZayaResidualScaling

from mambadsl.kinds.fields import Word
from mambadsl.kinds.kind import norm_weights
from mambadsl.kinds.norm import Norm
from mambadsl.kinds.residual import AFFINE
from mambadsl.kinds.sublayer import NORM
from mambadsl.kinds.values import Variant


def form(name: str, **changed) -> Variant:
    return Variant(name, NORM.convert(Word(name)).values.replace(**changed))


FORMS = {
    "rmsnorm": form("rmsnorm", eps=1e-2),
    "zero centred": form("rmsnorm", eps=1e-2, zero_centered=True),
    "no weight": form("rmsnorm", weight=False),
    "layernorm": form("layernorm", eps=1e-2),
    "layernorm without bias": form("layernorm", bias=False),
    "layernorm without weight": form("layernorm", weight=False),
    "affine": AFFINE,
    "none": form("none"),
}


def made(norm: Variant, dtype=torch.float32) -> Norm:
    module = Norm(norm, 24, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(24, generator=generator))
    return module


@pytest.mark.parametrize("name", FORMS)
def test_parameters_are_the_tables(name):
    table = {w.name.removeprefix("norm."): w.shape for w in norm_weights("norm", FORMS[name], 24)}
    module = Norm(FORMS[name], 24, dtype=torch.bfloat16)
    assert {n: tuple(p.shape) for n, p in module.state_dict().items()} == table
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())


class OfZaya(ZayaResidualScaling):
    """Its term that is the stream."""

    def load_state_dict(self, weights):
        self.residual_scale, self.residual_bias = (nn.Parameter(weights[name].clone()) for name in ("weight", "bias"))
        for name in "hidden_states_scale", "hidden_states_bias":
            delattr(self, name)
            self.register_buffer(name, torch.zeros(24))

    def forward(self, x):
        return super().forward(torch.zeros_like(x), x)


THEIRS = {
    "rmsnorm": lambda: LlamaRMSNorm(24, eps=1e-2),
    "zero centred": lambda: Gemma2RMSNorm(24, eps=1e-2),
    "no weight": lambda: nn.RMSNorm(24, eps=1e-5, elementwise_affine=False),
    "layernorm": lambda: nn.LayerNorm(24, eps=1e-2),
    "layernorm without bias": lambda: nn.LayerNorm(24, eps=1e-5, bias=False),
    "layernorm without weight": lambda: nn.LayerNorm(24, eps=1e-5, elementwise_affine=False),
    "affine": lambda: OfZaya(24),
    "none": nn.Identity,
}


@pytest.mark.parametrize("name", FORMS)
def test_equals_others_forward_and_backward(name):
    ours, theirs = made(FORMS[name]), THEIRS[name]()
    theirs.load_state_dict(ours.state_dict())
    x = (torch.randn(2, 5, 24) * 0.1 + 0.3).requires_grad_()
    mix = torch.randn(2, 5, 24)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-6)
    gradients = torch.autograd.grad((y * mix).sum(), [x, *ours.parameters()])
    truths = torch.autograd.grad((expected * mix).sum(), [x, *theirs.parameters()])
    for mine, truth in zip(gradients, truths, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, theirs", [("rmsnorm", NemotronHRMSNorm), ("zero centred", Gemma2RMSNorm)])
def test_bfloat16_rounds_once_at_the_end(name, theirs):
    """As Nemotron-H and Gemma do: their results to the bit."""
    ours, theirs = made(FORMS[name], torch.bfloat16), theirs(24, eps=1e-2).bfloat16()
    theirs.load_state_dict(ours.state_dict())
    x = (torch.randn(4, 50, 24) * 3).bfloat16()
    y = ours(x)
    assert y.dtype == torch.bfloat16
    assert (y == theirs(x)).float().mean() > 0.999


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="no norm `batchnorm`"):
        Norm(Variant("batchnorm"), 8)
