"""Random hybrid chains, and the slow truths that the planner is held to."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

from mambadsl.plan.chain import Chain
from mambadsl.plan.device import DEVICES
from mambadsl.plan.pricing import Pricing
from mambadsl.plan.simulate import program, timeline
from mambadsl.plan.unit import Unit

#: Forward and backward of Mamba, attention, MLP, experts, relative to Mamba's forward.
KINDS = {"M": (1.0, 2.0), "A": (1.1, 2.6), "F": (0.8, 1.6), "E": (1.9, 3.6)}
NO_HOST_TIME = replace(DEVICES["h200"], action_s=0.0, beside_transfer=1.0)


def step_time(run, durations):
    return timeline(run, durations).step


def unit(path, forward=1.0, backward=2.0, **more):
    more.setdefault("out_bytes", 7_000_000)
    more.setdefault("kind", path)
    return Unit(path, forward_s=forward * 1e-3, backward_input_s=backward * 0.5e-3,
                backward_weight_s=backward * 0.5e-3, **more)


def hybrid(seed, length, *, head=None, **more):
    """Embedding, length - 2 layers, head: what it weighs is drawn too."""
    rng = random.Random(seed)
    layers = []
    for n in range(length - 2):
        label = rng.choice("MMMFFFAE")
        forward, backward = (t * rng.uniform(0.95, 1.05) for t in KINDS[label])
        layers.append(unit(f"stack.{n}", forward, backward, label=label, **more))
    weight = rng.uniform(0.5, 4) if head is None else head
    return [unit("embed", 0.05, 0.1, **more), *layers, unit("head", weight, 2 * weight, **more)]


def uniform(length, **more):
    return [unit(f"stack.{n}", **more) for n in range(length)]


def pricing(units, schedule, *, ranks, virtual=1, microbatches, limit=float("inf"), device=NO_HOST_TIME):
    run = program(schedule, ranks=ranks, virtual=virtual, microbatches=microbatches)
    chain = Chain(units, device=device)
    return Pricing(run, chain, device=device, microbatches=microbatches, limit=limit)


def exhaustive(price):
    """(step, cuts) of every split that fits, in no order."""
    blocks, stages = price.chain.blocks, price.program.stages
    for inner in combinations(range(1, blocks), stages - 1):
        cuts = (0, *inner, blocks)
        if not price.overflow(cuts):
            yield step_time(price.program, price.durations(cuts)), cuts
