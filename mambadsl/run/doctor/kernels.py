"""A part held to the reference: a small layer built with the part in one slot, and without any, same weights and input.

In: a part's name, a slot. Out: for each dtype of the part, plain data: relative errors of logits, gradients and
decoding, times. Runs in a process of its own (`answer.py`); what a kernel raises is data too.

A part is right where it differs from the reference in its dtype by no more than that differs from the reference in
float32, three times over, and never by more than a fifth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mambadsl.build.init import generator_of
from mambadsl.build.model import Model
from mambadsl.compile import Program, load
from mambadsl.kinds import registry as kinds
from mambadsl.parts import registry
from mambadsl.run.decode import Decoder
from mambadsl.text.diagnostic import MdlError

BATCH, TOKENS, PROMPT, STEPS = 2, 200, 9, 4
#: Checked in these, where the part takes them.
DTYPES = ("fp32", "bf16")
#: What products in TF32 and another order of sums may cost.
LEAST = {"fp32": 5e-3, "bf16": 2e-2}
MOST = 0.2
RUNS = 5

#: The stream is about as large as what the layer adds: the last norm would hide a wrong scale otherwise.
TEXT = """
model probe {{
  vocab = 512
  d_model = 256
  context = 256
  init_std = 0.06
  embedding_multiplier = 16
}}
layer L = {layer}
stack {{ L }}
parts probe : reference {{ {slot} = {part} }}
"""


def check(part: str, slot: str) -> Iterator[dict[str, Any]]:
    """One row for each dtype. `status`: "ok", "wrong", "refused" (the part does not take this layer) or "failed"."""
    owner = slot.partition(".")[0]
    examples = (kind.example for kind in kinds.all_kinds() if kind.name == owner or owner == "model")
    layer = next((text for text in examples if text), None)
    for dtype in DTYPES:
        if dtype not in registry.part(part).dtypes:
            continue
        row = {"part": part, "slot": slot, "dtype": dtype}
        if layer is None:
            yield {**row, "status": "refused", "detail": f"the kind `{owner}` has no `example` to try it on"}
            continue
        try:
            program = load(text=TEXT.format(layer=layer, slot=slot, part=part))
            yield {**row, **_compared(program, dtype, registry.part(part).devices)}
        except MdlError as error:
            said = [f"{d.message}: {'; '.join(d.notes)}" if d.notes else d.message for d in error.diagnostics]
            yield {**row, "status": "refused", "detail": "; ".join(said)}
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            yield {**row, "status": "failed", "detail": f"{type(error).__name__}: {first}"}


def _compared(program: Program, dtype: str, devices: tuple[str, ...]) -> dict[str, Any]:
    device = "cuda" if "cuda" in devices and torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    tried = _model(program, dtype, device, parts="probe")
    found = _outcome(tried)
    first_s = time.perf_counter() - started
    plain = _model(program, dtype, device, parts="reference")
    # The same rounded weights in float32.
    truth = _model(program, "fp32", device, parts="reference")
    truth.load_state_dict(plain.state_dict())
    expected, exact = _outcome(plain), _outcome(truth)
    row: dict[str, Any] = {"status": "ok", "detail": ""}
    for sort in ("forward", "gradients", "decoding"):
        names = [name for name in expected if name.startswith(sort)]
        errors = {name: _error(found[name], expected[name]) for name in names}
        allowed = {n: min(MOST, max(LEAST[dtype], 3 * _error(expected[n], exact[n]))) for n in names}
        # Not a number counts as the worst.
        worst = max(names, key=lambda name: (errors[name] != errors[name], errors[name] / allowed[name]))
        row[f"{sort}_error"] = errors[worst]
        # Written so that NaN is over, too.
        if not errors[worst] <= allowed[worst]:
            row["status"] = "wrong"
            what = f"{worst}: {errors[worst]:.1e} off, {allowed[worst]:.1e} allowed"
            row["detail"] = "; ".join(filter(None, (row["detail"], what)))
    return {**row, "ms": _ms(tried), "reference_ms": _ms(plain), "first_s": first_s}


def _model(program: Program, dtype: str, device: str, *, parts: str) -> Model:
    """With every weight moved off its initial value, so that ones and zeros hide nothing."""
    model = program.build(dtype=dtype, device=device, seed=0, parts=parts)
    with torch.no_grad():
        for path, tensor in model.tensors().items():
            noise = torch.randn(tensor.shape, generator=generator_of(path, seed=0)) * 0.02
            tensor.add_(noise.to(device=tensor.device, dtype=tensor.dtype))
    return model.eval()


def _outcome(model: Model) -> dict[str, Tensor]:
    """Logits, loss, gradients, the logits of a prompt and steps after it, and how good the tokens written are."""
    tokens = torch.randint(512, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1)).to(model.device)
    model.zero_grad()
    loss = model.loss(tokens)
    loss.backward()
    found = {f"gradients of {path}": p.grad.float() for path, p in model.named_parameters() if p.grad is not None}
    found["forward, the loss"] = loss.detach().float()
    with torch.no_grad():
        found["forward"] = model(tokens).float()
        # A state of fixed size is what fused steps work on.
        for sort, capacity in (("growing", None), ("fixed", PROMPT + STEPS)):
            state = model.init_state(BATCH, capacity=capacity)
            ends = range(PROMPT, PROMPT + STEPS + 1)
            pieces = [tokens[:, :PROMPT], *(tokens[:, end - 1 : end] for end in ends[1:])]
            logits = [model(piece, state=state).float() for piece in pieces]
            found[f"decoding with a {sort} state"] = torch.cat(logits, 1)
        found["decoding, the tokens chosen"] = _choices(model, tokens[:, :PROMPT])
    return found


def _choices(model: Model, tokens: Tensor) -> Tensor:
    """1 for each token that the engine writes where it is the best one; more by how far it is from it, in standard
    deviations of the logits."""
    with Decoder(model, batch=BATCH, capacity=PROMPT + STEPS, graph=False) as decoder:
        decoder.prefill(tokens.tolist())
        written = torch.tensor([row.tokens for row in decoder.run(STEPS)], device=model.device)
    logits = model(torch.cat((tokens, written[:, :-1]), 1))[:, PROMPT - 1 :].float()
    chosen = logits.gather(-1, written[..., None])[..., 0]
    return 1 + (logits.amax(-1) - chosen) / logits.std(-1)


def _error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the 2-norm. Infinite where the gradient is missing or the shape another."""
    return ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()


def _ms(model: Model) -> float:
    """Of a forward and backward pass, the best of some."""
    tokens = torch.zeros((BATCH, TOKENS), dtype=torch.int64, device=model.device)
    wait: Callable[[], None] = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    best = float("inf")
    for _ in range(RUNS):
        wait()
        started = time.perf_counter()
        model.loss(tokens).backward()
        wait()
        best = min(best, time.perf_counter() - started)
    return 1e3 * best
