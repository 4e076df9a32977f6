"""Forecasts, comparisons and measurements as text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from mambadsl.plan.schedule import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD
from mambadsl.show.plan import layers, time
from mambadsl.show.units import count, percent, size
from mambadsl.train.compare import Action, Comparison, Row
from mambadsl.train.forecast import Forecast, Held
from mambadsl.train.measure import Measurement
from mambadsl.train.settings import Settings

AXES = ("pipeline", "data", "tensor")
NAMES = {
    FORWARD: "forward", BACKWARD: "backward", BACKWARD_INPUT: "backward, inputs", BACKWARD_WEIGHT: "backward, weights",
}


def forecast_text(
    forecast: Forecast, settings: Settings, *, rows: int, corpus_tokens: int, held_out_rows: int = 0,
    notes: Sequence[str] = (),
) -> str:
    """Of a run that has not begun. rows: of an epoch; corpus_tokens: of the data, with the rows that are held out;
    notes: what else it would say."""
    f, epochs = forecast, settings.steps * settings.batch / rows
    mesh = " x ".join(f"{n} {name}" for n, name in zip(f.mesh, AXES))
    ranks = f.mesh[0] * f.mesh[1] * f.mesh[2]
    rows_each = f"{f.rows} a data rank, {f.microbatches} microbatch{'es' * (f.microbatches > 1)} of {f.microbatch_rows}"
    parts = ("layers", f.layers_s), ("copies", f.copies_s), ("link", f.link_s), ("optimizer", f.optimizer_s)
    lines = [
        ("ranks", f"{ranks:,} = {mesh}; {f.device}"),
        ("rows", f"{settings.batch:,} of {settings.length:,} tokens a step: {rows_each}"),
        ("steps", f"{settings.steps:,}: {count(settings.steps * f.tokens)} tokens, {epochs:.3g} epochs of "
                  f"{count(corpus_tokens)} tokens in {rows + held_out_rows:,} rows"
                  + (f", {held_out_rows:,} of them held out" if held_out_rows else "")),
        ("step", f"{time(f.step_s)}: " + ", ".join(f"{name} {time(s)}" for name, s in parts if s)),
        *([("bubble", f"{f.bubble:.1%} of the layers' time")] if f.mesh[0] > 1 else []),
        ("speed", f"{f.tokens_per_s:,.0f} tokens/s"
                  + (f", {percent(f.peak_share, 1)} of peak" if f.peak_share is not None else "")),
        ("run", _long(settings.steps * f.step_s)),
    ]
    header = ("ranks", "stages", "params", "weights", "copies", "gradients", "optimizer", "activations", "buffers",
              "working", "peak", "")
    table = [
        (_runs(h.ranks), _runs(h.stages), count(h.params), *map(size, (
            h.weights, h.copies, h.gradients, h.optimizer, h.activations, h.buffers, h.working, h.peak
        )), "<- too large" if h in f.too_large else "")
        for h in f.held
    ]
    given = [f"{head:<7} {words}" for head, words in lines]
    last = *_fits(f), *_doubts(f), *(f"note    {note}" for note in notes)
    return "\n".join([*given, "", *grid(header, table, left=2), "", *last]) + "\n"


def _fits(f: Forecast) -> list[str]:
    if not f.too_large:
        most = max(f.held, key=lambda held: held.peak)
        share = percent(most.peak, f.memory_limit)
        return [f"memory  {size(most.peak)} at the most, {share} of {size(f.memory_limit)}"]
    return [f"memory  {too_large(f, held)}" for held in f.too_large]


def too_large(f: Forecast, held: Held) -> str:
    """Which ranks, and by how much."""
    who = f"rank {held.ranks[0]} needs" if len(held.ranks) == 1 else f"ranks {_runs(held.ranks)} need"
    return f"{who} {size(held.peak)}, {size(held.peak - f.memory_limit)} more than {size(f.memory_limit)}"


def _doubts(f: Forecast) -> list[str]:
    if f.measured:
        return []
    return ["times   computed, not measured: `plan --measure FILE`, then `--plan-device FILE`"]


def compared_text(compared: Comparison) -> str:
    table = [
        (_named(row), "" if row.predicted is None else _value(row, row.predicted),
         "not known" if row.measured is None else _value(row, row.measured), _off(row))
        for row in compared.rows
    ]
    lines = grid(("", "predicted", "measured", "difference"), table, left=1)
    if compared.actions:
        header = ("stage", "action", "predicted", "took", "wait predicted", "waited")
        lines += ["", *grid(header, [_action(action) for action in compared.actions], left=2)]
    if compared.nominal:
        lines += ["", "to predict this machine's times: `plan --measure FILE`, then `--plan-device FILE`"]
    return "\n".join(lines)


def _action(action: Action) -> tuple[str, ...]:
    takes, waits = ("", "") if action.predicted is None else map(time, action.predicted)
    took, waited = map(time, action.measured)
    return str(action.stage), NAMES.get(action.kind, action.kind), takes, took, waits, waited


def _named(row: Row) -> str:
    return f"{row.what}, rank{'s' * (len(row.ranks) > 1)} {_runs(row.ranks)}" if row.ranks else row.what


def _value(row: Row, number: float) -> str:
    show = {"s": time, "bytes": lambda n: size(int(n)), "share": "{:.1%}".format, "tokens/s": "{:,.0f}".format}
    return show[row.unit](number)


def _off(row: Row) -> str:
    if row.off is None:
        return ""
    return f"{100 * row.off:+.1f} points" if row.unit == "share" else f"{row.off:+.1%}"


def measurement_text(m: Measurement) -> str:
    header = ("layer", "like", "forward", "backward", "of it inputs", "kept", "working", "split by")
    table = [
        (row.kind, layers(row.paths), time(row.time.forward_s),
         time(row.time.backward_input_s + row.time.backward_weight_s),
         "" if row.split == "none" else time(row.time.backward_input_s),
         size(row.time.activation_bytes or 0), size(row.time.working_bytes or 0),
         {"measured": "time", "flops": "FLOPs", "none": ""}[row.split])
        for row in m.rows
    ]
    s = m.speeds
    title = f"{m.device}, {m.ran}, {m.microbatch_tokens:,} tokens a microbatch"
    reached = (
        f"reached: {s.bf16_flops / 1e12:,.3g} TFLOP/s, {s.bytes_per_s / 1e9:,.0f} GB/s; "
        f"{time(s.action_s)} of the host for an action"
    )
    link = [] if s.link_bytes_per_s is None else [
        f"link:    {s.link_bytes_per_s / 1e9:,.3g} GB/s, {time(s.link_latency_s)}; layers take {s.beside_transfer:.3g} "
        "times as long while a transfer waits"
    ]
    return "\n".join([title, "", *grid(header, table, left=2), "", reached, *link]) + "\n"


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Lines of a table; the first `left` columns and a last one without a head start at the left. Columns that are `0`
    or empty in every row are left out."""
    used = [n for n in range(len(header)) if n < left or any(row[n] not in ("0", "") for row in rows)]
    widths = {n: max(len(row[n]) for row in [header, *rows]) for n in used}
    return [
        "  ".join(
            row[n].ljust(widths[n]) if n < left or not header[n] else row[n].rjust(widths[n]) for n in used
        ).rstrip()
        for row in [header, *rows]
    ]


def _runs(numbers: Sequence[int]) -> str:
    """`0-3 6`."""
    found = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [n for _, n in run]
        found.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return " ".join(found)


def _long(seconds: float) -> str:
    for unit, scale in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.3g} seconds"
