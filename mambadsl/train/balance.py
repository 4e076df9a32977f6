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
        self.loads: dict[str, Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the figures that `add_up` gives: `imbalance`, the most that an expert had over the mean, of the worst
        layer; `aux_loss` and `z_loss`, the mean of layers that have one, before their coefficients."""
        has_aux, has_z = (any(layer[k] for layer in self.all.values()) for k in (1, 2))
        return ("imbalance",) * bool(self.all) + ("aux_loss",) * has_aux + ("z_loss",) * has_z

    def clear(self) -> None:
        for uses in self.layers.values():
            for layer in uses:
                layer.told.grad = None

    def add_up(self) -> Tensor:
        """Sums what all rows of the step told, over all ranks; the figures of `names`, float64, the same on each."""
        sizes = {path: experts + len(FIGURES) for path, (experts, _, _) in self.all.items()}
        total = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=self.world.device)
        told = dict(zip(sizes, total.split(list(sizes.values()))))
        # Tensor ranks see the same tokens: those of one tell.
        if self.world.at("tensor") == 0:
            for path, uses in self.layers.items():
                for layer in uses:
                    if layer.told.grad is not None:
                        told[path] += layer.told.grad
        if self.world.size > 1 and sizes:
            dist.all_reduce(total)
        self.loads = {path: told[path][:experts] for path, (experts, _, _) in self.all.items()}
        return self._figures(told)

    def _figures(self, told: dict[str, Tensor]) -> Tensor:
        found = []
        if self.all:
            worst = [n_E.max() * len(n_E) / n_E.sum().clamp_min(1) for n_E in self.loads.values()]
            found.append(torch.stack(worst).max())
        for k, name in (1, "aux"), (2, "z"):
            rows, sums = (FIGURES.index(what) - len(FIGURES) for what in ("rows", name))
            mean = [told[path][sums] / told[path][rows].clamp_min(1) for path, layer in self.all.items() if layer[k]]
            if mean:
                found.append(torch.stack(mean).mean())
        return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64, device=self.world.device)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the biases by the loads that were added up: every copy alike."""
        moved: set[int] = set()
        for path, uses in self.layers.items():
            for layer in uses:
                if layer.f.bias_rate and id(layer.bias) not in moved:
                    moved.add(id(layer.bias))
                    # A choice of no expert, the last, is nobody's load.
                    layer.bias[: layer.f.experts] += bias_step(self.loads[path], rate=layer.f.bias_rate)


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
