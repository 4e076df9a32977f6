"""`mambadsl import`: a model of another library's as a model file, and its weights."""

from __future__ import annotations

from pathlib import Path

import click

from mambadsl.cli import output
from mambadsl.cli.command import command


@command(
    "import",
    examples=(
        "mambadsl import hf docs/tiny_qwen3_next",
        "mambadsl import hf docs/tiny_qwen3_next/config.json -o build/imported.mdl",
    ),
)
@click.argument("form", metavar="FORM", type=click.Choice(("hf",)))
@click.argument("source", metavar="FOLDER|config.json", type=click.Path())
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), metavar="FILE", help="Write the model here.")
@click.option("--weights", type=click.Path(path_type=Path), metavar="DIR", help="Write the weights here, too.")
@click.option("--name", metavar="NAME", help="What the model is called (default: as the folder).")
def run(
    form: str, source: str, target: Path | None, weights: Path | None, name: str | None, as_json: bool
) -> None:
    """Make a model file of a model of Hugging Face's.

    FOLDER has a config.json and, for --weights, its tensors; they are read and written a file at a time. What has
    no place in a model file (tokens' numbers, tokenizers, ...) is kept beside the weights for `export hf`.
    """
    from mambadsl.hf.folder import import_hf
    from mambadsl.spec.model import is_name, name_of

    if name is not None and not is_name(name):
        raise click.BadParameter(f"`{name}` is no name for a model; `{name_of(name)}` is", param_hint="--name")
    found = import_hf(source, weights=weights, name=name)
    text = found.text()
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        output.write(target, text)
    written = [str(path) for path in (*found.files, *([target] if target else []))]
    if as_json:
        output.json(
            name=found.program.spec.name, family=found.imported.family.model_type, text=text, files=written,
            skipped=list(found.skipped), diagnostics=output.plain(found.diagnostics),
        )
        return
    output.problems(found.diagnostics)
    if found.skipped:
        shown = ", ".join(found.skipped[:4]) + (", ..." if len(found.skipped) > 4 else "")
        output.note(f"{len(found.skipped)} tensors that the model does not need were left out: {shown}")
    if target is None:
        output.text(text)
    for path in written:
        output.note(f"wrote {path}")
