"""The table: sums that add up, shared weights once, and no line too long."""

from __future__ import annotations

import json

import pytest
from show_models import program

from mambadsl import load
from mambadsl.files import MODELS
from mambadsl.graph.weights import all_weights
from mambadsl.show.summary import WIDTH, rows, summary_data, summary_text
from mambadsl.show.units import count, flops, layers, percent, size


@pytest.mark.parametrize("name", ["nemotron_h_8b", "falcon_h1_0_5b", "tiny", "shared"])
def test_golden(name, golden):
    golden(f"show/{name}_summary.txt", summary_text(program(name).layers))


def test_golden_unfolded(golden):
    golden("show/tiny_summary_all.txt", summary_text(program("tiny").layers, folded=False, length=1024))


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.mdl")), ids=lambda p: p.stem)
def test_every_model_fits_the_width_and_adds_up(path):
    if path.stem == "std":
        pytest.skip("a library")
    graph = load(path).layers
    for folded in (True, False):
        assert max(map(len, summary_text(graph, folded=folded).splitlines())) <= WIDTH
        data = summary_data(graph, folded=folded)
        for key in ("params", "active_params", "kv_bytes_per_token", "state_bytes"):
            assert sum(row["cost"][key] for row in data["rows"] if row["cost"]) == data["total"][key]
        listed = [path for row in data["rows"] if row["cost"] for path in row["paths"]]
        assert sorted(listed) == sorted(graph.by_path)


@pytest.mark.parametrize("name", ["shared", "tiny", "falcon_h1_0_5b"])
def test_the_total_is_that_of_the_weights(name):
    """Against the table that checkpoints are written from: each trained tensor once."""
    graph = program(name).layers
    elements = sum(weight.elements for weight in all_weights(graph).values() if weight.trained)
    assert summary_data(graph)["total"]["params"] == elements


def test_long_names_fit_too():
    text = f"model {'m' * 150} {{ d_model = 64 norm = rmsnorm(eps=1e-7, zero_centered=true) init_std = 0.000001 }}"
    lines = summary_text(load(text=text + f"\nlayer {'L' * 200} = mlp()\nstack {{ {'L' * 200} }}").layers).splitlines()
    assert max(map(len, lines)) <= WIDTH


def test_a_published_count():
    """Nemotron-H 8B as NVIDIA's checkpoint has it."""
    data = summary_data(program("nemotron_h_8b").layers)
    assert data["total"]["params"] == 8_100_852_736
    assert {row["label"]: row["count"] for row in data["rows"] if row["sort"] == "group" and not row["depth"]} == {
        "[M F]": 5,
        "[[M F]*4 M A F]": 3,
    }


def test_a_shared_weight_counts_once():
    """heads * head_dim = 16, d_model = 16: qkv 3 * 16 * 16, out 16 * 16, norm 16."""
    text = "model m { d_model = 16 vocab = 10 }\nshared S = attention(heads=2, head_dim=8)\nstack { S F S S }"
    found = [row for row in rows(load(text=text).layers) if row.label == "S"]
    assert [row.cost.params for row in found] == [4 * 16 * 16 + 16, 0]
    assert [len(row.nodes) for row in found] == [1, 2]
    lines = [line for line in summary_text(load(text=text).layers).splitlines() if line.startswith("S")]
    assert "(shared)" not in lines[0] and "(shared)" in lines[1]


def test_a_longer_sequence_costs_attention_only():
    graph = program("tiny").layers
    short, long = (summary_data(graph, length=n)["rows"] for n in (256, 4096))
    dearer = {
        a["kind"]
        for a, b in zip(short, long)
        if a["cost"] and b["cost"]["flops_per_token"] > a["cost"]["flops_per_token"]
    }
    assert dearer == {"attention", "sum"}


def test_plain_data():
    data = summary_data(program("shared").layers)
    assert json.loads(json.dumps(data)) == data
    assert set(data) == {"name", "length", "model", "layers", "total", "rows"}
    assert set(data["rows"][1]) == {
        "depth",
        "label",
        "sort",
        "count",
        "kind",
        "shape",
        "shared",
        "paths",
        "fields",
        "cost",
    }
    assert {row["sort"] for row in data["rows"]} == {"embed", "layer", "group", "head", "mtp_in", "mtp_out"}


@pytest.mark.parametrize(
    "function, value, text",
    [
        (count, 0, "0"),
        (count, 999, "999"),
        (count, 1000, "1.00 K"),
        (count, 999_499, "999 K"),
        (count, 999_999, "1.00 M"),
        (count, 8_100_852_736, "8.10 B"),
        (count, 98_765_432, "98.8 M"),
        (flops, 1.5e12, "1.50 T"),
        (size, 4096, "4 KiB"),
        (size, 4097, "4.00 KiB"),
        (size, 96, "96 B"),
        (size, 3 * 2**29, "1.50 GiB"),
        (layers, 1, "1 layer"),
        (layers, 3000, "3,000 layers"),
    ],
)
def test_numbers_have_three_digits(function, value, text):
    assert function(value) == text


def test_percent():
    assert [percent(1, 8), percent(0, 8), percent(1, 10**6), percent(0, 0)] == ["12.5%", "0%", "<0.1%", "0%"]
