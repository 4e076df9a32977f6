"""The multi-token-prediction tail: what each depth computes, what it is trained on, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import D_MODEL, VOCAB, graph, ids, made, shaken

from mambadsl.build.loss import IGNORE, cross_entropy, next_tokens, objective
from mambadsl.build.model import build
from mambadsl.graph.weights import all_weights
from mambadsl.kinds.tokens import Tokens
from mambadsl.run.generate import generate
from mambadsl.run.step import TrainStep
from mambadsl.text.diagnostic import MdlError

STACK = "M A Z F"
TAIL = "mtp(depths=2) { M A G }"
SHARED = "mtp(depths=3, weights=shared, loss_weight=0.3) { A F }"
#: A tail of shared layers, and of layers that read the first embedding.
MIXED = "mtp(depths=2) { S Delta Z B }"


def _norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _naive(model, tokens_T):
    """Logits of each depth for one document, [T - k, V]: the definition, one depth after the other."""
    w, T = model.tensors(), len(tokens_T)
    head_VD = w.get("head.weight", w["embed.weight"])
    x0_TD = w["embed.weight"][tokens_T]
    x_1TD, x0_1TD, tokens = x0_TD[None], x0_TD[None], Tokens.plain(1, T)
    for node, sublayer in model.sublayers():
        if not node.tail:
            x_1TD = sublayer(x_1TD, x0_1TD, tokens)
    h_TD = _norm(x_1TD[0], w["final_norm.weight"])
    found = []
    for k in range(model.depths):
        own = f"mtp.{k}" if f"mtp.{k}.eh_proj.weight" in w else "mtp.0"
        T -= 1
        e_TD = _norm(x0_TD[k + 1 :], w[f"{own}.enorm.weight"])
        h_TD = _norm(h_TD[:T], w[f"{own}.hnorm.weight"])
        joined_TD = torch.cat((e_TD, h_TD), 1) @ w[f"{own}.eh_proj.weight"].T
        for node, sublayer in model.sublayers():
            if node.path.startswith(f"mtp.{k}."):
                joined_TD = sublayer(joined_TD[None], x0_TD[None, k + 1 :], Tokens.plain(1, T))[0]
        h_TD = _norm(joined_TD, w[f"{own}.final_norm.weight"])
        found.append(h_TD @ head_VD.T)
    return found


@pytest.mark.parametrize("tail", [TAIL, SHARED, MIXED])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_depths_are_the_definition(tail, tied):
    model, tokens = made(STACK, more=tail, tie_embeddings=tied), ids(2, 9)
    assert set(model.state_dict()) == set(all_weights(model.graph))
    with torch.no_grad():
        logits, *drafts = model.drafts(tokens)
        assert len(drafts) == model.depths
        assert torch.equal(logits, model(tokens))
        for row in range(2):
            for k, wanted in enumerate(_naive(model, tokens[row])):
                torch.testing.assert_close(drafts[k][row, : 8 - k], wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tail", [TAIL, SHARED, MIXED])
def test_packed_documents_and_padding_are_documents_alone(tail):
    model, tokens = made(STACK, more=tail), ids(1, 12)
    segments = torch.tensor([[-1, 0, 0, 0, 0, 3, 3, 3, 3, 3, -1, -1]])
    with torch.no_grad():
        packed = model.drafts(tokens, segments=segments)
        for span in slice(1, 5), slice(5, 10):
            for one, many in zip(model.drafts(tokens[:, span]), packed):
                torch.testing.assert_close(many[:, span], one, atol=2e-5, rtol=1e-5)
        first, second = (model.losses(tokens[:, span]) for span in (slice(1, 5), slice(5, 10)))
        together = model.losses(tokens, segments=segments)
        for k, (a, b, both) in enumerate(zip(first, second, together)):
            # So many tokens of each document have one that is k + 1 further on.
            counts = [max(n - 1 - k, 0) for n in (4, 5)]
            torch.testing.assert_close(both, (a * counts[0] + b * counts[1]) / max(sum(counts), 1))
        valid = segments == 0
        torch.testing.assert_close(model.loss(tokens, valid=valid), model.loss(tokens[:, 1:5]))


def test_the_loss_adds_the_mean_of_the_depths():
    model, tokens = made(STACK, more=SHARED), ids(2, 9)
    logits, *drafts = model.drafts(tokens)
    by_hand = [F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())]
    for k, draft in enumerate(drafts, 1):
        by_hand.append(F.cross_entropy(draft[:, : -1 - k].flatten(0, 1), tokens[:, 1 + k :].flatten()))
    torch.testing.assert_close(torch.stack(model.losses(tokens)), torch.stack(by_hand))
    wanted = by_hand[0] + 0.3 * sum(by_hand[1:]) / 3
    torch.testing.assert_close(model.loss(tokens), wanted)
    torch.testing.assert_close(objective((logits, *drafts), next_tokens(tokens), loss_weight=0.3), wanted)


def test_a_part_for_the_loss_does_every_depth():
    """It reads what the head reads, and the targets that count."""
    model, tokens, calls = made(STACK, more=SHARED), ids(2, 9), []
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1, -1]] * 2)

    def loss(h_BTD, weight_VD, targets_BT, *, multiplier, softcap):
        calls.append(targets_BT)
        logits = (h_BTD @ weight_VD.T).flatten(0, 1)
        total = F.cross_entropy(logits, targets_BT.flatten(), ignore_index=IGNORE, reduction="sum")
        return total / (targets_BT != IGNORE).sum().clamp_min(1)

    wanted = model.loss(tokens, segments=segments)
    model.frame = {**model.frame, "loss": loss}
    torch.testing.assert_close(model.loss(tokens, segments=segments), wanted)
    assert [(t != IGNORE).sum().item() for t in calls] == [10, 6, 2, 0]


def test_given_targets_go_along():
    """Where no target counts, none counts for the depths that would predict it from earlier tokens."""
    model, tokens = made(STACK, more=TAIL), ids(1, 8)
    targets = next_tokens(tokens)
    targets[:, :5] = IGNORE
    _, first, second = model.losses(tokens, targets)
    _, *drafts = model.drafts(tokens)
    torch.testing.assert_close(first, cross_entropy(drafts[0][:, 4:6], tokens[:, 6:8]))
    torch.testing.assert_close(second, cross_entropy(drafts[1][:, 3:5], tokens[:, 6:8][:, -2:]))


def test_gradients_reach_everything():
    for tail in TAIL, SHARED, MIXED:
        model = made(STACK, more=tail).train()
        model.loss(ids(2, 9)).backward()
        for path, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, path


def test_one_set_of_weights_is_the_same_as_equal_ones():
    shared = made(STACK, more="mtp(depths=3, weights=shared) { A F }")
    own = made(STACK, more="mtp(depths=3) { A F }")
    values = shared.state_dict()
    for path in own.weights:
        of_depth_0 = ".".join(["mtp", "0", *path.split(".")[2:]]) if path.startswith("mtp.") else path
        own.state_dict()[path].copy_(values[of_depth_0])
    for a, b in zip(own.drafts(ids(1, 7)), shared.drafts(ids(1, 7))):
        assert torch.equal(a, b)
    shared.loss(ids(1, 7)).backward()
    own.loss(ids(1, 7)).backward()
    sum_ = sum(own.get_parameter(f"mtp.{k}.0.mixer.qkv_proj.weight").grad for k in range(3))
    torch.testing.assert_close(shared.get_parameter("mtp.0.0.mixer.qkv_proj.weight").grad, sum_)


def test_without_weight_the_tail_is_not_trained():
    plain, model = made(STACK), made(STACK, more="mtp(loss_weight=0) { A }")
    tokens = ids(2, 9)
    loss = model.loss(tokens)
    assert torch.equal(loss, plain.loss(tokens)) and len(model.losses(tokens)) == 2
    loss.backward()
    assert all((p.grad is None) == path.startswith("mtp.") for path, p in model.named_parameters())


def test_what_reads_and_writes_tokens_ignores_the_tail():
    plain, model = made(STACK), made(STACK, more=TAIL)
    assert torch.equal(plain(ids(2, 9)), model(ids(2, 9)))
    assert list(model.init_state(1).layers) == list(plain.init_state(1).layers)
    prompts = [[1, 2, 3], [4]]
    assert generate(model, prompts, max_tokens=6) == generate(plain, prompts, max_tokens=6)
    assert plain.depths == 0 and len(plain.drafts(ids(1, 3))) == 1


def test_a_recomputed_tail_has_the_same_gradients():
    tail = "mtp(depths=2) { M A }"
    kept = made(STACK, more=tail).train()
    again = made(STACK, more=tail.replace("M A", "M(recompute=true) A(recompute=true)")).train()
    for model in kept, again:
        model.loss(ids(2, 9)).backward()
    for path, p in kept.named_parameters():
        torch.testing.assert_close(again.get_parameter(path).grad, p.grad)


def test_a_training_step_is_the_loss():
    model = made(STACK, more=TAIL).train()
    model.loss(ids(2, 9)).backward()
    wanted = {path: p.grad for path, p in model.named_parameters()}
    torch.testing.assert_close(TrainStep(model).step(ids(2, 9)), model.loss(ids(2, 9)).detach())
    for path, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[path])


def test_narrow_weights_and_a_wide_stream():
    model = made(STACK, more=MIXED, dtype="bf16", residual_dtype="fp32")
    wide = made(STACK, more=MIXED, residual_dtype="fp32")
    for narrow, exact in zip(model.drafts(ids(2, 9)), wide.drafts(ids(2, 9))):
        assert narrow.dtype == torch.float32 and narrow.shape == (2, 9, VOCAB)
        assert (narrow - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.parametrize("stack", ["M A F", STACK])
@pytest.mark.parametrize("cuts", [[2], [1, 3], [4]])
def test_stages_are_the_whole(stack, cuts):
    options = dict(more=SHARED, tie_embeddings="true", embedding_multiplier=2)
    whole = made(stack, **options)
    paths = [node.path for node in whole.graph.nodes]
    plan = [paths[a:b] for a, b in zip([0, *cuts], [*cuts, len(paths)])]
    parts = [shaken(build(whole.graph, plan=plan, stage=k).eval()) for k in range(len(plan))]
    tokens = ids(2, 7)
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [-1, -1, 0, 0, 0, 0, 0]])
    crossing = (tokens,)
    for part in parts[:-1]:
        crossing = part(*crossing, segments=segments)
    assert parts[-1].stage.takes == ("x", "x0") and all(t.shape == (2, 7, D_MODEL) for t in crossing)
    found = parts[-1].drafts(*crossing, segments=segments)
    for mine, theirs in zip(found, whole.drafts(tokens, segments=segments), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(parts[-1](*crossing, segments=segments), found[0])
    loss = objective(found, next_tokens(tokens, segments=segments), loss_weight=0.3, segments=segments)
    torch.testing.assert_close(loss, whole.loss(tokens, segments=segments))
    loss.backward()
    whole.loss(tokens, segments=segments).backward()
    for path, parameter in whole.named_parameters():
        grads = [p.get_parameter(path).grad for p in parts if path in p.weights]
        grads = [grad for grad in grads if grad is not None]
        torch.testing.assert_close(sum(grads), parameter.grad, atol=1e-6, rtol=1e-4, msg=path)
    with pytest.raises(ValueError, match="last stage"):
        parts[0].drafts(tokens)
    with pytest.raises(TypeError, match="takes x, x0"):
        parts[-1].drafts(crossing[0])
    with pytest.raises(ValueError, match="`objective` with `mtp`"):
        parts[-1].loss(tokens)


def test_the_tail_stays_with_the_head():
    g = graph("M A", more="mtp { F }")
    paths = [node.path for node in g.nodes]
    with pytest.raises(MdlError, match=r"`mtp.0.in` of the `mtp` tail is in stage 1 without the head"):
        build(g, plan=[paths[:4], paths[4:]], stage=0, device="meta")
