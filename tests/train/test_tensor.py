"""Tensor ranks train as one process does, for every kind that splits, with data ranks and stages beside them; what they
save, one process loads. Slices of all ranks are the whole."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import pytest
import torch
from parts_fakes import GPU
from tensor_cases import STACKS, alone, text, together

import mambadsl
from mambadsl.build.state import describe
from mambadsl.graph.weights import all_weights, node_weights
from mambadsl.kinds.registry import get, names
from mambadsl.plan.assign import assign
from mambadsl.train.held import boxes
from mambadsl.train.slices import shared, slices, split, whole

#: Kinds that no number of ranks splits.
WHOLE = {"cca", "gmu", "linear"}
MESHES = {
    "tensor": {"tensor": 4}, "tensor x data": {"tensor": 2},
    "tensor x stages": {"tensor": 2, "stages": 2},
}


def layers(model: str):
    return mambadsl.load(text=text(model)).layers


def told(run) -> list[float]:
    """Loss and norm of the gradients of each step, and the held-out loss."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line[name] for line in lines for name in ("loss", "grad_norm", "held_out_loss") if name in line]


def cases(meshes: dict[str, dict], models: list[str]) -> dict[str, dict]:
    return {
        f"{model} {mesh}": {"model": model, "settings": settings}
        for model in models for mesh, settings in meshes.items()
    }


TWO = cases({"tensor": {"tensor": 2}}, ["dropped untied", "usual tied"])
FOUR = {
    **cases(MESHES, ["usual untied"]),
    **cases({"tensor x stages": {"tensor": 2, "stages": 2}}, ["sharing tied", "attending untied", "ahead tied"]),
    **cases({"tensor x data": {"tensor": 2}}, ["linear tied", "more untied", "older untied"]),
    **cases({"tensor x data": {"tensor": 2, "dtype": "bf16"}}, ["usual tied"]),
}
#: How far rounding is carried: a delta rule divides by the length of keys, a first token's next to none; of ten layers,
#: the third step's gradients are ten times as far apart as the second's, also of data ranks alone.
LOOSE = {"linear tied": 20, "more untied": 5}


@pytest.mark.parametrize("ranks, runs", [(2, TWO), (4, FOUR)])
def test_as_one_process(tmp_path, ranks, runs):
    together(runs, tmp_path, ranks=ranks)
    truths = {}
    for name, case in runs.items():
        # bfloat16 rounds what the ranks add up; Adam makes a step of it.
        dtype = case["settings"].get("dtype", "fp32")
        rtol, atol = {"fp32": (5e-5, 1e-5), "bf16": (1e-2, 2e-2)}[dtype]
        rtol, atol = (limit * LOOSE.get(case["model"], 1) for limit in (rtol, atol))
        truth = f"{case['model']} {dtype} alone"
        if truth not in truths:
            truths[truth] = alone(case, tmp_path, truth)
        torch.testing.assert_close(
            torch.tensor(told(tmp_path / name)), torch.tensor(told(tmp_path / truth)), rtol=rtol, atol=0,
            msg=lambda m: f"{name}: {m}",
        )
        found = alone(case, tmp_path, name, trains=False)
        assert found.keys() == truths[truth].keys()
        for key, value in truths[truth].items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=atol, msg=lambda m: f"{name}, {key}: {m}")


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("stack", STACKS)
def test_ranks_have_the_whole_between_them(stack, ranks):
    graph = layers(f"{stack} untied")
    part, weights = split(graph, ranks), all_weights(graph)
    local = all_weights(part)
    held = [slices(graph, part, ranks=ranks, rank=rank) for rank in range(ranks)]
    assert ("embed.weight" in held[0]) == ("head.weight" in held[0]) == (stack != "dropped")
    for path in held[0]:
        values = torch.arange(weights[path].elements).view(weights[path].shape)
        times = torch.zeros_like(values, dtype=torch.float64)
        for mine in held:
            if mine[path] is None:
                continue
            own = torch.empty(local[path].shape, dtype=torch.int64)
            for box in boxes(own, mine[path]):
                box.view.copy_(box.of(values))
                box.of(times).add_(1 / box.copies)
            axis = mine[path].axis
            expected = [values.narrow(axis, r.start, r.size) for r in mine[path].ranges]
            assert torch.equal(own, torch.cat(expected, axis)), path
        assert torch.equal(times, torch.ones_like(times)), path


def test_every_kind_splits_that_can():
    """Of the layers above, each kind has one that 4 ranks share; so does every kind that comes later, or it is said."""
    found = set()
    for stack in STACKS:
        graph = layers(f"{stack} untied")
        for node, mine in zip(graph.nodes, split(graph, 4).nodes):
            pairs = zip(node.branches(), mine.branches())
            found |= {one.kind for (_, _, one), (_, _, other) in pairs if one != other}
    assert found | WHOLE == set(names())


