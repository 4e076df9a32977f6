"""The experts of a run, kept balanced: loads summed over the ranks after the backward passes of a step, biases moved by
them after the optimizer (DeepSeek-V3, arXiv:2412.19437, section 2.1.2), what the log says of them.

Losses that balance need nothing here: their gradients come with the layers' own (`kinds/balance.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mambadsl.graph.graph import LayerGraph
from mambadsl.kinds.balance import FIGURES, Balanced, bias_step
from mambadsl.train.pieces import Piece
from mambadsl.train.settings import Settings
from mambadsl.train.world import World

#: Of a kind with experts.
FIELDS = {"aux_loss", "z_loss", "bias_rate"}


class Balance:
    """Of a rank's pieces. Layers go by the path of their weights; uses of a shared one add up. Letters: E experts."""

    def __init__(self, pieces: Sequence[Piece], world: World, settings: Settings):
        self.world = world
        self.layers: dict[str, list[Balanced]] = {}
        for made in pieces:
            for path, layer in _layers(made):
                # Where tensor ranks have a part each, the parts' gradients are added up.
                parts = world.ranks("tensor") if any(name.startswith(f"{path}.") for name in made.slices) else 1
                layer.watch(row_share=1 / (settings.batch * parts), device=world.device)
                self.layers.setdefault(path, []).append(layer)
        own = {path: (u[0].f.experts, bool(u[0].f.aux_loss), bool(u[0].f.z_loss)) for path, u in self.layers.items()}
        every: dict[str, tuple[int, bool, bool]] = {}
        for theirs in world.gathered(own):
            every.update(theirs)
        #: Path -> experts, and whether it has each loss, of the whole model.
        self.all = dict(sorted(every.items()))
        self.sizes = {path: experts + len(FIGURES) for path, (experts, _, _) in self.all.items()}
        #: Path -> copies of the bias that is moved, each once.
        self.biases = {
            path: list({id(layer.bias): layer.bias for layer in uses}.values())
            for path, uses in self.layers.items() if uses[0].f.bias_rate
        }

    def clear(self) -> None:
        for uses in self.layers.values():
            for layer in uses:
                layer.told.grad = None

    def add_up(self) -> Tensor:
        """What all rows of the step told, summed over all ranks: float64, of all layers, the same on each rank."""
        total = torch.zeros(sum(self.sizes.values()), dtype=torch.float64, device=self.world.device)
        found = self._by_layer(total)
        # Tensor ranks see the same tokens: those of one tell.
        if self.world.at("tensor") == 0:
            for path, uses in self.layers.items():
                for layer in uses:
                    if layer.told.grad is not None:
                        found[path] += layer.told.grad
        if self.world.size > 1 and self.all:
            dist.all_reduce(total)
        return total

    def _by_layer(self, total: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.sizes, total.split(list(self.sizes.values()))))

    def facts(self, total: Tensor) -> dict[str, float]:
        """Of what `add_up` gave. imbalance: the most that an expert had over the mean, of the worst layer. aux_loss,
        z_loss: the mean of the layers that have one, before its coefficient."""
        found, facts = self._by_layer(total), {}
        if loads := [found[path][:experts] for path, (experts, _, _) in self.all.items()]:
            facts["imbalance"] = max((n_E.max() * len(n_E) / n_E.sum().clamp_min(1)).item() for n_E in loads)
        for k, name in (1, "aux"), (2, "z"):
            rows, sums = (FIGURES.index(what) - len(FIGURES) for what in ("rows", name))
            layers = [found[path] for path, layer in self.all.items() if layer[k]]
            if layers:
                facts[f"{name}_loss"] = sum((t[sums] / t[rows].clamp_min(1)).item() for t in layers) / len(layers)
        return facts

    @torch.no_grad()
    def update(self, total: Tensor) -> None:
        """Moves the biases by what `add_up` gave: every copy alike."""
        found = self._by_layer(total)
        for path, copies in self.biases.items():
            f = self.layers[path][0].f
            step_E = bias_step(found[path][: f.experts], rate=f.bias_rate).to(self.world.device, non_blocking=True)
            for bias in copies:
                # A choice of no expert, the last, is nobody's load.
                bias[: f.experts] += step_E


def told(graph: LayerGraph) -> list[str]:
    """What balances the experts of each layer that has some, those of one name together."""
    found: dict[tuple[str, str], int] = {}
    for node in graph.nodes:
        for path, _, mixer in node.branches():
            if FIELDS.issubset(mixer.fields):
                how = ", ".join(f"{name}={mixer.fields[name]}" for name in sorted(FIELDS) if mixer.fields[name])
                key = mixer.name or path, how
                found[key] = found.get(key, 0) + 1
    return [
        f"experts of {name}{f' ({count} times)' * (count > 1)} are balanced by "
        + (how or "nothing: `aux_loss` does it, or `bias_rate` where the router has a bias")
        for (name, how), count in found.items()
    ]


def _layers(made: Piece) -> Iterator[tuple[str, Balanced]]:
    for node, sublayer in made.model.sublayers():
        for (_, path, _), mixer in zip(node.branches(), sublayer.mixer_modules()):
            if isinstance(mixer, Balanced):
                yield path, mixer
