"""Every shipped model, small: built and trained for a step in pure torch; and, in both sizes, the parts that the
part sets would give it on an H200 with every package."""

from __future__ import annotations

import pytest
import torch
from parts_fakes import GPU
from shrunk import SHIPPED, shrunk, whole
from small_models import ids, shaken

from mambadsl.build.model import build
from mambadsl.graph.graph import Role
from mambadsl.graph.weights import all_weights
from mambadsl.kinds import registry as kinds
from mambadsl.parts.part import REFERENCE
from mambadsl.parts.sets import SETS
from mambadsl.parts.torch.experts import make_experts
from mambadsl.plan.assign import assign

#: Together they have every kind, residual streams in both dtypes, sums and multipliers.
COMPILED = {"codestral_mamba_7b": "fp32", "falcon_h1_7b": "fp32", "lfm2_350m": "bf16",
            "olmo_hybrid_7b": "bf16", "recurrent_gemma_2b": "bf16", "ling_3_0_flash": "bf16", "zamba2_1_2b": "bf16",
            "minimax_text_01": "bf16", "xlstm_7b": "bf16", "rwkv_4_7b": "bf16",
            "phi_4_mini_flash": "bf16", "zaya1_8b": "bf16"}


def once(name: str):
    """Each layer of it once; Zamba's projections aside of the stream need another behind them."""
    return shrunk(name, repeats=1 if name.startswith("zamba") else 0)


def mixers(program) -> list:
    return [m for node in program.layers.nodes if node.role is Role.LAYER for m in node.layer.branches]


@pytest.mark.parametrize("name", SHIPPED)
def test_small_and_yet_the_same_model(name):
    small, large = shrunk(name), whole(name)
    assert [n.path for n in small.layers.nodes] == [n.path for n in large.layers.nodes]
    assert len(small.layers.parts) == len(large.layers.parts)
    assert sum(w.elements for w in all_weights(small.layers).values()) < 2e7
    for ours, theirs in zip(mixers(small), mixers(large), strict=True):
        f, g = ours.fields, theirs.fields
        assert (ours.kind, ours.branch) == (theirs.kind, theirs.branch)
        for field in kinds.get(ours.kind).fields:
            # What is no count stays: forms, words, flags, multipliers.
            if not isinstance(g[field.name], int) or isinstance(g[field.name], bool):
                assert f[field.name] == g[field.name], field.name
            else:
                # Neither what there was one of nor what there were several of has changed to the other.
                assert (f[field.name] > 1) == (g[field.name] > 1), field.name
    for a, b in zip(small.layers.nodes, large.layers.nodes):
        assert a.role is not Role.LAYER or a.layer.sub == b.layer.sub


@pytest.mark.parametrize("name", SHIPPED)
def test_shorter_patterns_have_the_same_layers(name):
    long, short = shrunk(name), shrunk(name, repeats=1)
    assert {m.name for m in mixers(short)} == {m.name for m in mixers(long)}
    assert len(short.layers.nodes) <= len(shrunk(name, repeats=2).layers.nodes) <= len(long.layers.nodes)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_step_in_pure_torch(name):
    """More tokens than a chunk has; of layers that differ in nothing, two."""
    model = shaken(build(shrunk(name, repeats=2).layers), size=0.05)
    loss = model.loss(ids(1, 34, vocab=256))
    loss.backward()
    assert loss.isfinite()
    for path, p in model.named_parameters():
        # An expert that no token chose has a gradient of zeros, and zeros only.
        assert p.grad is not None and p.grad.isfinite().all(), path
        assert p.grad.any(), path


@pytest.mark.parametrize("parts", ("fused", "te", "inference"))
@pytest.mark.parametrize("name", SHIPPED)
def test_every_set_fits_every_model(name, parts):
    """In both sizes, and by the same parts: what is shown for the small model is true of the large one."""
    small, large = (assign(p.layers, parts=parts, machine=GPU, dtype="bf16").rows for p in (shrunk(name), whole(name)))
    for a, b in zip(small, large, strict=True):
        assert (a.label, a.paths) == (b.label, b.paths)
        for ours, theirs in zip(a.choices, b.choices, strict=True):
            assert (ours.slot, ours.part, ours.covered_by) == (theirs.slot, theirs.part, theirs.covered_by)
            # Work that the set has parts for is not left to pure torch.
            assert theirs.part != REFERENCE or theirs.covered_by or theirs.slot not in SETS[parts].order


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_whole(name):
    """No graph breaks, forward and backward; the same loss and gradients."""
    plain, whole_model = (_traceable(once(name), dtype=COMPILED[name]) for _ in range(2))
    # Few: the recurrence of mamba1 is traced token by token.
    tokens = ids(2, 4, vocab=256)
    loss = plain.loss(tokens)
    loss.backward()
    torch._dynamo.reset()
    compiled = torch.compile(whole_model.loss, backend="aot_eager", fullgraph=True)(tokens)
    compiled.backward()
    torch.testing.assert_close(compiled, loss)
    near = 1e-4 if COMPILED[name] == "fp32" else 3e-2
    for (path, p), (_, q) in zip(plain.named_parameters(), whole_model.named_parameters(), strict=True):
        assert (q.grad - p.grad).norm() <= near * p.grad.norm(), path


def _traceable(program, *, dtype: str):
    """The experts in pure torch count tokens on the host, which no whole graph can hold: torch's grouped products
    take their place."""
    model = shaken(build(program.layers, dtype=dtype), size=0.05)
    for _, sublayer in model.sublayers():
        for mixer in sublayer.mixer_modules():
            if "experts" in mixer.parts:
                mixer.parts["experts"] = make_experts()
    return model


#: Kinds that no published model has.
UNUSED = {"mamba3"}


def test_the_compiled_models_have_every_kind():
    assert {m.kind for name in COMPILED for m in mixers(once(name))} == set(kinds.names()) - UNUSED
