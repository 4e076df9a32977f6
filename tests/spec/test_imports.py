"""Imports: which file is meant, what is refused, and where a problem inside an imported file is shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mambadsl.graph.unroll import unroll
from mambadsl.spec.files import MAX_FILES
from mambadsl.spec.resolve import resolve
from mambadsl.syntax.read import read
from mambadsl.text.diagnostic import Diagnostic, MdlError
from mambadsl.text.render import to_text
from mambadsl.text.source import read as read_source

LAYERS = "layer W = attention(heads=4, head_dim=d_model // 4)\nlayer N = mamba2()\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """project(**files): a project folder with a marker and these files; returns its path."""

    def make(**files: str) -> Path:
        (tmp_path / "p" / "pyproject.toml").parent.mkdir(exist_ok=True)
        (tmp_path / "p" / "pyproject.toml").touch()
        for name, text in files.items():
            path = tmp_path / "p" / f"{name.replace('__', '/')}.mdl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.chdir(tmp_path / "p")
        return tmp_path / "p"

    return make


def compiled(path: str = "main.mdl"):
    return unroll(resolve(read(read_source(path))))


def problems(path: str = "main.mdl") -> tuple[Diagnostic, ...]:
    with pytest.raises(MdlError) as caught:
        compiled(path)
    return caught.value.diagnostics


def only(code: str, *words: str, path: str = "main.mdl") -> Diagnostic:
    (diagnostic,) = problems(path)
    shown = to_text(diagnostic)
    assert diagnostic.code.id == code, shown
    for word in words:
        assert word in shown, shown
    return diagnostic


def test_layers_scale_with_the_model_and_constants_stay(project):
    project(
        main='from "lib/a.mdl" import W, wide\nmodel m { d_model = 128 }\nlet k = 3\nstack { W mlp(d_ff=wide * k) }',
        lib__a="let k = 5\nlet wide = 10 * k\nmodel other { d_model = 64 }\n" + LAYERS,
    )
    first, second = compiled().layers
    assert first.layer.branches[0].fields.head_dim == 32
    assert second.layer.branches[0].fields.d_ff == 150


def test_relative_to_the_importing_file_and_up_to_the_project(project):
    project(
        main='from "lib/deep/a.mdl" import B\nstack { B }',
        lib__deep__a='from "../b.mdl" import B\n',
        lib__b='from "../c.mdl" import W\nlayer B = [W W]',
        c=LAYERS,
    )
    assert len(compiled().layers) == 2


def test_compiled_from_another_folder(project, monkeypatch):
    folder = project(sub__main='from "../c.mdl" import Q\nstack { Q }', c="layer Q = mamba2(headz=1)")
    monkeypatch.chdir(folder / "sub")
    assert str(only("E022", path="main.mdl").span).startswith("../c.mdl:1:")
    monkeypatch.chdir(folder.parent)
    assert str(only("E022", path="p/sub/main.mdl").span).startswith("p/sub/../c.mdl:1:")


def test_a_diamond_is_one_file(project):
    project(
        main='from "a.mdl" import X\nfrom "b.mdl" import Y\nstack { X Y }',
        a='from "c.mdl" import W\nlayer X = W',
        b='from "c.mdl" import W\nlayer Y = W',
        c="shared S = mamba2()\nlayer W = [S S]",
    )
    assert {n.owner for n in compiled().layers} == {"shared.S"}


def test_several_names_and_names_of_names(project):
    project(
        main='from "a.mdl" import W, N, wide\nstack { W N(d_conv=wide) }',
        a='from "b.mdl" import W, N, wide\n',
        b=LAYERS + "let wide = 3",
    )
    assert [n.layer.branches[0].kind for n in compiled().layers] == ["attention", "mamba2"]


def test_the_prelude_of_an_imported_file_is_its_own(project):
    """A in lib is std's A, whatever A is in the importing file."""
    project(main='from "a.mdl" import B\nlayer A = mlp()\nstack { A B }', a="layer B = [A]")
    assert [n.layer.branches[0].kind for n in compiled().layers] == ["mlp", "attention"]


def test_an_unused_broken_layer_of_a_library_says_nothing(project):
    project(
        main='from "a.mdl" import W\nstack { W }', a=LAYERS + "layer Bad = mamba2(headz=1)\nlet x = 1 / 0"
    )
    assert len(compiled().layers) == 1


def test_missing_and_misspelt(project):
    project(main='from "laers.mdl" import W\nstack { W W(heads=2) }', layers=LAYERS)
    found = only("E030", "no file `laers.mdl`", 'did you mean "layers.mdl"?')
    assert found.span.text == '"laers.mdl"'


def test_what_is_missing_is_told_once(project):
    project(
        main='from "no.mdl" import W, wide\nlet k = wide + 1\nlayer B = [W]\nstack { W B mlp(d_ff=k) mlp(act=wide) }'
    )
    only("E030")
    project(main='from "a.mdl" import Q, wide\nstack { Q mlp(d_ff=wide) }', a=LAYERS)
    assert [(d.code.id, d.span.text) for d in problems()] == [("E027", "Q"), ("E027", "wide")]


def test_std_is_not_used_for_a_name_that_was_imported_in_vain(project):
    project(main='from "no.mdl" import M\nstack { M }')
    only("E030")


