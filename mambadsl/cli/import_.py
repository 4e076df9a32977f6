"""`mambadsl import`: a model of another library's as a model file, and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mambadsl.cli import output
from mambadsl.cli.command import command


@command(
    "import",
    examples=(
        "mambadsl import hf docs/tiny_qwen3_next",
        "mambadsl import hf docs/tiny_qwen3_next/config.json -o build/imported.mdl",
        'mambadsl import megatron "M-M*-|M-ME"',
        'mambadsl import megatron "M-M-M*-" --args docs/megatron_args.sh -o build/imported.mdl',
    ),
)
@click.argument("form", metavar="FORM", type=click.Choice(("hf", "megatron")))
@click.argument("source", metavar="SOURCE", type=click.Path())
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), metavar="FILE", help="Write the model here.")
@click.option("--weights", type=click.Path(path_type=Path), metavar="DIR", help="Write the weights here, too.")
@click.option("--name", metavar="NAME", help="What the model is called (default: as the folder).")
@click.option("--args", type=click.Path(exists=True), metavar="FILE", help="megatron: its arguments.")
def run(
    form: str, source: str, target: Path | None, weights: Path | None, name: str | None, args: str | None,
    as_json: bool,
) -> None:
    """Make a model file of a model of another library's.

    FORM hf: SOURCE is a folder of Hugging Face's, or its config.json. What has no place in a model file (tokens'
    numbers, tokenizers, ...) is kept beside the weights for `export hf`.

    FORM megatron: SOURCE is a pattern of Megatron's hybrid models, a file of arguments that has one, or a folder with
    a checkpoint (mp_rank_*/model_optim_rng.pt). --args reads a shell script's flags, YAML, JSON, or a checkpoint's
    arguments; without any, layers have the defaults. A pattern that starts with `-` comes after `--`.
    """
    from mambadsl.spec.model import is_name, name_of

    if name is not None and not is_name(name):
        raise click.BadParameter(f"`{name}` is no name for a model; `{name_of(name)}` is", param_hint="--name")
    found, about = _FORMS[form](source, weights=weights, name=name, args=args)
    text = found.text()
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        output.write(target, text)
    written = [str(path) for path in (*found.files, *([target] if target else []))]
    if as_json:
        output.json(
            name=found.program.spec.name, **about, text=text, files=written,
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


def _hf(source: str, *, args: str | None, **how: Any) -> tuple[Any, dict[str, Any]]:
    from mambadsl.hf.folder import import_hf

    if args is not None:
        raise click.UsageError("--args goes with megatron")
    found = import_hf(source, **how)
    return found, {"family": found.imported.family.model_type}


def _megatron(source: str, **how: Any) -> tuple[Any, dict[str, Any]]:
    from mambadsl.megatron.folder import import_megatron

    found = import_megatron(source, **how)
    return found, {"pattern": found.imported.pattern.source.text}


_FORMS = {"hf": _hf, "megatron": _megatron}
