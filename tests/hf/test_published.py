"""The published models: importing their configurations gives the shipped files, and exporting those gives
configurations that say the same."""

from __future__ import annotations

import pytest
from public_configs import CONFIGS, config

from mambadsl.adapt.same import differences
from mambadsl.compile import load
from mambadsl.files import MODELS
from mambadsl.hf.config import Settings
from mambadsl.hf.exporter import export_settings
from mambadsl.hf.importer import import_settings
from mambadsl.kinds.registry import get
from mambadsl.kinds.sublayer import BRANCH_FIELDS, SUBLAYER_FIELDS
from mambadsl.spec.model import MODEL_FIELDS

#: Samba and Phi-4-mini-flash were never in transformers.
THEIRS = [name for name, (family, _) in CONFIGS.items() if family not in ("Samba", "Phi4Flash")]


def inert_differences(ours, theirs):
    """In what changes no result: chunks, initial values, the stream's dtype."""
    tables = [(MODEL_FIELDS, ours.model, theirs.model)]
    for a, b in zip(ours.layers, theirs.layers):
        tables.append((SUBLAYER_FIELDS, a.layer.sub, b.layer.sub))
        for x, y in zip(a.layer.branches, b.layer.branches):
            tables += [(get(x.kind).fields, x.fields, y.fields), (BRANCH_FIELDS, x.branch, y.branch)]
    unequal = ((f, a[f.name], b[f.name]) for fields, a, b in tables for f in fields if a[f.name] != b[f.name])
    return {f.name: (x, y) for f, x, y in unequal if f.inert}


@pytest.mark.parametrize("name", THEIRS)
def test_imported_configurations_are_the_shipped_files(name):
    shipped = load(MODELS / f"{name}.mdl").layers
    found = import_settings(Settings(config(name)), name=name)
    assert not list(differences(shipped, found.graph))
    assert set(inert_differences(shipped, found.graph)) <= FREE.get(name, set())
    assert not found.diagnostics


#: Lengths that some classes have no setting for.
FREE = {name: {"context"} for name in THEIRS if config(name).model_type in ("mamba", "mamba2", "falcon_mamba",
                                                                             "recurrent_gemma", "xlstm")}


@pytest.mark.parametrize("name", THEIRS)
def test_shipped_files_can_be_exported(name):
    shipped = load(MODELS / f"{name}.mdl").layers
    settings, found = export_settings(shipped, family=config(name).model_type)
    assert not list(differences(shipped, found.graph))
    wanted = config(name)
    for key in "hidden_size", "vocab_size", "num_attention_heads":
        if hasattr(wanted, key):
            assert getattr(settings.config, key) == getattr(wanted, key), key