def test_folders_devices_and_links(project):
    folder = project(main='from "sub" import W\nstack { W }', sub__x=LAYERS)
    only("E030", "`sub` is a folder")
    for text in ("", ".", "..", "sub/", "./sub/../sub"):
        (folder / "main.mdl").write_text(f'from "{text}" import W\nstack {{ W }}')
        assert problems()[0].code.id in ("E030", "E031"), text
    os.mkfifo(folder / "pipe.mdl")
    (folder / "main.mdl").write_text('from "pipe.mdl" import W\nstack { W }')
    only("E030")
    (folder / "loop.mdl").symlink_to("loop.mdl")
    (folder / "main.mdl").write_text('from "loop.mdl" import W\nstack { W }')
    only("E030", "cannot be followed")
    (folder / "main.mdl").write_text(f'from "{"x" * 5000}.mdl" import W\nstack {{ W }}')
    only("E030", "cannot be followed")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(project):
    folder = project(main='from "a.mdl" import W\nstack { W }', a=LAYERS)
    (folder / "a.mdl").chmod(0)
    only("E001", "cannot be read").span.text == '"a.mdl"'


def test_nothing_outside_the_project(project, tmp_path):
    (tmp_path / "secret.mdl").write_text(LAYERS)
    folder = project(main='from "../secret.mdl" import W\nstack { W }')
    only("E031", "inside the project's folder", str(folder))
    (folder / "main.mdl").write_text(f'from "{tmp_path}/secret.mdl" import W\nstack {{ W }}')
    only("E031")
    (folder / "main.mdl").write_text(f'from "{folder}/inside.mdl" import W\nstack {{ W }}')
    (folder / "inside.mdl").write_text(LAYERS)
    only("E031")
    (folder / "link.mdl").symlink_to(tmp_path / "secret.mdl")
    (folder / "main.mdl").write_text('from "link.mdl" import W\nstack { W }')
    only("E031")
    (folder / "main.mdl").write_text('from "std/../../../etc/passwd" import W\nstack { W }')
    only("E031")
    (folder / "main.mdl").write_text('from "sub/../inside.mdl" import W\nstack { W }')
    assert len(compiled().layers) == 1


def test_without_a_project_the_files_own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("mambadsl.spec.files._project_folder", lambda path: path.resolve().parent)
    (tmp_path / "in").mkdir()
    (tmp_path / "lib.mdl").write_text(LAYERS)
    (tmp_path / "in" / "main.mdl").write_text('from "../lib.mdl" import W\nstack { W }')
    only("E031", path=str(tmp_path / "in" / "main.mdl"))


def test_a_local_folder_called_std_is_no_danger(project, monkeypatch):
    """`std/x` in a path that a user typed is not the shipped folder."""
    folder = project(std__main='from "other.mdl" import W\nstack { W }', std__other=LAYERS)
    monkeypatch.chdir(folder)
    assert len(compiled("std/main.mdl").layers) == 1


def test_circles(project):
    project(main='from "main.mdl" import W\nstack { M }')
    only("E032", "circle")
    project(
        main='from "a.mdl" import A\nstack { M }',
        a='from "b.mdl" import B\nlayer A = B',
        b='from "a.mdl" import A\nlayer B = A',
    )
    found = only("E032", "back to the start")
    assert str(found.span) == "b.mdl:1:6"
    assert [str(label.span) for label in found.labels] == ["a.mdl:1:6", "main.mdl:1:6"]


def test_long_chains_and_too_many(project):
    many = {f"f{i}": f'from "f{i + 1}.mdl" import W\n' for i in range(MAX_FILES - 2)}
    project(main='from "f0.mdl" import W\nstack { W }', **many, **{f"f{MAX_FILES - 2}": LAYERS})
    assert len(compiled().layers) == 1
    more = {f"f{i}": f'from "f{i + 1}.mdl" import W\n' for i in range(MAX_FILES - 1)}
    project(**more, **{f"f{MAX_FILES - 1}": LAYERS})
    found = only("E033", f"at most {MAX_FILES} files")
    assert len(found.labels) == MAX_FILES - 1


def test_a_problem_inside_points_there_and_says_who_imports(project):
    project(
        main='\nfrom "a.mdl" import W\nstack { W }',
        a='from "b.mdl" import W\n',
        b="layer W = mamba2(\n  headz=1)",
    )
    found = only("E022", "--> b.mdl:2:3", "::: a.mdl:1:6", "::: main.mdl:2:6", "imported here")
    assert [label.text for label in found.labels] == ["imported here", "imported here"]


def test_syntax_inside(project):
    project(main='from "a.mdl" import W\nstack { W }', a="layer W = mamba2(\n")
    found = only("E012", "--> a.mdl:", "::: main.mdl:1:6", "imported here")
    assert found.span.source.name == "a.mdl"
    project(main='from "a.mdl" import W\nstack { W }', a="")
    (Path("a.mdl")).write_bytes(b"\xff\xfe\x00")
    assert only("E003").span.text == '"a.mdl"'


def test_values_inside(project):
    project(main='from "a.mdl" import wide\nstack { mlp(d_ff=wide) }', a="let wide = 1 / 0")
    only("E041", "--> a.mdl:1:16", "imported here")


def test_the_prelude_names_its_use():
    from mambadsl.text.source import from_text

    with pytest.raises(MdlError) as caught:
        resolve(read(from_text("model m { d_model = 1_000_000_000_000 } stack { M F }", name="m.mdl")))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.span.source.name == "std.mdl"
    assert [(label.text, str(label.span)) for label in diagnostic.labels] == [("used here", "m.mdl:1:49")]


def test_two_shared_items_of_one_name(project):
    project(
        main='from "a.mdl" import B\nshared S = mamba2()\nstack { B S }',
        a="shared S = attention()\nlayer B = [S S]",
    )
    only("E024", "two files of the model declare `shared S`", "the other one", "imported here")
