"""`mambadsl explain`: which part fills each slot of a model, and why; or what a word means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mambadsl.cli import output
from mambadsl.cli.command import command
from mambadsl.cli.planning import assignment
from mambadsl.cli.source import Given, model_options

_CODE = re.compile(r"\[?[EWIewi][0-9]{3}\]?")


class _Topic(click.ParamType):
    name = "topic"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        from mambadsl.show.explain import homes
        from mambadsl.show.reference import topics

        words = [CompletionItem(word) for word in (*topics(), *homes()) if word.startswith(incomplete)]
        return words or [CompletionItem(incomplete, type="file")]


@command(
    "explain",
    examples=(
        "mambadsl explain models/nemotron_h_8b.mdl --parts fused --device cuda",
        "mambadsl explain mamba_ssm.core",
        "mambadsl explain mamba2",
        "mambadsl explain E204",
    ),
)
@click.argument("topic", type=_Topic(), required=False, metavar="FILE|TOPIC")
@model_options
@click.option("--parts", metavar="SET", help="Of a model: the part set (default: auto).")
@click.option("--dtype", type=click.Choice(("bf16", "fp32", "fp16")), help="Of a model (default: bf16).")
@click.option("--device", type=click.Choice(("cuda", "cpu")), help="Of a model (default: what this machine has).")
def run(
    topic: str | None, expression: str | None, sets: Mapping[str, str], as_json: bool, **how: str | None
) -> int | None:
    """Explain a model's parts, or a word.

    Of a model: which part fills each slot of each layer, why, and what stands against the others.
    TOPIC is a code (E204), a kind (mamba2), a package or part (mamba_ssm.core), or one of model, layer, mtp, kinds,
    sets, parts, targets, codes.
    """
    if (topic is None) == (expression is None):
        raise click.UsageError("give a FILE, a TOPIC, or -e TEXT, and only one of them")
    if topic is None or _is_model(topic):
        _model(Given(topic, expression, sets), as_json, **how)
        return
    if extra := [name for name, value in {**how, "set": sets}.items() if value]:
        raise click.UsageError(f"--{extra[0]} goes with a model, and there is no file `{topic}`")
    text, rows = _story(topic) if _CODE.fullmatch(topic) else _page(topic)
    if as_json:
        output.json(topic=topic, text=text, rows=list(rows))
    else:
        output.text(text)


def _is_model(word: str) -> bool:
    return word == "-" or word.endswith(".mdl") or not _CODE.fullmatch(word) and Path(word).is_file()


def _model(model: Given, as_json: bool, *, parts: str | None, dtype: str | None, device: str | None) -> None:
    from mambadsl.show.parts import assignment_data, assignment_text

    program = model.program()
    found, where = assignment(program, parts or "auto", device=device, dtype=dtype or "bf16")
    if as_json:
        output.json(name=program.spec.name, **assignment_data(found), diagnostics=output.plain(program.diagnostics))
    else:
        output.text(assignment_text(program.spec.name, found, where=where))


def _story(code: str) -> tuple[str, tuple]:
    from mambadsl.show.explain import similar, story

    text = story(code)
    if text is None:
        near = similar(code)
        others = f"there are {', '.join(near)}" if near else "`mambadsl explain codes` lists all"
        raise click.UsageError(f"there is no code {code.upper()}; {others}")
    return text, ()


def _page(topic: str) -> tuple[str, tuple]:
    from mambadsl.show.reference import TOPICS, page, topics
    from mambadsl.text.spell import nearest_all

    found = page(topic)
    if found is None:
        near = " or ".join(f"`{word}`" for word in nearest_all(topic, topics()))
        meant = f"; did you mean {near}?" if near else "."
        known = f"Topics: {', '.join(TOPICS)}; kinds and parts by name, codes such as E204, and model files"
        raise click.UsageError(f"there is nothing about `{topic}`{meant} {known}")
    return found.text, found.rows
