"""Where our weights lie among another library's tensors: a table entry for each weight, read and written by.

    "down_proj.weight": "w2.weight"                              the same tensor under another name
    "gate_up_proj.weight": ("w1.weight", "w3.weight")            ours is theirs one below the other, by segments
    "conv.weight": Rows(Piece("conv1d.weight", shape=(-1, 1, 4)))        theirs has another shape
    "qkv_proj.weight": Rows(Piece("q_proj.weight", ("q", "gate"), groups=8), "k_proj.weight", "v_proj.weight")
    "experts.down_proj": Experts("experts.{}.w2.weight", 64)     theirs is a tensor an expert

A tensor of theirs that holds several segments of ours may hold them group by group (`groups`: of each head q and then
its gate). All of this only moves rows, so reading and writing back gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, TypeAlias

from mambadsl.kinds.kind import Weight

if TYPE_CHECKING:
    from torch import Tensor

    Get: TypeAlias = Callable[[str], Tensor]


@dataclass(frozen=True)
class Piece:
    """One tensor of theirs. segments: those of ours that it holds, in its order (default: the next one, or all where
    it is alone). groups: it holds them group by group. shape: its own, where it is not that of the rows. transposed:
    its last two axes are exchanged (of a piece that is alone)."""

    name: str
    segments: tuple[str, ...] = ()
    groups: int = 1
    shape: tuple[int, ...] | None = None
    transposed: bool = False


class Rows:
    """Pieces that hold a weight of ours together, along its first axis. constant: theirs may be missing, for the weight
    is never anything but what its law of initial values gives. together: one tensor that may be there instead, our
    weight as it is."""

    constant, together = False, ""

    def __init__(self, *pieces: Piece | str):
        self.pieces = tuple(Piece(p) if isinstance(p, str) else p for p in pieces)

    def _whole(self, weight: Weight) -> bool:
        """Whether ours is one tensor of theirs, row by row."""
        piece, *others = self.pieces
        return not others and piece.groups == 1 and piece.segments in ((), tuple(name for name, _ in weight.segments))

    def names(self) -> Iterator[str]:
        yield from (piece.name for piece in self.pieces)

    def below(self, path: str) -> Rows:
        """The same under a prefix."""
        return type(self)(*(replace(p, name=f"{path}.{p.name}") for p in self.pieces))

    def shapes(self, weight: Weight) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of each tensor of theirs."""
        yield from self._shapes(weight, weight.shape)

    def fits(self, weight: Weight, there: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether the tensors, all of which are there, have the shapes that hold the weight."""
        return all(there[name] == shape for name, shape in self.shapes(weight))

    def read(self, get: Get, weight: Weight) -> Tensor:
        import torch

        parts = list(self.parts(get, weight))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(weight.shape)

    def parts(self, get: Get, weight: Weight) -> Iterator[Tensor]:
        """What holds the weight's rows, one below the other: theirs themselves, where they are rows of ours."""
        yield from self._parts(get, weight, weight.shape)

    def write(
        self, tensor: Tensor, weight: Weight, shapes: Mapping[str, tuple[int, ...]] = {}
    ) -> Iterator[tuple[str, Tensor]]:
        """shapes: that some tensors had, where a table allows several."""
        yield from self._write(tensor, weight)

    def written(
        self, weight: Weight, shapes: Mapping[str, tuple[int, ...]] = {}
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of each tensor that `write` gives."""
        yield from self.shapes(weight)

    def _shapes(self, weight: Weight, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        sizes = dict(weight.segments)
        for piece, segments in self.held(weight):
            rows = sum(sizes[s] for s in segments) if len(self.pieces) > 1 or piece.segments else shape[0]
            own = (*shape[:-2], shape[-1], shape[-2]) if piece.transposed else (rows, *shape[1:])
            known = prod(n for n in piece.shape or () if n > 0)
            yield piece.name, tuple(n if n > 0 else prod(own) // known for n in piece.shape or own)

    def _parts(self, get: Get, weight: Weight, shape: tuple[int, ...]) -> Iterator[Tensor]:
        if self._whole(weight):
            [piece] = self.pieces
            theirs = get(piece.name)
            yield theirs.transpose(-1, -2) if piece.transposed else theirs.reshape(shape)
            return
        sizes, found = dict(weight.segments), {}
        for piece, segments in self.held(weight):
            rows = [sizes[s] for s in segments]
            theirs = get(piece.name).reshape(piece.groups, sum(rows) // piece.groups, *shape[1:])
            parts = theirs.split([n // piece.groups for n in rows], 1)
            found |= {s: part.flatten(0, 1) for s, part in zip(segments, parts)}
        yield from (found[s] for s in sizes)

    def _write(self, tensor: Tensor, weight: Weight) -> Iterator[tuple[str, Tensor]]:
        import torch

        if self._whole(weight):
            [piece] = self.pieces
            theirs = tensor.transpose(-1, -2) if piece.transposed else tensor
            yield piece.name, theirs if piece.shape is None else theirs.reshape(piece.shape)
            return
        sizes = dict(weight.segments)
        parts = dict(zip(sizes, tensor.split(list(sizes.values()))))
        for piece, segments in self.held(weight):
            theirs = parts[segments[0]]
            if len(segments) > 1:
                theirs = torch.cat([parts[s].unflatten(0, (piece.groups, -1)) for s in segments], 1).flatten(0, 1)
            yield piece.name, theirs if piece.shape is None else theirs.reshape(piece.shape)

    def held(self, weight: Weight) -> Iterator[tuple[Piece, tuple[str, ...]]]:
        """Each piece with the segments of ours that it holds. Raises ValueError where they are not the weight's."""
        names = [name for name, _ in weight.segments]
        left, found = list(names), []
        for piece in self.pieces:
            segments = piece.segments or (tuple(names) if len(self.pieces) == 1 else (left[0],) if left else ())
            found.append((piece, segments))
            left = [name for name in left if name not in segments]
        idle = len(found) > 1 and not all(held for _, held in found)
        if left or idle or sorted(s for _, held in found for s in held) != sorted(names):
            raise ValueError(f"`{weight.name}` has the segments {names}, its pieces hold others")
        yield from found


class Experts(Rows):
    """A tensor an expert, stacked along our axis 0; the names have `{}` for the expert's number. together: a tensor
    that may hold them all in their place, as ours does."""

    def __init__(self, count: int, *pieces: Piece | str, together: str = ""):
        super().__init__(*pieces)
        self.count, self.together = count, together

    def names(self) -> Iterator[str]:
        yield from (piece.name.format(i) for i in range(self.count) for piece in self.pieces)

    def below(self, path: str) -> Rows:
        together = self.together and f"{path}.{self.together}"
        return Experts(self.count, *Rows(*self.pieces).below(path).pieces, together=together)

    def shapes(self, weight: Weight) -> Iterator[tuple[str, tuple[int, ...]]]:
        found = list(self._shapes(weight, weight.shape[1:]))
        yield from ((name.format(i), shape) for i in range(self.count) for name, shape in found)

    def parts(self, get: Get, weight: Weight) -> Iterator[Tensor]:
        for i in range(self.count):
            yield from self._parts(lambda n: get(n.format(i)), weight, weight.shape[1:])

    def write(
        self, tensor: Tensor, weight: Weight, shapes: Mapping[str, tuple[int, ...]] = {}
    ) -> Iterator[tuple[str, Tensor]]:
        for i, expert in enumerate(tensor):
            yield from ((name.format(i), t) for name, t in self._write(expert, weight))


class Cut(Rows):
    """Pieces that are ours one below the other, whichever rows they are cut at: transformers 5 joins some tensors when
    it loads them, and cuts them into equal parts when it saves."""

    def fits(self, weight: Weight, there: Mapping[str, tuple[int, ...]]) -> bool:
        wanted = list(self.shapes(weight))
        same = all(there[name][1:] == shape[1:] for name, shape in wanted)
        return same and sum(there[name][0] for name, _ in wanted) == weight.shape[0]

    def parts(self, get: Get, weight: Weight) -> Iterator[Tensor]:
        yield from map(get, self.names())

    def write(
        self, tensor: Tensor, weight: Weight, shapes: Mapping[str, tuple[int, ...]] = {}
    ) -> Iterator[tuple[str, Tensor]]:
        wanted = dict(self.written(weight, shapes))
        parts = tensor.split([shape[0] for shape in wanted.values()])
        yield from ((name, part.reshape(shape)) for (name, shape), part in zip(wanted.items(), parts))

    def written(
        self, weight: Weight, shapes: Mapping[str, tuple[int, ...]] = {}
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from ((name, tuple(shapes.get(name, shape))) for name, shape in self.shapes(weight))


#: What a table may say for a weight.
Place: TypeAlias = "str | tuple[str, ...] | Rows"


def rows(place: Place) -> Rows:
    if isinstance(place, Rows):
        return place
    return Rows(*((place,) if isinstance(place, str) else place))
