"""`mambadsl explain`: the story of a code, the fields of a kind, and the lists of what there is."""

from __future__ import annotations

import re
from typing import Any

import click

from mambadsl.cli import output
from mambadsl.cli.command import command


class _Topic(click.ParamType):
    name = "topic"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        from mambadsl.show.explain import homes
        from mambadsl.show.reference import topics

        return [CompletionItem(word) for word in (*topics(), *homes()) if word.startswith(incomplete)]


@command(
    "explain",
    examples=(
        "mambadsl explain E204",
        "mambadsl explain mamba2",
        "mambadsl explain model",
        "mambadsl explain codes",
    ),
)
@click.argument("topic", type=_Topic())
def run(topic: str, as_json: bool) -> None:
    """Explain a diagnostic code, a kind of layer, or a list.

    TOPIC is a code (E204), a kind (mamba2), or one of model, layer, mtp, kinds, sets, targets, codes.
    """
    if re.fullmatch(r"\[?[EWIewi][0-9]{3}\]?", topic):
        from mambadsl.show.explain import similar, story

        text = story(topic)
        if text is None:
            near = similar(topic)
            others = f"there are {', '.join(near)}" if near else "`mambadsl explain codes` lists all"
            raise click.UsageError(f"there is no code {topic.upper()}; {others}")
        rows = ()
    else:
        from mambadsl.show.reference import page, topics
        from mambadsl.text.spell import nearest_all

        found = page(topic)
        if found is None:
            near = " or ".join(f"`{word}`" for word in nearest_all(topic, topics()))
            meant = f"; did you mean {near}?" if near else "."
            known = f"Topics: {', '.join(topics())}, and codes such as E204"
            raise click.UsageError(f"there is nothing about `{topic}`{meant} {known}")
        text, rows = found.text, found.rows
    if as_json:
        output.json(topic=topic, text=text, rows=list(rows))
    else:
        output.text(text)
