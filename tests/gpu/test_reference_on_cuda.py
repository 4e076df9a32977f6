"""The reference parts on an NVIDIA GPU give what they give on the CPU; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from small_models import EVERYTHING, MIXERS, VOCAB, made

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(3))


def _pair(stack: str, **how):
    return made(stack, **how), made(stack, device="cuda", **how)


def test_forward_and_backward():
    cpu, gpu = _pair(EVERYTHING)
    tokens = _tokens(2, 29)
    losses = [model.train().loss(tokens.to(next(model.parameters()).device)) for model in (cpu, gpu)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1].cpu(), losses[0], atol=1e-5, rtol=1e-5)
    for (name, a), (_, b) in zip(cpu.named_parameters(), gpu.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad.cpu(), a.grad, atol=2e-4, rtol=2e-3, msg=lambda m: f"{name}: {m}")


def test_packed_documents():
    cpu, gpu = _pair(MIXERS)
    segments = torch.tensor([[0] * 7 + [1] * 3 + [2] * 11, [0] * 20 + [-1]])
    tokens = _tokens(2, 21)
    with torch.no_grad():
        there = gpu(tokens.cuda(), segments=segments.cuda()).cpu()
        here = cpu(tokens, segments=segments)
    real = segments >= 0
    torch.testing.assert_close(there[real], here[real], atol=1e-4, rtol=1e-4)


def test_bf16_is_near_fp32():
    full, half = made(MIXERS, device="cuda"), made(MIXERS, device="cuda", dtype="bf16")
    tokens = _tokens(2, 40).cuda()
    with torch.no_grad():
        a, b = full(tokens), half(tokens)
    assert (a - b).abs().mean() < 0.08 * a.abs().mean()


def test_generation_is_the_same():
    from mambadsl.run.generate import generate

    cpu, gpu = _pair(MIXERS)
    prompts = [[1, 2, 3, 4, 5], [7, 8]]
    there = generate(gpu, prompts, max_tokens=12)
    here = generate(cpu, prompts, max_tokens=12)
    assert [g.tokens for g in there] == [g.tokens for g in here]
