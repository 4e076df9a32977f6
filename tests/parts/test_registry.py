"""Packages and parts are tables that hold together, and are found by their names without loading anything."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from parts_fakes import forgotten

from mambadsl.kinds.fields import REQUIRED
from mambadsl.parts import registry
from mambadsl.parts.part import Package, Part

ROOT = Path(__file__).parent.parent.parent
PARTS = [part for package in registry.packages().values() for part in package.parts]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_a_part_s_table(part):
    assert registry.part(part.name) is part
    assert part.slots and set(part.slots) <= set(registry.all_slots())
    assert part.doc and not part.doc.endswith(".") and set(part.devices) <= {"cuda", "cpu"}
    assert set(part.dtypes) <= {"fp32", "bf16", "fp16"}
    assert all(registry.package(name) for name in part.needs)
    # Sets and doctor ask for parts without arguments.
    assert all(field.default is not REQUIRED and field.doc for field in part.args)
    module, _, function = part.code.partition(":")
    made, = (node for node in ast.parse(Path(find_spec(module).origin).read_text()).body
             if isinstance(node, ast.FunctionDef) and node.name == function)
    # What a model may say is its first arguments; behind them may be some for other parts that share it.
    keywords, fields = [a.arg for a in made.args.kwonlyargs], [field.name for field in part.args]
    assert not made.args.args and keywords[:len(fields)] == fields
    assert all(default is not None for default in made.args.kw_defaults[len(fields):])


@pytest.mark.parametrize("package", registry.packages().values(), ids=lambda package: package.name)
def test_a_package_s_table(package):
    assert registry.package(package.name) is package
    assert package.doc and package.modules and package.source.startswith("https://")
    assert re.match("pip install ", package.install) and package.tested
    assert all(re.compile(pattern) and fix for pattern, fix in package.fixes.items())


def test_ours_and_mamba_ssm_s_differ_by_their_name_only():
    """One word of a `parts` block changes whose kernels run; its arguments stay."""
    for name in ("core", "scan"):
        ours, theirs = registry.part(f"triton.{name}"), registry.part(f"mamba_ssm.{name}")
        assert ours.slots == theirs.slots and ours.doc == theirs.doc
        assert [field.name for field in ours.args] == [field.name for field in theirs.args]
        assert theirs in registry.parts_for(f"mamba2.{name}") and ours in registry.parts_for(f"mamba2.{name}")


def test_extras_bring_what_parts_import():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        name: {re.match(r"[\w-]+", wanted)[0] for wanted in all_wanted}
        for name, all_wanted in project["optional-dependencies"].items()
    }
    brought = set().union(*extras.values())
    assert brought >= {p.distribution for p in map(registry.package, registry._shipped())}
    assert extras["kernels"] == {"triton"} and extras["mamba"] == {"mamba-ssm", "causal-conv1d"}
    page = (ROOT / "docs" / "parts.md").read_text()
    assert all(f"`{name}`" in page for name in extras.keys() - {"torch", "hf", "test", "train", "tokenizers"})


def test_names_that_do_not_exist():
    assert registry.package("nobody") is None
    assert registry.part("nobody.scan") is None and registry.part("torch.nothing") is None
    assert registry.parts_for("mamba2.nothing") == ()
    assert not registry.is_owner("nobody") and registry.is_owner("model") and registry.is_owner("mamba2")


def test_reading_all_tables_loads_nothing_heavy():
    code = (
        "import sys; from mambadsl.parts import registry; registry.packages()\n"
        "heavy = {'torch', 'numpy', 'triton', 'mamba_ssm', 'transformer_engine'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "package, words",
    [
        (Package("torch", "", ()), "called `torch` already"),
        (Package("mine", "", (), parts=(Part("yours.scan", ("mamba2.scan",), "", ""),)), "called `mine.NAME`"),
        (Package("mine", "", (), parts=(Part("mine", ("mamba2.scan",), "", ""),)), "called `mine.NAME`"),
        (Package("mine", "", (), parts=(Part("mine.a", ("mamba2.scan",), "", ""),) * 2), "two parts"),
        (Package("mine", "", (), parts=(Part("mine.a", ("mamba2.scann",), "", ""),)), "no such slot"),
        (Package("mine", "", (), parts=(Part("mine.a", ("mamba9.scan",), "", ""),)), "no such slot"),
    ],
)
def test_packages_that_are_refused(package, words):
    with forgotten(), pytest.raises(ValueError, match=words):
        registry.add(package)


def test_a_package_twice():
    mine = Package("mine", "", ())
    with forgotten():
        registry.add(mine)
        registry.add(mine)
        assert registry.package("mine") is mine
        with pytest.raises(ValueError, match="already"):
            registry.add(Package("mine", "", ()))
    assert registry.package("mine") is None
