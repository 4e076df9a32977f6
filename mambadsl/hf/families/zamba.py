"""Zamba and Zamba2: Mamba layers, and blocks of shared attention and MLP aside of the stream, whose output a layer of
Mamba reads beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from mambadsl.adapt.table import Unlike
from mambadsl.adapt.tensors import Piece, Place, Rows
from mambadsl.hf import mixers
from mambadsl.hf.config import Settings
from mambadsl.hf.entries import act, expand, form, norm, read_rope, write_rope
from mambadsl.hf.family import Both, Family, Layer, Recipe, Row, fixed, read_only
from mambadsl.kinds.values import NONE, Values, Variant

SETTINGS = dict(
    vocab="vocab_size", d_model="hidden_size", norm=norm(), tie_embeddings="tie_word_embeddings",
    context="max_position_embeddings",
)
ASIDE = dict(residual=fixed(form("aside")))
#: The scores are those of half as many channels: the other half is the first embedding.
ATTENTION = ASIDE | dict(
    heads="num_attention_heads", kv_heads="num_key_value_heads", input=fixed("with_embedding"),
    head_dim=read_only("attention_head_dim", lambda c: c.attention_head_dim),
    scale=read_only("attention_head_dim", lambda c: (c.attention_head_dim / 2) ** -0.5),
)
MLP = ASIDE | dict(d_ff="intermediate_size", act=act(), gated=fixed(True))
BRIDGE = Recipe("linear", ASIDE | dict(norm=fixed(NONE)), {"out_proj.weight": "weight"})


def _mamba1(f: Values) -> dict[str, Place]:
    """Rows of in_proj are x and z in turn; heads are an axis."""
    heads, per_head = f.heads, f.d_inner // f.heads
    shapes = {
        "x_proj.weight": ("x_proj_weight", (heads, -1, per_head)),
        "dt_proj.weight": ("dt_proj_weight", (heads, per_head, -1)),
        "dt_proj.bias": ("dt_proj_bias", (heads, per_head)),
        "A_log": ("A_log", (heads, per_head, -1)), "D": ("D", (heads, per_head)),
    }
    turns = {f"in_proj.{w}": Rows(Piece(f"in_proj.{w}", ("x", "z"), groups=f.d_inner)) for w in ("weight", "bias")}
    return mixers.conv1d(f) | turns | {ours: Rows(Piece(name, shape=shape)) for ours, (name, shape) in shapes.items()}


def _layers(c: Settings, block: str, blocks: int) -> Iterator[Layer]:
    """block: what theirs is called; blocks: how many take turns. The first use of a block holds its tensors."""
    first: dict[int, int] = {}
    uses = 0
    for i, kind in enumerate(c.layers_block_type):
        at = f"model.layers.{i}"
        if kind == "hybrid":
            which = uses % blocks
            there = f"model.layers.{first.setdefault(which, i)}.{block}"
            shared = f"shared.{ascii_uppercase[(ascii_uppercase.index('T') + which) % 26]}"
            yield Layer(
                ("A",), (f"{there}.self_attn",), f"{there}.input_layernorm.weight", owner=f"{shared}.0",
                names={
                    f"adapter.qkv_proj.{w}.weight": tuple(
                        f"linear_{name}_adapter_list.{uses}.{n}.weight" for name in "qkv"
                    ) for n, w in enumerate(("down", "up"))
                },
            )
            yield Layer(
                ("F",), (f"{there}.feed_forward",), f"{there}.pre_ff_layernorm.weight", owner=f"{shared}.1",
                names={
                    f"adapter.gate_up_proj.{w}.weight": f"gate_up_proj_adapter_list.{uses}.{n}.weight"
                    for n, w in enumerate(("down", "up"))
                },
            )
            yield Layer(("P",), (f"{at}.linear",))
            uses, at = uses + 1, f"{at}.mamba_decoder"
        yield Layer(("M",), (f"{at}.mamba",), f"{at}.input_layernorm.weight")


def zamba_layers(c: Settings) -> Iterator[Layer]:
    yield from _layers(c, "shared_transf", 1)


def zamba2_layers(c: Settings) -> Iterator[Layer]:
    yield from _layers(c, "shared_transformer", c.num_mem_blocks)


def order(rows: Sequence[Row]) -> Mapping[str, Any]:
    names = ["+".join(row) for row in rows]
    found = []
    at = 0
    while at < len(names):
        width = 1 if names[at] == "M" else 4
        if width == 4 and names[at : at + 4] != ["A", "F", "P", "M"]:
            raise Unlike(f"stack.{at} must be Mamba, or begin shared attention, MLP, a projection and Mamba")
        found.append("linear_attention" if width == 1 else "hybrid")
        at += width
    return {"num_hidden_layers": len(found), "layers_block_type": found}


def zamba2_order(rows: Sequence[Row]) -> Mapping[str, Any]:
    return {**order(rows), "num_mem_blocks": max(1, len({row.owner for row in rows if row == ("A",)}))}


def _rope(c: Settings) -> Variant:
    return read_rope(c.rope_parameters) if c.use_mem_rope else NONE


def _write_rope(value: Variant) -> Mapping[str, Any]:
    return {"use_mem_rope": value.name != "none"} | (
        {"rope_parameters": write_rope(value)} if value.name != "none" else {}
    )


def _qkv_adapter(c: Settings) -> Variant:
    if not c.use_shared_attention_adapter:
        return NONE
    return form("lora", rank=c.adapter_rank, targets=("qkv_proj",), per="segment")


FOLLOWS = "num_hidden_layers", "layers_block_type", "attention_hidden_size"
DEMANDS = {"attention_dropout": 0}
FAMILIES = (
    Family(
        "zamba", "ZambaForCausalLM", SETTINGS,
        {
            "M": Recipe(
                "mamba1",
                dict(
                    d_inner=read_only("mamba_expand", lambda c: c.mamba_expand * c.hidden_size),
                    heads="n_mamba_heads", d_state="mamba_d_state", d_conv="mamba_d_conv", dt_rank="mamba_dt_rank",
                    conv_bias="mamba_conv_bias", bias="mamba_proj_bias", dt_min="time_step_min", dt_max="time_step_max",
                    dt_floor="time_step_floor",
                ),
                _mamba1,
            ),
            "A": Recipe("attention", ATTENTION | dict(rope=fixed(NONE)), mixers.QKV),
            "F": Recipe("mlp", MLP, mixers.GATED),
            "P": BRIDGE,
        },
        zamba_layers, order, demands=DEMANDS | {"hidden_mamba_act": "silu"}, final="model.final_layernorm.weight",
        derived=expand("mamba_expand", lambda m: m.d_inner),
        follows=(*FOLLOWS, "attn_layer_period", "attn_layer_offset"),
    ),
    Family(
        "zamba2", "Zamba2ForCausalLM", SETTINGS,
        {
            "M": Recipe(
                "mamba2",
                dict(
                    heads="n_mamba_heads", d_state="mamba_d_state", groups="mamba_ngroups", d_conv="mamba_d_conv",
                    head_dim=read_only("n_mamba_heads", lambda c: c.mamba_headdim), chunk="chunk_size",
                    conv_bias="use_conv_bias", dt_min="time_step_min", dt_max="time_step_max",
                    dt_floor="time_step_floor", gated_norm=fixed("after_gate"),
                    # The class's own.
                    norm_eps=fixed(1e-5),
                ),
                mixers.mamba2,
            ),
            "A": Recipe(
                "attention",
                ATTENTION | dict(
                    rope=Both(("rope_parameters", "use_mem_rope"), _rope, _write_rope),
                    adapter=Both(
                        ("use_shared_attention_adapter", "adapter_rank"), _qkv_adapter,
                        lambda v: {"use_shared_attention_adapter": v.name != "none"},
                    ),
                ),
                mixers.QKV,
            ),
            "F": Recipe(
                "mlp",
                MLP | dict(adapter=Both(
                    ("adapter_rank",), lambda c: form("lora", rank=c.adapter_rank, targets=("up_proj",)),
                    lambda v: {"adapter_rank": getattr(v, "rank", None)},
                )),
            ),
            "P": BRIDGE,
        },
        zamba2_layers, zamba2_order,
        demands=DEMANDS | {"add_bias_linear": False, "use_long_context": False}, final="model.final_layernorm.weight",
        derived=expand("mamba_expand", lambda m: m.heads * m.head_dim),
        follows=(
            *FOLLOWS, "attention_head_dim", "mamba_headdim", "mamba_expand", "kv_channels", "num_query_groups",
            "hybrid_layer_ids", "use_mem_eff_path", "num_mem_blocks",
        ),
    ),
)
