"""Given arguments -> typed field values, with every problem reported at its place.

Unknown fields get the nearest legal name, and the name this project uses where another library's was
written (`hidden_size` is `d_model`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mambadsl.kinds.fields import REQUIRED, Field, Mismatch, Word
from mambadsl.kinds.values import Values
from mambadsl.spec.model import Origin
from mambadsl.spec.overrides import is_outside
from mambadsl.spec.values import E040, Scope
from mambadsl.syntax import tree
from mambadsl.text.diagnostic import Code, Diagnostic, declare
from mambadsl.text.source import Span
from mambadsl.text.spell import nearest, nearest_all

E022 = declare(
    "E022",
    "an unknown field",
    """
    A kind has a fixed list of fields, and every layer has the sublayer fields (`norm`, `residual`,
    `input`, `recompute`, `in_multiplier`, `out_multiplier`, `dropout`, `adapter`). An unknown one is an
    error, never ignored: a misspelt field would otherwise silently keep its default.
    """,
)
E023 = declare(
    "E023",
    "an unknown model setting",
    """
    `model NAME { ... }` has a fixed list of settings; `mambadsl explain model` prints it. What belongs
    to a layer goes to a `layer` line; what belongs to training or serving stays outside the file.
    """,
)

#: What other libraries call our fields.
ELSEWHERE = {
    "hidden_size": "d_model", "width": "d_model", "dim": "d_model", "n_embd": "d_model",
    "vocab_size": "vocab",
    "max_position_embeddings": "context", "max_seq_len": "context", "seq_len": "context",
    "tie_word_embeddings": "tie_embeddings", "tied": "tie_embeddings",
    "intermediate_size": "d_ff", "ffn_hidden_size": "d_ff", "hidden": "d_ff", "ffn_dim": "d_ff",
    "num_heads": "heads", "n_heads": "heads", "nheads": "heads", "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads", "n_kv_heads": "kv_heads", "num_query_groups": "kv_heads",
    "headdim": "head_dim", "kv_channels": "head_dim",
    "state": "d_state", "state_size": "d_state", "ssm_state_size": "d_state",
    "conv": "d_conv", "conv_kernel": "d_conv", "conv_kernel_size": "d_conv",
    "n_groups": "groups", "ngroups": "groups", "chunk_size": "chunk", "time_step_rank": "dt_rank",
    "hidden_act": "act", "activation": "act", "sliding_window": "window", "rms_norm_eps": "norm",
    "num_experts": "experts", "n_routed_experts": "experts", "num_experts_per_tok": "top_k",
    "shared_hidden": "shared_d_ff", "logit_softcap": "logits_softcap",
}


@dataclass(frozen=True)
class Given:
    """One argument: the raw value, where its name and value stand, and the names of that file."""

    value: Any
    key: Span
    place: Span
    scope: Scope


def fill(
    fields: tuple[Field, ...], given: Mapping[str, Given], *, model: Values | None,
    report: Callable[[Diagnostic], None],
) -> tuple[Values, dict[str, Origin], bool]:
    """(values, where each came from, whether all fitted)."""
    done: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    fine = True
    for field in fields:
        if field.name in given:
            g = given[field.name]
            try:
                done[field.name] = field.type.convert(g.value)
                how = "set" if is_outside(g.key) else "given"
                whole = g.key.to(g.place) if g.key.source is g.place.source else g.place
                origins[field.name] = Origin(how, whole)
                continue
            except Mismatch as mismatch:
                report(_mismatch(field, g, mismatch))
                fine = False
        elif field.default is REQUIRED:
            fine = False
            continue
        done[field.name] = _default(field, done, model)
        origins[field.name] = Origin("default")
    return Values(done), origins, fine


def unknown(code: Code, key: tree.Name, owner: str, legal: list[str]) -> Diagnostic:
    elsewhere = ELSEWHERE.get(key.text)
    near = [elsewhere] if elsewhere in legal else list(nearest_all(key.text, legal))
    if near:
        help = ("did you mean " + " or ".join(f"`{n}`" for n in near) + "?",)
    else:
        help = (f"{owner} takes " + ", ".join(f"`{n}`" for n in legal),)
    what = "setting" if code is E023 else "field"
    return Diagnostic(code, f"{owner} has no {what} `{key.text}`", key.span, f"unknown {what}", help=help)


def _default(field: Field, done: dict[str, Any], model: Values | None) -> Any:
    if not callable(field.default):
        return field.default
    try:
        return field.default(Values(done), model)
    except (AttributeError, ArithmeticError, StopIteration):
        # A field it depends on did not fit and was reported; any legal value keeps the rest checkable.
        return None


def _mismatch(field: Field, given: Given, mismatch: Mismatch) -> Diagnostic:
    place = mismatch.at.span if isinstance(mismatch.at, tree.Node) else given.place
    message = mismatch.rule if mismatch.name_problem else f"`{field.name}` {mismatch.rule}"
    help = mismatch.help
    if isinstance(given.value, Word) and not help:
        near = nearest(given.value.text, given.scope.names())
        help = (f"did you mean `{near}`?",) if near else ()
    return Diagnostic(E040, message, place, field.doc if not mismatch.name_problem else "", help=help)
