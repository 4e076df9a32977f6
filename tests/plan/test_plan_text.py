from __future__ import annotations

from dataclasses import replace

import pytest
from chains import hybrid, unit

from mambadsl.plan.plan import plan_units
from mambadsl.show.plan import WIDTH, layers, plan_text, time

GIB = 2**30


def chain():
    weights = {"static_bytes": 3 * GIB, "activation_bytes": GIB // 2, "params": 150_000_000}
    body = [unit(f"stack.{n}", *((1.0, 2.0) if n % 2 else (1.3, 2.7)), label="MF"[n % 2], **weights)
            for n in range(52)]
    return [unit("embed", 0.05, 0.1, **weights), *body,
            unit("head", 2.4, 4.8, detail="131,072 x 4,096 logits", **weights)]


@pytest.mark.parametrize(
    "name, options, marks",
    [
        ("plan_1f1b.txt", {"stages": 4}, ()),
        ("plan_v.txt", {"stages": 4, "schedule": "zbv", "microbatches": 8}, ()),
        ("plan_marks.txt", {}, (10, 26, 41)),
    ],
)
def test_golden(golden, name, options, marks):
    units = [replace(u, cut_after=k in marks) for k, u in enumerate(chain(), 1)]
    golden(name, plan_text(plan_units(units, **options)))


def test_never_wider_than_the_page():
    for stages, schedule in [(1, "1f1b"), (8, "1f1b"), (4, "interleaved"), (16, "gpipe")]:
        units = [replace(u, label="Mamba2Long" * (1 + k % 3)) for k, u in enumerate(hybrid(1, 60))]
        text = plan_text(plan_units(units, stages=stages, schedule=schedule))
        assert max(map(len, text.splitlines())) <= WIDTH


def test_layers_fold():
    assert layers(["embed", "stack.0", "stack.1", "stack.2", "head"]) == "embed stack.0-2 head"
    assert layers(["stack.9", "mtp.0.0", "mtp.0.1", "mtp.1.0"]) == "stack.9 mtp.0.0-1 mtp.1.0"


def test_times():
    assert [time(t) for t in (0, 2e-6, 1.234e-3, 0.0123, 0.4567, 12.345, 1234)] == [
        "0.00 us", "2.00 us", "1.23 ms", "12.3 ms", "457 ms", "12.3 s", "1234 s"
    ]
