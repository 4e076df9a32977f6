"""A model as a table: a row for each layer of the folded stack, what it costs, and totals.

In: a graph. Out: text of at most 110 columns (`summary_text`), or plain data (`summary_data`). A row speaks
for all its uses: its numbers are sums, so each column adds up to the last line. A shared weight is counted
once, in the first row that uses it; later rows say "(shared)".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mambadsl.graph.cost import NARROW, WIDE, Cost, costs, total
from mambadsl.graph.graph import LayerGraph, Node, Role
from mambadsl.graph.weights import all_weights
from mambadsl.show.describe import all_fields, kind_text, mixer_text, model_texts, shape_text
from mambadsl.show.fold import Group, Item, Leaf, fold, group_text, times
from mambadsl.show.units import count, flops, layers, percent, size

WIDTH = 110
INDENT = 2
SHAPE_LEAST = 14


@dataclass(frozen=True, slots=True)
class Row:
    """count: repeats in its place; layers: nodes it stands for; cost: None for groups and branches."""

    depth: int
    label: str
    count: int = 1
    kind: str = ""
    shape: str = ""
    nodes: tuple[Node, ...] = ()
    cost: Cost | None = None
    shared: str | None = None

    @property
    def name(self) -> str:
        return " " * (INDENT * self.depth) + times(self.label, self.count)


def rows(graph: LayerGraph, *, length: int | None = None, folded: bool = True) -> tuple[Row, ...]:
    """The table's rows. length: tokens of a sequence (default: the model's context). folded: else a row for
    every layer, called by its path."""
    table = costs(graph, length=length)
    if folded:
        return tuple(_rows(graph, fold(graph), table, 0))
    leaves = (Leaf(node.path, 1, (node,)) for node in graph.nodes)
    return tuple(row for leaf in leaves for row in _leaf_rows(graph, leaf, table, 0))


def summary_text(graph: LayerGraph, *, length: int | None = None, folded: bool = True) -> str:
    found = rows(graph, length=length, folded=folded)
    whole = total(costs(graph, length=length))
    mixed = whole.active_params != whole.params
    header = ["layer", "n", "kind", "shape", "params", *["active"] * mixed, "FLOPs/tok", "KV/tok", "state/seq", "share"]
    cells = [_cells(row, whole, mixed) for row in found]
    last = [
        "total",
        "",
        "",
        "",
        count(whole.params),
        *[count(whole.active_params)] * mixed,
        flops(float(whole.flops.forward)),
        size(whole.kv_bytes_per_token),
        size(whole.state_bytes),
        "",
    ]
    return "\n".join([*_head(graph, whole, length), "", *_table(header, cells, last)]) + "\n"


def summary_data(graph: LayerGraph, *, length: int | None = None, folded: bool = True) -> dict[str, Any]:
    """Plain data: name, model settings, length, totals, rows (exact numbers; FLOPs of the forward pass)."""
    from mambadsl.graph.json import to_data

    whole = total(costs(graph, length=length))
    return {
        "name": graph.name,
        "length": length or graph.model.context,
        "model": to_data(graph)["model"],
        "layers": len(graph.layers),
        "total": {**_numbers(whole), "bf16_bytes": _bytes(graph)},
        "rows": [_row_data(row) for row in rows(graph, length=length, folded=folded)],
    }


def _rows(graph: LayerGraph, items: tuple[Item, ...], table: dict[str, Cost], depth: int) -> Iterator[Row]:
    for item in items:
        if isinstance(item, Group):
            yield Row(depth, group_text(item.label), item.count, nodes=item.nodes)
            yield from _rows(graph, item.items, table, depth + 1)
        else:
            yield from _leaf_rows(graph, item, table, depth)


def _leaf_rows(graph: LayerGraph, leaf: Leaf, table: dict[str, Cost], depth: int) -> Iterator[Row]:
    node = leaf.node
    cost = total({n.path: table[n.path] for n in leaf.nodes})
    several = node.layer is not None and len(node.layer.branches) > 1
    kind = "sum" if several else kind_text(node)
    yield Row(depth, leaf.label, leaf.count, kind, shape_text(graph, node), leaf.nodes, cost, leaf.shared)
    for mixer in node.layer.branches if several else ():
        label = mixer.name or mixer.kind
        yield Row(depth + 1, label, 1, mixer.kind, mixer_text(mixer))


def _row_data(row: Row) -> dict[str, Any]:
    node = row.nodes[0] if row.nodes else None
    sort = "branch" if node is None else "group" if row.cost is None else node.role.value
    return {
        "depth": row.depth,
        "label": row.label,
        "sort": sort,
        "count": row.count,
        "kind": row.kind,
        "shape": row.shape,
        "shared": row.shared,
        "paths": [n.path for n in row.nodes],
        "fields": dict(all_fields(node)) if row.cost is not None and node is not None else {},
        "cost": _numbers(row.cost) if row.cost is not None else None,
    }


def _numbers(cost: Cost) -> dict[str, Any]:
    return {
        "params": cost.params,
        "active_params": cost.active_params,
        "buffers": cost.buffers,
        "flops_per_token": float(cost.flops.forward),
        "kv_bytes_per_token": cost.kv_bytes_per_token,
        "state_bytes": cost.state_bytes,
    }


def _bytes(graph: LayerGraph) -> int:
    """Of a checkpoint in bfloat16; what must stay in float32 does."""
    return sum(w.elements * (WIDE if w.fp32 else NARROW) for w in all_weights(graph).values())


def _head(graph: LayerGraph, whole: Cost, length: int | None) -> list[str]:
    import textwrap

    tail = [f"mtp {graph.mtp.settings.depths} deep"] if graph.mtp else []
    cuts = sum(node.cut_after for node in graph.nodes)
    stages = [f"{cuts + 1} stages by `|`"] if cuts else []
    first = [
        layers(len(graph.layers)),
        *tail,
        *stages,
        f"{count(whole.params)} params",
        *[f"{count(whole.active_params)} active"] * (whole.active_params != whole.params),
        f"{size(_bytes(graph))} in bf16",
    ]
    tokens = length or graph.model.context
    note = f"numbers are for all uses of a row; forward FLOPs, a mean over {tokens:,} tokens"

    def wrapped(words: Iterable[str]) -> list[str]:
        """Lines of words; spaces inside one do not break it."""
        joined = "   ".join(word.replace(" ", "\0") for word in words)
        return [line.replace("\0", " ") for line in textwrap.wrap(joined, WIDTH, break_on_hyphens=False)]

    return [*wrapped([graph.name, *first]), *wrapped(model_texts(graph)), note]


def _cells(row: Row, whole: Cost, mixed: bool) -> list[str]:
    cost = row.cost
    if cost is None:
        n = str(len(row.nodes)) if row.nodes else ""
        return [row.name, n, row.kind, row.shape, *[""] * (5 + mixed)]
    again = row.shared is not None and cost.params == 0
    params = "(shared)" if again else count(cost.params)
    active = "" if again else count(cost.active_params)
    kind = f"{row.kind} *" if row.shared and not again else row.kind
    n = str(len(row.nodes)) if row.nodes[0].role is Role.LAYER else ""
    return [
        row.name,
        n,
        kind,
        row.shape,
        params,
        *[active] * mixed,
        flops(float(cost.flops.forward)),
        _or_dash(cost.kv_bytes_per_token),
        _or_dash(cost.state_bytes),
        "-" if again else percent(cost.params, whole.params),
    ]


def _or_dash(n: int) -> str:
    return size(n) if n else "-"


def _table(header: list[str], cells: list[list[str]], last: list[str]) -> list[str]:
    every = [header, *cells, last]
    widths = [max(len(line[i]) for line in every) for i in range(len(header))]
    shape = header.index("shape")
    over = sum(widths) + 2 * (len(widths) - 1) - WIDTH
    widths[shape] = max(SHAPE_LEAST, widths[shape] - max(over, 0))
    rest = sum(widths) + 2 * (len(widths) - 1) - WIDTH
    widths[0] -= max(rest, 0)
    left = {0, header.index("kind"), shape}

    def line(values: list[str]) -> str:
        pairs = enumerate(zip(values, widths))
        return "  ".join(_cut(v, w).ljust(w) if i in left else v.rjust(w) for i, (v, w) in pairs).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    starred = any(c[2].endswith(" *") for c in cells)
    notes = ["* shared: one set of weights for all uses, counted here"] if starred else []
    return [line(header), rule, *map(line, cells), rule, line(last), *notes]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 3)].rstrip() + "..."
