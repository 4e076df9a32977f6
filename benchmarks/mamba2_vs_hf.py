"""Forward and backward of our Mamba-2 layer and Hugging Face's Mamba2Mixer (its torch path), in one run.

    OMP_NUM_THREADS=2 python benchmarks/mamba2_vs_hf.py [--json] [--length 2048] [--rounds 7]

Same weights, same input; outputs and gradients are compared before anything is timed. Then the two take
turns, and the table shows medians. Exit status 1 if results differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

import mambadsl
from mambadsl.kinds.kind import Dims
from mambadsl.kinds.registry import get
from mambadsl.kinds.tokens import Tokens

#: Hugging Face's name of each weight: ours.
NAMES = {
    "in_proj.weight": "in_proj.weight", "conv1d.weight": "conv.weight", "conv1d.bias": "conv.bias",
    "dt_bias": "dt_bias", "A_log": "A_log", "D": "D", "norm.weight": "gate_norm.weight",
    "out_proj.weight": "out_proj.weight",
}


def pair(d_model: int, head_dim: int, d_state: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our module and theirs, with the same weights."""
    heads = 2 * d_model // head_dim
    theirs = Mamba2Mixer(
        Mamba2Config(
            hidden_size=d_model, num_heads=heads, head_dim=head_dim, state_size=d_state, n_groups=1, expand=2,
            num_hidden_layers=1, chunk_size=256,
        ),
        layer_idx=0,
    )
    layer = f"mamba2(heads={heads}, head_dim={head_dim}, d_state={d_state})"
    program = mambadsl.load(text=f"model one {{ d_model = {d_model} }} stack {{ {layer} }}")
    f = program.layers.layers[0].layer.branches[0].fields
    ours = get("mamba2").module()(f, Dims(d_model, d_model))
    weights = theirs.state_dict()
    ours.load_state_dict({mine: weights[name].view_as(ours.get_parameter(mine)) for name, mine in NAMES.items()})
    return ours, theirs


Run = Callable[[Tensor], Tensor]


def results(module: torch.nn.Module, run: Run, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of every weight (by our names)."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = run(x)
    y.backward(dy)
    grads = {NAMES.get(name, name): p.grad.squeeze() for name, p in module.named_parameters()}
    return {"output": y.detach(), "input": x.grad, **grads}


def relative_difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def timed(module: torch.nn.Module, run: Run, x: Tensor, dy: Tensor) -> tuple[float, float]:
    """Seconds of one forward and one backward pass."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    start = time.perf_counter()
    y = run(x)
    middle = time.perf_counter()
    y.backward(dy)
    return middle - start, time.perf_counter() - middle


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)

    ours, theirs = pair(args.d_model, head_dim=64, d_state=128)
    tokens = Tokens.plain(1, args.length)
    runs = {"mambadsl": (ours, lambda x: ours(x, tokens)), "transformers": (theirs, theirs)}
    x, dy = torch.randn(2, 1, args.length, args.d_model)

    found = {name: results(*run, x, dy) for name, run in runs.items()}
    differences = {
        name: relative_difference(found["mambadsl"][name], tensor)
        for name, tensor in found["transformers"].items()
    }
    worst = max(differences, key=differences.get)
    if differences[worst] > 1e-4:
        print(f"results differ: {worst} by {differences[worst]:.1e} of its largest value", file=sys.stderr)
        return 1

    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            seconds[name].append(timed(*run, x, dy))
    rows = {
        name: {
            "forward_ms": 1e3 * statistics.median(f for f, _ in measured),
            "backward_ms": 1e3 * statistics.median(b for _, b in measured),
            "both_ms": 1e3 * statistics.median(f + b for f, b in measured),
        }
        for name, measured in seconds.items()
    }
    ratio = rows["transformers"]["both_ms"] / rows["mambadsl"]["both_ms"]
    if args.json:
        setting = {"d_model": args.d_model, "length": args.length, "threads": 2, "rounds": args.rounds}
        print(json.dumps({**setting, **rows, "speedup": ratio, "largest_difference": differences[worst]}))
        return 0
    print(f"d_model {args.d_model}, length {args.length}, batch 1, float32, 2 threads, "
          f"median of {args.rounds}; largest relative difference {differences[worst]:.1e} ({worst})\n")
    print(f"{'':14}{'forward':>12}{'backward':>12}{'both':>12}")
    for name, row in rows.items():
        print(f"{name:14}" + "".join(f"{ms:9.1f} ms" for ms in row.values()))
    print(f"\nmambadsl is {ratio:.2f} times as fast")
    return 0


if __name__ == "__main__":
    sys.exit(main())
