"""Where a command's model comes from: FILE, `-`, or `-e TEXT`, with `--set NAME=VALUE`; and parts from `--load`.

`@takes_model` gives a command one argument, a `Given`; `@takes_models` a list of them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mambadsl.compile import Program
    from mambadsl.text.source import Source


#: Not checked here: what is wrong with a file is a diagnostic. (The type completes file names in a shell.)
_FILE = click.Path(allow_dash=True)


@dataclass(frozen=True, slots=True)
class Given:
    """path: a file's, or "-"; None where `text` is given."""

    path: str | None
    text: str | None
    sets: Mapping[str, str]

    @property
    def name(self) -> str:
        return {None: "<text>", "-": "<stdin>"}.get(self.path, self.path or "")

    def source(self) -> Source:
        """Reads it. Raises MdlError."""
        from mambadsl.text.source import MAX_BYTES, from_bytes, from_text, read

        if self.text is not None:
            return from_text(self.text, name=self.name)
        if self.path == "-":
            if sys.stdin is None:
                raise click.UsageError("there is no standard input")
            return from_bytes(sys.stdin.buffer.read(MAX_BYTES + 1), name=self.name)
        return read(self.path)

    def program(self) -> Program:
        """Compiled and checked. Raises MdlError."""
        from mambadsl.compile import compile_source

        return compile_source(self.source(), set=self.sets)


def part_set(name: str, program: Program) -> str:
    """The name of a part set: a shipped one, or a `parts` block of the text."""
    from mambadsl.parts.sets import SETS
    from mambadsl.text.spell import nearest

    known = (*SETS, *(block.name for block in program.spec.parts))
    if name in known:
        return name
    near = nearest(name, known)
    meant = f"did you mean `{near}`?" if near else f"there are {', '.join(known)}"
    raise click.BadParameter(f"there is no part set `{name}`; {meant}", param_hint="--parts")


def takes_model(function: Callable) -> Callable:
    """One model; handed over as the first argument."""

    @click.argument("file", required=False, metavar="FILE", type=_FILE)
    @functools.wraps(function)
    def inner(file: str | None, expression: str | None, sets: Mapping[str, str], **rest: Any) -> Any:
        if (file is None) == (expression is None):
            raise click.UsageError("give a FILE or -e TEXT, and not both")
        return function(Given(file, expression, sets), **rest)

    return model_options(inner)


def takes_models(function: Callable) -> Callable:
    """Several models; handed over as a tuple, the first argument."""

    @click.argument("files", nargs=-1, metavar="FILE...", type=_FILE)
    @functools.wraps(function)
    def inner(files: tuple[str, ...], expression: str | None, sets: Mapping[str, str], **rest: Any) -> Any:
        if bool(files) == (expression is not None):
            raise click.UsageError("give FILEs or -e TEXT, and not both")
        if expression is not None:
            return function((Given(None, expression, sets),), **rest)
        return function(tuple(Given(file, None, sets) for file in dict.fromkeys(files)), **rest)

    return model_options(inner)


def loads_parts(function: Callable) -> Callable:
    """`--load FILE`: runs Python files that hold parts and kinds, before the command. Raises MdlError."""

    @functools.wraps(function)
    def inner(*args: Any, loads: tuple[str, ...], **rest: Any) -> Any:
        if loads:
            from mambadsl.parts.plugins import load_parts

            for path in loads:
                load_parts(path)
        return function(*args, **rest)

    help = "Run a Python file with parts and kinds of your own; repeatable."
    return click.option("--load", "loads", multiple=True, type=click.Path(), metavar="FILE.py", help=help)(inner)


def model_options(function: Callable) -> Callable:
    """`-e`, `--set` and `--load`, handed over as `expression` and `sets`."""
    text = click.option("-e", "--expression", metavar="TEXT", help='The model itself: -e "M M M A".')
    sets = click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="NAME=VALUE",
        callback=_pairs,
        help="Another value for a setting, a constant or a layer's field (d_model=512, M.heads=8).",
    )
    return text(sets(loads_parts(function)))


def _pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for value in values:
        name, equals, given = (part.strip() for part in value.partition("="))
        if not (name and equals and given):
            raise click.BadParameter(f"`{value}` is not NAME=VALUE, as in `d_model=512`", ctx, param)
        if name in found:
            raise click.BadParameter(f"`{name}` is set twice", ctx, param)
        found[name] = given
    return found
