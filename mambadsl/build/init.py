"""Initial values, by the laws that kinds declare, and the groups that optimisers want.

Each weight is drawn by itself on the CPU in float32, from (seed, path) alone, then rounded and copied: whole
model or stage, any order, any device, meta or not, the values are the same bits. Several are drawn at once.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from mambadsl.graph.graph import LayerGraph
from mambadsl.kinds.kind import Init, Weight

if TYPE_CHECKING:
    from mambadsl.build.model import Model


def initialise(model: Model, *, seed: int = 0) -> Model:
    """Gives every weight and buffer its initial value, in place."""
    tensors = model.tensors()
    with torch.no_grad():
        for path, value in drawn(model.weights, model.graph, seed=seed):
            tensors[path].copy_(value)
    return model


def materialise(model: Model, *, device: Any = "cpu", seed: int = 0) -> Model:
    """Memory and initial values for a model built on the meta device; the same bits as a direct build."""
    return initialise(model.to_empty(device=device), seed=seed)


def drawn(weights: Mapping[str, Weight], graph: LayerGraph, *, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(path, initial value) of all, the largest first. As many are drawn at once, or wait to be taken, as this process
    has cores: the machine's, shared by the processes that torchrun started on it."""
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    waiting: deque[tuple[str, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for path in sorted(weights, key=lambda path: -weights[path].elements):
            waiting.append((path, pool.submit(draw, weights[path], graph, path=path, seed=seed)))
            if len(waiting) > threads:
                path, value = waiting.popleft()
                yield path, value.result()
        for path, value in waiting:
            yield path, value.result()


def draw(weight: Weight, graph: LayerGraph, *, path: str, seed: int) -> Tensor:
    """The initial value of one weight, float32 on the CPU."""
    law, given = LAWS[weight.init.law], arguments(weight.init, graph, path=path)
    return law(weight.shape, generator_of(path, seed=seed), **given)


def generator_of(path: str, *, seed: int) -> Generator:
    """A generator that depends on nothing but the path and the seed."""
    digest = blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest) >> 1)


def arguments(init: Init, graph: LayerGraph, *, path: str) -> dict[str, float]:
    """A law's arguments with what the model says filled in: the standard deviation of `normal`, smaller for
    projections back onto the residual stream (GPT-2's rule, over the additions that there are); of laws that ask
    how deep a layer stands, that."""
    args = dict(init.args)
    if init.law == "normal":
        std = args.get("std", graph.model.init_std)
        scale = init.residual and graph.model.scale_residual_init
        args["std"] = std / math.sqrt(max(1, graph.residual_additions)) if scale else std
    if init.law in BY_DEPTH:
        args["before"], args["count"] = graph.depths[_owner(graph, path)]
    if init.law in BY_PLACE:
        args["place"] = graph.places[_owner(graph, path)]
    return args


def _owner(graph: LayerGraph, path: str) -> str:
    return next(owner for owner in graph.places if path.startswith(f"{owner}."))


def _normal(shape, generator: Generator, *, std: float, idle: int = 0) -> Tensor:
    drawn = torch.empty(shape).normal_(0, std, generator=generator)
    drawn[len(drawn) - idle :] = 0
    return drawn


def _uniform(shape, generator: Generator, *, bound: float) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _const(shape, generator: Generator, *, value: float) -> Tensor:
    return torch.full(shape, float(value))


def _ramp(shape, generator: Generator, *, low: float, high: float) -> Tensor:
    """Evenly from low to high."""
    return torch.linspace(low, high, *shape)


def _ending(shape, generator: Generator, *, last: float) -> Tensor:
    """Zeros, and one other at the end."""
    return torch.tensor([0.0] * (shape[0] - 1) + [last])


def _a_uniform(shape, generator: Generator, *, low: float, high: float) -> Tensor:
    """A_log of Mamba-2: -A is uniform in [low, high]."""
    return torch.empty(shape).uniform_(low, high, generator=generator).log()


def _a_arange(shape, generator: Generator) -> Tensor:
    """A_log of Mamba-1 (S4D-real): -A is 1, 2, ... d_state in each row."""
    return torch.arange(1, shape[-1] + 1, dtype=torch.float32).log().expand(shape)