@pytest.mark.parametrize("stack", STACKS)
def test_parts_of_parts(stack):
    graph = layers(f"{stack} untied")
    assert split(split(graph, 2), 2) == split(graph, 4)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("stack", STACKS)
def test_a_layer_is_the_sum_of_its_parts(stack, ranks):
    """Each mixer by itself: what parts with the ranks' slices of its weights give adds up to what it gives."""
    graph = layers(f"{stack} untied")
    part = split(graph, ranks)
    held = [slices(graph, part, ranks=ranks, rank=rank) for rank in range(ranks)]
    x_BTI = torch.randn(2, 9, 2 * graph.model.d_model, generator=torch.Generator().manual_seed(1))
    for node, mine in zip(graph.layers, part.layers):
        dims = node.dims(graph.model.d_model)
        for (path, prefix, mixer), (_, _, other) in zip(node.branches(), mine.branches()):
            if mixer == other:
                continue
            sums = shared(graph, part)[path]
            module = get(mixer.kind).module()
            one = module(mixer.fields, dims)
            values = {name: random(name, tensor) for name, tensor in one.state_dict().items()}
            one.load_state_dict(values)
            x_BTD, tokens, meeting = x_BTI[..., : dims.d_in], describe((2, 9), device=x_BTI.device), Meeting(ranks)

            def of(rank: int) -> torch.Tensor:
                mine = filled(module(other.fields, dims), values, prefix, held[rank])
                mine.averaged = partial(meeting.averaged, rank)
                if sums:
                    mine.summed = partial(meeting.summed, rank)
                with torch.no_grad(), meeting:
                    return mine(x_BTD, tokens)

            with ThreadPoolExecutor(ranks) as pool, torch.no_grad():
                total, expected = sum(pool.map(of, range(ranks))), one(x_BTD, tokens)
            torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4, msg=lambda m: f"{path}: {m}")


class Meeting:
    """Ranks as threads, each of which waits for the others where they exchange something."""

    def __init__(self, ranks: int):
        self.barrier, self.given = Barrier(ranks, timeout=60), [None] * ranks

    def __enter__(self):
        return self

    def __exit__(self, failure, *_):
        if failure:
            self.barrier.abort()

    def exchanged(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self.given[rank] = x
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found

    def summed(self, rank: int, x: torch.Tensor) -> torch.Tensor:
        return sum(self.exchanged(rank, x))

    def averaged(self, rank: int, x: torch.Tensor, among: int | None = None) -> torch.Tensor:
        found = self.exchanged(rank, x)
        among = among or len(found)
        first = rank // among * among
        return sum(found[first : first + among]) / among


def random(name: str, tensor: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name) + tensor.numel()))
    return noise * 0.3 + (1.0 if "norm" in name else 0.0)


def filled(module, values, prefix, held):
    for name, tensor in list(module.state_dict().items()):
        mine = held[f"{prefix}.{name}"]
        if mine is None:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, None)
            continue
        for box in boxes(tensor, mine):
            box.view.copy_(box.of(values[name]))
    return module


def test_no_part_norms_by_itself_what_ranks_share():
    """Published Mamba-2 layers have one group: what scans and norms at once steps back for parts that exchange."""
    graph = layers("M Single tied")
    found = assign(split(graph, 2), parts="fused", machine=GPU)
    assert found.of("stack.0")["core"].part == "triton.core"
    single = found.of("stack.1")
    assert [single[slot].part for slot in ("core", "scan", "gate_norm")] == [None, "triton.scan", "triton.gate_norm"]
    reason = "norms groups of channels that it has, not those that 2 ranks share"
    assert {("triton.core", reason), ("mamba_ssm.core", reason)} <= set(single["core"].refused)


def test_what_is_whole_is_told():
    graph = layers("sharing tied")
    assert whole(graph, 4) == ["Proj (linear)"]
    assert whole(graph, 1) == []
    odd = layers("dropped untied")
    assert whole(odd, 2) == ["the vocabulary (257 ids are no multiple of 2)"]
    assert split(odd, 2).model.vocab == 257 and split(graph, 2).model.vocab == 128
    with pytest.raises(ValueError, match="no layer can be shared by 3 tensor ranks: 2 or 4 would do"):
        split(layers("A F tied"), 3)
    assert split(graph, 1) == graph
    assert {path for node in split(graph, 2).nodes for path, _ in node_weights(graph, node)} == set(all_weights(graph))
