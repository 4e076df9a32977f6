"""Field values for tests, without the language, values("mamba2", d_model=64, heads=8), and layers of them."""

from __future__ import annotations

from mambadsl.kinds.kind import Dims
from mambadsl.kinds.registry import get
from mambadsl.kinds.values import Values


def values(kind: str, *, d_model: int = 32, **given) -> Values:
    """All fields of a kind: the given ones (as Python values), defaults for the rest."""
    model = Values(d_model=d_model)
    done: dict = {}
    for field in get(kind).fields:
        if field.name in given:
            done[field.name] = given.pop(field.name)
        else:
            default = field.default
            done[field.name] = default(Values(done), model) if callable(default) else default
    assert not given, f"{kind} has no fields {list(given)}"
    return Values(done)


def module(kind: str, *, d_model: int = 32, d_in: int | None = None, seed: int = 0, **given):
    """A kind's reference module with random weights (float32), every one of them non-trivial."""
    import torch

    f = values(kind, d_model=d_model, **given)
    made = get(kind).module()(f, Dims(d_model, d_in or d_model))
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in made.state_dict().items():
        with torch.no_grad():
            noise = torch.randn(tensor.shape, generator=generator)
            noise = noise.abs() if name == "slope" else noise
            scale = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.3
            tensor.copy_(noise * scale + (1.0 if "norm" in name or name == "D" else 0.0))
    return made


def trained(function, layer, x, tokens, real) -> list:
    """y of the tokens that are real, and the gradients of all weights for the sum of its squares. function: the layer,
    or what it was compiled to."""
    import torch

    y = function(x, tokens)[real]
    return [y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]