def _dt_bias(shape, generator: Generator, *, low: float, high: float, floor: float) -> Tensor:
    """softplus of it is log-uniform in [low, high], and at least floor."""
    log_dt = torch.empty(shape).uniform_(math.log(low), math.log(high), generator=generator)
    dt = log_dt.exp().clamp_min(floor)
    # The inverse of softplus; expm1 keeps small dt exact.
    return dt + torch.log(-torch.expm1(-dt))


def _radius(shape, generator: Generator, *, low: float, high: float) -> Tensor:
    """a_param of Griffin: what is kept, exp(-softplus(it)), lies in [low, high], uniform as the radius in a ring."""
    squared = torch.empty(shape).uniform_(low**2, high**2, generator=generator)
    return torch.expm1(-0.5 * squared.log()).log()


def _slopes(shape, generator: Generator, *, before: int, count: int) -> Tensor:
    """Log decays of lightning attention: a geometric series over the heads (ALiBi's), by depth from itself down to
    next to nothing, as MiniMax computes it."""
    series = (0.5 ** (8 / shape[0])) ** torch.arange(1, shape[0] + 1)
    return series * (1 - before / (count - 1 + 1e-5) + 1e-5)


def _lambda_start(shape, generator: Generator, *, before: int, count: int) -> Tensor:
    """Of differential attention (arXiv:2410.05258): the deeper, the more is taken away."""
    return torch.full(shape, 0.8 - 0.6 * math.exp(-0.3 * before))


def _one_stream(shape, generator: Generator, *, streams: int, place: int) -> Tensor:
    """Hyper-connections that are, to begin with, the usual residual sum (arXiv:2409.19606, equation 14)."""
    pre = torch.zeros(streams)
    pre[place % streams] = 1
    return torch.cat((pre, torch.ones(streams), torch.eye(streams).flatten()))


def _shift_share(shape, generator: Generator, *, power: float, rise: float, before: int, count: int) -> Tensor:
    """Of RWKV's token shift: the later the channel, and the deeper the layer, the more a token is itself."""
    series = torch.arange(shape[0]) / shape[0]
    return series ** (power * (1 - before / count)) + rise * before / max(1, count - 1)


def _decay_speeds(shape, generator: Generator, *, before: int, count: int) -> Tensor:
    """time_decay of RWKV-4, from -5 to 3: the deeper the layer, the more of its channels are slow."""
    series = torch.arange(shape[0]) / max(1, shape[0] - 1)
    return 8 * series ** (0.7 + 1.3 * before / max(1, count - 1)) - 5


def _zigzag(shape, generator: Generator) -> Tensor:
    """time_first of RWKV-4: neighbouring channels differ."""
    return math.log(0.3) + 0.5 * ((torch.arange(shape[0]) + 1) % 3 - 1)


#: law -> (shape, generator, its arguments) -> values. `kinds.kind.Init` says what each is.
LAWS: dict[str, Callable[..., Tensor]] = {
    "normal": _normal,
    "uniform": _uniform,
    "zeros": lambda shape, generator: torch.zeros(shape),
    "ones": lambda shape, generator: torch.ones(shape),
    "const": _const,
    "ramp": _ramp,
    "ending": _ending,
    "a_uniform": _a_uniform,
    "a_arange": _a_arange,
    "dt_bias": _dt_bias,
    "radius": _radius,
    "one_stream": _one_stream,
    "slopes": _slopes,
    "shift_share": _shift_share,
    "decay_speeds": _decay_speeds,
    "zigzag": _zigzag,
    "lambda_start": _lambda_start,
}
#: Laws that are told how many layers that mix tokens come before theirs, and how many there are.
BY_DEPTH = "slopes", "lambda_start", "shift_share", "decay_speeds"
#: Laws that are told which layer theirs is.
BY_PLACE = ("one_stream",)


def param_groups(model: Model, *, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimiser: matrices decay; norms, biases, A_log, D and dt_bias do not. A
    shared or tied weight is in one group, once. `names` are the paths of `params`."""
    named = dict(model.named_parameters())
    groups = []
    for decays, rate in (True, weight_decay), (False, 0.0):
        names = [path for path in named if model.weights[path].decay is decays]
        groups.append(dict(params=[named[path] for path in names], names=names, weight_decay=rate))
    return groups
