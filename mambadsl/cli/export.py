"""`mambadsl export`: a model and its weights for another library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mambadsl.cli import output
from mambadsl.cli.command import command
from mambadsl.cli.source import Given, takes_model
from mambadsl.cli.types import COUNT, Place


@command(
    "export",
    examples=(
        "mambadsl export hf models/lfm2_350m.mdl -o build/lfm2_350m",
        "mambadsl export hf models/nemotron_h_8b.mdl -o build/nemotron_h_8b --family nemotron_h",
        "mambadsl export megatron models/nemotron_h_8b.mdl",
        "mambadsl export megatron models/nemotron_h_8b.mdl --tp 4 -o build/nemotron_h_8b.args",
    ),
)
@click.argument("form", metavar="FORM", type=click.Choice(("hf", "megatron", "run")))
@takes_model
@click.option("-o", "--output", "target", type=Place(path_type=Path), metavar="PATH", help="Write it here.")
@click.option("--weights", type=Place(path_type=Path), metavar="DIR", help="A checkpoint of the model.")
@click.option("--family", metavar="NAME", help="hf: the model_type to export as (default: one that fits).")
@click.option("--tp", type=COUNT, metavar="N", help="megatron: tensor ranks (default: 1).")
@click.option("--step", type=COUNT, metavar="N", help="run: of the save (default: the last).")
def run(
    model: Given, form: str, target: Path | None, weights: Path | None, as_json: bool, **own: Any,
) -> None:
    """Make what another library loads, or weights from a training run.

    FORM hf: a folder for Hugging Face's transformers, as the family that computes what the model computes. Without
    --weights, config.json alone is written.

    FORM megatron: the pattern and arguments of Megatron's hybrid model, one flag a line, to a file or to standard
    output; with --weights, a folder with these and a checkpoint, cut for --tp tensor ranks and the model's stages.

    If there is no such model, the layers that stand in the way are named.

    FORM run: FILE is the folder of a training run; its weights go to a folder that --weights of other commands take,
    beside the model's text.
    """
    make, takes = _FORMS[form]
    for name, value in own.items():
        if value is not None and name != takes:
            goes = next(other for other, (_, its) in _FORMS.items() if its == name)
            raise click.UsageError(f"--{name} goes with {goes}")
    make(model, target, weights=weights, as_json=as_json, **{takes: own[takes]})


def _hf(
    model: Given, target: Path | None, *, weights: Path | None, family: str | None, as_json: bool
) -> None:
    from mambadsl.hf.folder import export_hf

    if target is None:
        raise click.UsageError("-o FOLDER says where the folder goes")
    found = export_hf(model.program(), target, weights=weights, family=family)
    written = [str(path) for path in found.files]
    if as_json:
        output.json(family=found.family, unchanged=found.unchanged, files=written)
        return
    output.text(f"{model.name} is a `{found.family}`")
    if weights is None:
        output.note("no --weights: the configuration alone was written")
    for path in written:
        output.text(f"wrote {path}")


def _megatron(
    model: Given, target: Path | None, *, weights: Path | None, tp: int | None, as_json: bool
) -> None:
    from mambadsl.megatron.folder import export_megatron

    if weights is not None and target is None:
        raise click.UsageError("-o FOLDER says where the checkpoint goes")
    found = export_megatron(model.program(), target, weights=weights, tp=tp or 1)
    files: list[Any] = list(found.files)
    if target is not None and weights is None:
        target.parent.mkdir(parents=True, exist_ok=True)
        output.write(target, found.text)
        files = [target]
    if as_json:
        output.json(text=found.text, files=[str(path) for path in files])
        return
    if not files:
        output.text(found.text)
    for path in files:
        output.note(f"wrote {path}")


def _run(model: Given, target: Path | None, *, weights: Path | None, step: int | None, as_json: bool) -> None:
    if model.path is None or model.sets:
        raise click.UsageError("FILE is the folder of the run, which has the model too: no -e, no --set")
    if weights is not None:
        raise click.UsageError("the weights are the run's: no --weights")
    if target is None:
        raise click.UsageError("-o FOLDER says where the weights go")
    try:
        from mambadsl.train.export import export_run
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise click.ClickException("export needs PyTorch: pip install 'mambadsl[torch]'") from None
    try:
        files = export_run(Path(model.path), target, step=step)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"`{target}` cannot be written: {error.strerror or error}") from None
    if as_json:
        output.json(files=[str(path) for path in files])
        return
    for path in files:
        output.text(f"wrote {path}")


#: Form -> what makes it, and the option that no other form has.
_FORMS = {"hf": (_hf, "family"), "megatron": (_megatron, "tp"), "run": (_run, "step")}
