"""Speculative decoding: the same tokens as greedy decoding, whatever the drafts are worth, in fewer passes."""

from __future__ import annotations

import pytest
import torch
from small_models import made

from mambadsl.run import speculate as module
from mambadsl.run.generate import generate, stream
from mambadsl.run.speculate import PENDING, speculate

MODELS = {
    "one depth": ("M A Delta L Unit", "mtp { M A F }"),
    "three depths": ("M A Delta L Unit", "mtp(depths=3) { M A F }"),
    "one set of weights": ("R Z S Conv", "mtp(depths=2, weights=shared) { A }"),
    "recurrent depths": ("Kimi Latent", "mtp(depths=4) { Delta Z }"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompt", [[5], [1, 2], [3, 4, 5, 6, 7, 8, 9]])
def test_drafts_change_nothing(name, prompt):
    stack, tail = MODELS[name]
    model = made(stack, more=tail, seed=len(prompt))
    plain = list(generate(model, [prompt], max_tokens=14)[0].tokens)
    for drafts in range(model.depths + 1):
        rounds = list(speculate(model, prompt, max_tokens=14, drafts=drafts))
        assert sum(rounds, []) == plain and all(1 <= len(new) <= 1 + drafts for new in rounds)


@pytest.mark.parametrize("name", MODELS)
def test_drafts_are_those_of_the_whole(name, monkeypatch):
    """With states and snapshots, each depth drafts what it would from all the tokens at once."""
    stack, tail = MODELS[name]
    model, seen = made(stack, more=tail), []

    def draft(drafters, ids, h_1TD):
        found = real(drafters, ids, h_1TD)
        _, *wanted = model.drafts(torch.tensor([[*ids, *found]]))
        assert found == [int(logits[0, len(ids) - 2].argmax()) for logits in wanted[: len(found)]]
        seen.append(len(found))
        return found

    real = module.draft
    monkeypatch.setattr(module, "draft", draft)
    list(speculate(model, [1, 2], max_tokens=24, drafts=model.depths))
    assert len(seen) > PENDING and seen[0] == model.depths and seen[-1] == 0


def test_good_drafts_save_passes():
    """Trained to count, the tail is right most of the time."""
    torch.manual_seed(0)
    model = made("M A F", more="mtp(depths=2, loss_weight=1) { A F }", jitter=False).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        tokens = (torch.randint(0, 40, (8, 1)) + torch.arange(14)) % 40
        optimizer.zero_grad()
        model.loss(tokens).backward()
        optimizer.step()
    prompt, wanted = [3, 4, 5, 6], [n % 40 for n in range(7, 31)]
    rounds = list(speculate(model.eval(), prompt, max_tokens=24, drafts=2))
    assert sum(rounds, []) == wanted == list(generate(model, [prompt], max_tokens=24)[0].tokens)
    assert len(rounds) <= 12


def test_generate_takes_drafts():
    model = made("M A F", more="mtp(depths=2) { A }").train()
    prompts = [[1, 2, 3], [4], [9, 8]]
    plain = generate(model, prompts, max_tokens=9)
    heard = []
    assert generate(model, prompts, max_tokens=9, drafts=2, stream=heard.append) == plain and model.training
    assert [step.token for step in heard if step.row == 1] == list(plain[1].tokens)
    how = dict(max_tokens=9, stop=[plain[0].tokens[2:4]])
    assert generate(model, prompts, drafts=1, **how) == generate(model, prompts, **how)
    assert list(stream(model, prompts[0], max_tokens=9, drafts=2)) == list(plain[0].tokens)


def test_what_cannot_be_drafted_is_refused():
    model = made("M A", more="mtp(depths=2) { A }")
    with pytest.raises(ValueError, match="from 0 to 2, the depths of the `mtp` tail, not 3"):
        generate(model, [[1]], max_tokens=4, drafts=3)
    with pytest.raises(ValueError, match="no `mtp` tail"):
        generate(made("M"), [[1]], max_tokens=4, drafts=1)
    with pytest.raises(ValueError, match="temperature must be 0, not 0.5"):
        generate(model, [[1]], max_tokens=4, drafts=1, temperature=0.5)
    with pytest.raises(ValueError, match="growing state"):
        model.hidden(torch.tensor([[1]]), state=model.init_state(1, capacity=3))
