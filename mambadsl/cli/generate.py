"""`mambadsl generate`: text from a model, one token after the other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mambadsl.cli import output
from mambadsl.cli.command import command
from mambadsl.cli.source import Given, part_set, takes_model
from mambadsl.cli.types import COUNT, Numbers


@command(
    "generate",
    examples=(
        'mambadsl generate models/tiny.mdl --prompt "Once upon" --max-tokens 16',
        "mambadsl generate models/tiny.mdl --tokens 1,2,3 --max-tokens 8 --temperature 0.8 --top-k 20 --seed 7",
    ),
)
@takes_model
@click.option("--prompt", metavar="TEXT", help="Text to go on from.")
@click.option("--tokens", type=Numbers(), metavar="N,N,...", help="Token ids to go on from; prints ids.")
@click.option("--tokenizer", type=click.Path(dir_okay=False), metavar="FILE", help="A tokenizer.json (default: bytes).")
@click.option("--max-tokens", type=COUNT, default=64, show_default=True, metavar="N")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, metavar="T", help="0, the default: the likeliest."
)
@click.option("--top-k", type=COUNT, metavar="N", help="Draw from the N likeliest.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), metavar="P", help="Draw from the likeliest that make up P."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Of the draws, and of random weights.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End here: text, or with --tokens ids (1,2); repeatable.")
@click.option(
    "--drafts", type=click.IntRange(min=0), default=0, metavar="N", help="Tokens that the `mtp` tail drafts at a time."
)
@click.option(
    "--weights", type=click.Path(path_type=Path), metavar="DIR", help="A checkpoint (default: random weights)."
)
@click.option("--dtype", type=click.Choice(("fp32", "bf16")), default="fp32", show_default=True)
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="cpu, cuda, cuda:1, ...")
@click.option("--parts", default="auto", show_default=True, metavar="SET", help="The part set that runs it.")
def run(
    model: Given,
    prompt: str | None,
    tokens: tuple[int, ...] | None,
    tokenizer: str | None,
    stop: tuple[str, ...],
    weights: Path | None,
    dtype: str,
    device: str,
    parts: str,
    seed: int,
    as_json: bool,
    **how: Any,
) -> None:
    """Let a model write, streaming to standard output.

    Without --weights the model is random and writes nonsense: a test that it runs.
    """
    if (prompt is None) == (tokens is None):
        raise click.UsageError("give --prompt or --tokens, and not both")
    if tokenizer is not None and prompt is None:
        raise click.UsageError("--tokenizer is for --prompt; --tokens are ids already")
    program = model.program()
    part_set(parts, program)
    try:
        from mambadsl.build.device import device as usable
        from mambadsl.run.generate import generate, read_prompts, stream
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise click.ClickException("generate needs PyTorch: pip install 'mambadsl[torch]'") from None
    try:
        place = usable(device)
        vocab = program.spec.settings.vocab
        words = _tokenizer(tokenizer, vocab) if prompt is not None else None
        [ids] = read_prompts([words.encode(prompt) if words else tokens], vocab=vocab)
        stops = [tuple(words.encode(text)) if words else _ids(text) for text in stop]
        _fits(program.cost().params * (2 if dtype == "bf16" else 4), place.type)
        built = program.build(dtype=dtype, device=place, seed=seed, parts=parts)
        if place.type != "cpu":
            output.note(f"parts {parts}: {', '.join(built.assignment.used)}")
        if weights is not None:
            from mambadsl.build.checkpoint import load_weights

            load_weights(built, weights, device=place)
        else:
            output.note("no --weights: they are random, and so is the text")
        if how["temperature"] == 0 and (how["top_k"] or how["top_p"]):
            output.note("--temperature is 0: nothing is drawn, so --top-k and --top-p change nothing")
        if as_json:
            found = generate(built, [ids], seed=seed, stop=stops, **how)[0]
            text = words.decode(found.tokens) if words else None
            output.json(
                tokens=list(found.tokens), text=text, ended=found.ended, weights=str(weights) if weights else None
            )
            return
        written = stream(built, ids, seed=seed, stop=stops, **how)
        for piece in words.pieces(written) if words else (f"{token} " for token in written):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _fits(weight_bytes: int, place: str) -> None:
    """Weights beyond the machine's memory would end in the kernel's killing the process, without a word."""
    import os

    from mambadsl.show.units import size

    if place != "cpu" or "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if weight_bytes > there:
        raise click.ClickException(f"the weights take {size(weight_bytes)}, this machine has {size(there)} of memory")


def _ids(stop: str) -> tuple[int, ...]:
    try:
        return Numbers().convert(stop, None, None)
    except click.BadParameter as error:
        raise click.BadParameter(error.message, param_hint="--stop") from None


def _tokenizer(path: str | None, vocab: int) -> Any:
    from mambadsl.text.tokenizer import tokenizer

    return tokenizer(path, vocab=vocab)
