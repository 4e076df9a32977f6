"""`--set NAME=VALUE`: one form of change from outside, made on the tree before anything is resolved.

NAME is a model setting (`d_model`), a constant (`let`) of the main file, or `Layer.field` (`M.heads`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mambadsl.spec.model import MODEL_FIELDS
from mambadsl.spec.resolve import name_of
from mambadsl.syntax import tree
from mambadsl.syntax.read import read
from mambadsl.text.diagnostic import Diagnostic, MdlError, declare
from mambadsl.text.source import Source, Span, from_text
from mambadsl.text.spell import nearest

E048 = declare(
    "E048",
    "`--set` of something that cannot be set",
    """
    `--set NAME=VALUE` changes a model setting (`--set d_model=1024`), a constant of the file
    (`--set expert=512`), or a field of one of its layers (`--set M.heads=16`). The value is written as in
    the file. `expect` lines speak of the model as written and are not checked then.
    """,
)


def override(file: tree.File, sets: Mapping[str, str]) -> tree.File:
    """The file with those values instead of its own, and without its `expect` lines."""
    for name, text in sets.items():
        file = _one(file, name, text)
    if sets:
        kept = tuple(s for s in file.statements if not isinstance(s, tree.Expect))
        file = replace(file, statements=kept)
    return file


def _one(file: tree.File, name: str, text: str) -> tree.File:
    source = from_text(f"let x = {text}", name=f"--set {name}")
    whole = Span(source, 0, len(source.text))
    value = read(source).statements[0].value
    key = tree.Name(name.rpartition(".")[2], span=whole)
    statements = list(file.statements)
    lets = [s.name.text for s in statements if isinstance(s, tree.Let)]
    layers = [s.name.text for s in statements if isinstance(s, tree.Layer)]
    if "." in name:
        owner = name.partition(".")[0]
        for i, s in enumerate(statements):
            if isinstance(s, tree.Layer) and s.name.text == owner:
                statements[i] = replace(s, item=_with_arg(s.item, tree.Arg(key, value, span=whole), source))
                return replace(file, statements=tuple(statements))
        _refuse(source, f"this file declares no layer `{owner}`", owner, layers)
    for i, s in enumerate(statements):
        if isinstance(s, tree.Let) and s.name.text == name:
            statements[i] = replace(s, value=value)
            return replace(file, statements=tuple(statements))
    settings = [f.name for f in MODEL_FIELDS]
    if name not in settings:
        _refuse(source, f"there is no setting or constant `{name}`", name, [*settings, *lets])
    setting = tree.Setting(key, value, span=whole)
    for i, s in enumerate(statements):
        if isinstance(s, tree.Model):
            kept = tuple(t for t in s.settings if t.name.text != name)
            statements[i] = replace(s, settings=(*kept, setting))
            return replace(file, statements=tuple(statements))
    model = tree.Model(tree.Name(name_of(file.source.name), span=whole), (setting,), span=whole)
    if file.pattern is not None:
        statements = [tree.Stack(file.pattern, span=file.pattern.span)]
    return replace(file, statements=(model, *statements), pattern=None)


def _with_arg(item: tree.Item, arg: tree.Arg, source: Source) -> tree.Item:
    if not isinstance(item, (tree.Use, tree.Term)):
        raise MdlError([Diagnostic(E048, "only a single layer has fields to set", arg.span, "this one is a block")])
    kept = tuple(a for a in item.args or () if a.name is None or a.name.text != arg.name.text)
    return replace(item, args=(*kept, arg))


def _refuse(source: Source, message: str, word: str, legal: list[str]) -> None:
    near = nearest(word, legal)
    help = (f"did you mean `{near}`?",) if near else ("there are " + ", ".join(legal),) if legal else ()
    raise MdlError([Diagnostic(E048, message, Span(source, 0, 0), help=help)])
