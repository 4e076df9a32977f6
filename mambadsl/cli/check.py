"""`mambadsl check`: everything that is wrong with models, and what is doubtful."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from mambadsl.cli import output
from mambadsl.cli.command import command
from mambadsl.cli.source import Given, part_set, takes_models
from mambadsl.cli.types import COUNT, Size, Words

if TYPE_CHECKING:
    from mambadsl.graph.checks import Facts
    from mambadsl.text.diagnostic import Diagnostic


def _choices(name: str) -> Callable[[], tuple[str, ...]]:
    def words() -> tuple[str, ...]:
        from mambadsl.graph.checks.facts import CHOICES

        return CHOICES[name]

    return words


#: Options that become `Facts`, by field: (type, metavar, help).
_FACTS = {
    "batch": (COUNT, "N", "Sequences of one microbatch."),
    "length": (COUNT, "TOKENS", "Tokens of a sequence (default: the model's context)."),
    "tp": (COUNT, "N", "Tensor-parallel devices."),
    "pp": (COUNT, "N", "Pipeline stages (default: as the text cuts)."),
    "cp": (COUNT, "N", "Context-parallel devices."),
    "target": (Words(_choices("target")), "TOOL", "Another tool that must be able to run it: hf, vllm, megatron, ..."),
    "parts": (None, "SET", "The part set that will run it: fused, te, ..."),
    "dtype": (Words(_choices("dtype")), "DTYPE", "bf16, fp16 or fp32."),
    "precision": (Words(_choices("precision")), "FORMAT", "Of matrix products: none, fp8, mxfp8, nvfp4."),
    "mode": (Words(_choices("mode")), "MODE", "train or decode."),
    "padding": (Words(_choices("padding")), "SIDE", "Where rows of unequal length are padded: none, left, right."),
    "max_sequences": (COUNT, "N", "Sequences served at once."),
    "memory_bytes": (Size(), "SIZE", "Memory of one device, as in 80GiB."),
    "prefill_chunk": (COUNT, "TOKENS", "Tokens of one piece of a prompt."),
}
_FLAGS = {"memory_bytes": "--memory"}


def _fact_options(function: Callable) -> Callable:
    for name, (type, metavar, help) in reversed(_FACTS.items()):
        flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
        function = click.option(flag, name, type=type, metavar=metavar, help=help)(function)
    return function


@dataclass(frozen=True, slots=True)
class _Checked:
    name: str
    diagnostics: tuple[Diagnostic, ...]
    summary: str = ""
    data: dict[str, Any] | None = None

    @property
    def fine(self) -> bool:
        return not any(d.severity == "error" for d in self.diagnostics)


@command(
    "check",
    examples=(
        "mambadsl check models/nemotron_h_8b.mdl",
        "mambadsl check models/*.mdl",
        'mambadsl check -e "M M M A" --set d_model=512 --batch 8 --length 8192',
        "mambadsl check models/nemotron_h_8b.mdl --target vllm --format github",
    ),
)
@takes_models
@click.option(
    "--format",
    "form",
    type=click.Choice(("text", "json", "github")),
    default="text",
    help="github: annotations for a pull request.",
)
@_fact_options
def run(models: tuple[Given, ...], form: str, as_json: bool, **facts: Any) -> int:
    """Say everything that is wrong with models.

    And what is doubtful. Without options: what is so anywhere. Options add what is so there.
    A file without a stack is a library; its layers are checked.
    """
    given = {name: value for name, value in facts.items() if value is not None}
    found = [_one(model, _facts(given)) for model in models]
    fine = all(one.fine for one in found)
    if as_json or form == "json":
        files = [
            {"file": o.name, "ok": o.fine, **(o.data or {}), "diagnostics": output.plain(o.diagnostics)} for o in found
        ]
        output.json(ok=fine, files=files)
    elif form == "github":
        from mambadsl.text.render import to_github

        for one in found:
            for diagnostic in one.diagnostics:
                output.text(to_github(diagnostic))
    else:
        for one in found:
            output.problems(one.diagnostics)
            output.text(f"{one.name}: {one.summary}{_counted(one.diagnostics)}")
    return 0 if fine else 1


def _facts(given: dict[str, Any]) -> Facts:
    from mambadsl.graph.checks import Facts

    return Facts(**given)


def _one(model: Given, facts: Facts) -> _Checked:
    from mambadsl.compile import compile_file
    from mambadsl.spec.overrides import override
    from mambadsl.spec.resolve import resolve
    from mambadsl.syntax import tree
    from mambadsl.syntax.read import read
    from mambadsl.text.diagnostic import MdlError

    try:
        file = read(model.source())
        layers = sum(isinstance(s, tree.Layer) for s in file.statements)
        if (
            layers
            and file.pattern is None
            and not any(isinstance(s, (tree.Stack, tree.Model)) for s in file.statements)
        ):
            resolve(override(file, model.sets))
            return _Checked(model.name, (), f"a library of {layers} layer{'s' * (layers > 1)}", {"library": layers})
        program = compile_file(file, set=model.sets, facts=facts)
        part_set(facts.parts, program)
    except MdlError as error:
        return _Checked(model.name, error.diagnostics)
    from mambadsl.show import units

    layers, params = len(program.layers.layers), program.cost().params
    summary = f"{units.layers(layers)}, {units.count(params)} params"
    return _Checked(model.name, program.diagnostics, summary, {"layers": layers, "params": params})


def _counted(diagnostics: tuple[Diagnostic, ...]) -> str:
    """`, 2 warnings`; of a model with errors `3 errors, 1 warning`."""
    words = {"error": "error", "warning": "warning", "info": "remark"}
    numbers = {name: sum(d.severity == severity for d in diagnostics) for severity, name in words.items()}
    texts = [f"{n} {name}{'s' * (n > 1)}" for name, n in numbers.items() if n]
    return ("" if numbers["error"] else ", ") * bool(texts) + ", ".join(texts)
