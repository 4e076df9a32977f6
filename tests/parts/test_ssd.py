"""The SSD kernels in Triton's interpreter against autograd through the recurrence, a token at a time."""

from __future__ import annotations

import interpreter
import pytest
import torch
import torch.nn.functional as F

from mambadsl.parts.triton.ssd import backward, forward, groups, scan, shape

pytestmark = interpreter.ONLY

B, T, H, P, G, N = 2, 40, 4, 16, 2, 16


def _leaves(P: int = P, N: int = N) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def rand(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=g)

    step = rand(B, T, H).abs() * 0.3
    step[0, 5] = 0.0  # A token that takes no step.
    # The log decays apart from the steps, so that their gradients are told apart.
    leaves = dict(
        x=rand(B, T, H, P), B=rand(B, T, G, N), C=rand(B, T, G, N), step=step, log=-rand(B, T, H).abs(), D=rand(H),
        state=rand(B, H, P, N),
    )
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def _recurrence(x, B, C, step, log, D, state, documents):
    ys, ratio = [], x.shape[2] // B.shape[2]
    for t in range(x.shape[1]):
        if documents is not None and t > 0:
            state = torch.where((documents[:, t] == documents[:, t - 1])[:, None, None, None], state, 0.0)
        B_t, C_t = (v[:, t].repeat_interleave(ratio, 1) for v in (B, C))
        new = (step[:, t, :, None] * x[:, t])[..., None] * B_t[:, :, None]
        state = log[:, t].exp()[..., None, None] * state + new
        ys.append((state * C_t[:, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(ys, 1), state


def _wide(t: torch.Tensor) -> torch.Tensor:
    """The same values, as columns of wider rows."""
    rows = t.detach().flatten(2)
    return F.pad(rows, (0, 8), value=float("nan"))[..., : rows.shape[-1]].unflatten(-1, t.shape[2:])


def _chunks(t: torch.Tensor, Q: int) -> torch.Tensor:
    """[B, T, H] -> [B, c, H, Q], 0 after the last token."""
    t = F.pad(t.detach(), (0, 0, 0, -t.shape[1] % Q))
    return t.unflatten(1, (-1, Q)).transpose(2, 3).contiguous()


def _tokens(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(2, 3).flatten(1, 2)[:, :T]


def _check(Q: int, documents: bool, P: int = P, N: int = N) -> None:
    leaves = _leaves(P, N)
    numbers = None
    if documents:
        numbers = torch.stack([sum((torch.arange(T) >= s).int() for s in (9, 21, 22)), torch.zeros(T).int()])
        numbers = numbers.to(torch.int32).contiguous()
    y, last = _recurrence(*leaves.values(), numbers)
    generator = torch.Generator().manual_seed(1)
    dy, dlast = torch.randn(y.shape, generator=generator), torch.randn(last.shape, generator=generator)
    wanted = dict(zip(leaves, torch.autograd.grad((y, last), list(leaves.values()), (dy, dlast))))

    x, b, c = (_wide(leaves[n]) for n in ("x", "B", "C"))
    decay = _chunks(leaves["log"], Q).cumsum(-1)
    i = scan.Inputs(x, b, c, _chunks(leaves["step"], Q), decay, leaves["D"].detach(), numbers)
    mine, mine_last, before = scan.forward(i, leaves["state"].detach(), last=True)
    close = dict(atol=3e-4, rtol=3e-4)
    torch.testing.assert_close(mine, y, **close)
    torch.testing.assert_close(mine_last, last, **close)

    outs = {n: _wide(torch.full(leaves[n].shape, float("nan"))) for n in ("x", "B", "C")}
    parts, dstate = scan.backward(
        i, _wide(dy), before, dlast, dx=outs["x"], dB=outs["B"], dC=outs["C"], wants_dstate=True
    )
    for name, out in outs.items():
        torch.testing.assert_close(out, wanted[name], **close, msg=lambda m, name=name: f"d{name}: {m}")
    torch.testing.assert_close(dstate, wanted["state"], **close)
    torch.testing.assert_close(_tokens(parts.step.sum(0)), wanted["step"], **close)
    torch.testing.assert_close(parts.D.sum((0, 1, 2)), wanted["D"], **close)
    after, sums = parts.after.sum(0), parts.before.sum(0)
    after[..., 0] = 0
    assert parts.inside is None
    log = after.cumsum(-1) + sums.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(_tokens(log + parts.across.sum(-1)[..., None]), wanted["log"], **close)


@pytest.mark.parametrize("cut", [False, True])
def test_against_the_recurrence(cut, monkeypatch):
    """Chunks of 32 tokens, in every kernel as one tile or as two; the last is not full."""
    monkeypatch.setattr(shape, "TILE", 16)
    monkeypatch.setattr(scan, "SCORES", scan.SCORES._replace(cut=cut))
    for run in (forward.scan_forward, backward.inputs_backward, backward.scores_backward):
        defaults = run.__kwdefaults__
        monkeypatch.setattr(run, "__kwdefaults__", {**defaults, "loop": defaults["loop"]._replace(cut=cut)})
    _check(32, True)


@pytest.mark.parametrize("processors", [1, 1000])
def test_heads_split_between_programs(processors, monkeypatch):
    monkeypatch.setattr(shape, "TILE", 16)
    monkeypatch.setattr(shape, "processors", lambda device: processors)
    monkeypatch.setattr(groups.groups_backward, "__kwdefaults__", {
        **groups.groups_backward.__kwdefaults__, "rows": 16,
    })
    _check(32, True)


def test_sizes_that_are_not_powers_of_two(monkeypatch):
    monkeypatch.setattr(shape, "TILE", 16)
    _check(32, False, P=12, N=20)


def test_whole_chunks(monkeypatch):
    monkeypatch.setattr(shape, "TILE", 16)
    monkeypatch.setitem(globals(), "T", 64)
    _check(32, True)


def test_refusals():
    leaves = {n: leaf.detach() for n, leaf in _leaves().items()}
    step = _chunks(leaves["step"], 16)
    inputs = scan.Inputs(leaves["x"], leaves["B"], leaves["C"], step, step, leaves["D"], None)
    with pytest.raises(ValueError, match="at most 128"):
        scan.forward(inputs._replace(step_BcHQ=_chunks(leaves["step"], 256)), last=False)
    with pytest.raises(ValueError, match="side by side"):
        scan.forward(inputs._replace(x_BTHP=leaves["x"].transpose(1, 3)), last=False)
    with pytest.raises(ValueError, match="contiguous"):
        scan.forward(inputs._replace(decay_BcHQ=step.transpose(1, 2)), last=False)
