"""mamba_ssm's own checkpoints: config.json without a model_type, pytorch_model.bin. Mamba-1 or Mamba-2, attention at
some places, and after each an MLP where `d_intermediate` says so. They are read, not written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from mambadsl.adapt.table import Unlike
from mambadsl.adapt.tensors import Piece, Rows
from mambadsl.hf import mixers
from mambadsl.hf.config import Settings
from mambadsl.hf.entries import form
from mambadsl.hf.family import Both, Family, Layer, Recipe, fixed, key, read_only
from mambadsl.kinds.values import NONE, Variant

EPS = 1e-5


@dataclass
class Config:
    """As mamba_ssm's MambaConfig has them."""

    model_type: ClassVar[str] = "mamba_ssm"
    attribute_map: ClassVar[dict[str, str]] = {}

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict = field(default_factory=dict)
    attn_layer_idx: list = field(default_factory=list)
    attn_cfg: dict = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def config(given: Mapping[str, Any]) -> Config | None:
    """Of values that are mamba_ssm's; None of others."""
    if "ssm_cfg" not in given and not {"d_model", "n_layer"} <= given.keys():
        return None
    known = {f.name for f in fields(Config)}
    return Config(**{name: value for name, value in given.items() if name in known and value is not None})


#: What modules take, and what they do without it. Those that are to be so have no counterpart otherwise.
SHARED = dict(d_conv=4, expand=2, dt_min=0.001, dt_max=0.1, dt_init_floor=1e-4, conv_bias=True, bias=False)
MAMBA1 = SHARED | dict(d_state=16, dt_rank="auto")
MAMBA2 = SHARED | dict(
    d_state=128, headdim=64, ngroups=1, d_ssm=None, rmsnorm=True, norm_before_gate=False, chunk_size=256,
    A_init_range=(1, 16), dt_limit=(0.0, float("inf")),
)
MHA = dict(
    num_heads=None, num_heads_kv=None, head_dim=None, qkv_proj_bias=True, out_proj_bias=True, softmax_scale=None,
    rotary_emb_dim=0, rotary_emb_base=10000.0,
)
IGNORED = "layer", "layer_idx", "use_fast_path", "use_mem_eff_path", "conv_init", "dt_init", "dt_scale"
MUST_BE = dict(D_has_hdim=False, causal=True, d_conv=0, mlp_dim=0, rotary_emb_interleaved=False, dwconv=False)


def options(c: Settings, name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """A module's options, with what it does without them. Raises Unlike for those without a counterpart."""
    given = {k: v for k, v in (getattr(c, name) or {}).items() if k not in IGNORED}
    for option, value in given.items():
        if option in known:
            continue
        if option not in MUST_BE or value != MUST_BE[option]:
            only = f"; only `{MUST_BE[option]}` has a counterpart" if option in MUST_BE else ""
            raise Unlike(f"has `{option}` of `{value}`" + (only or ", which has no counterpart"))
    return {**known, **given}


def _is_mamba2(c: Settings) -> bool:
    return (c.ssm_cfg or {}).get("layer", "Mamba1") == "Mamba2"


def _from(name: str, known: Mapping[str, Any], read: Any) -> Both:
    """A field that follows from a module's options and the model's width."""
    return read_only(name, lambda c: read(options(c, name, known), c.d_model))


def _ssm(known: Mapping[str, Any], read: Any) -> Both:
    return _from("ssm_cfg", known, read)


def _heads(o: Mapping[str, Any], d_model: int) -> int:
    if o["d_ssm"] not in (None, o["expand"] * d_model):
        raise Unlike(f"has `d_ssm` of {o['d_ssm']}; only all {o['expand'] * d_model} channels have a counterpart")
    return o["expand"] * d_model // o["headdim"]


def _gated_norm(o: Mapping[str, Any], d_model: int) -> str:
    return ("before_gate" if o["norm_before_gate"] else "after_gate") if o["rmsnorm"] else "none"


def _head_dim(o: Mapping[str, Any], d_model: int) -> int:
    return o["head_dim"] or d_model // o["num_heads"]


def _rope(o: Mapping[str, Any], d_model: int) -> Variant:
    if not o["rotary_emb_dim"]:
        return NONE
    return form("rope", theta=o["rotary_emb_base"], fraction=o["rotary_emb_dim"] / _head_dim(o, d_model))


def _shared(known: Mapping[str, Any]) -> dict[str, Both]:
    names = dict(
        d_conv="d_conv", d_state="d_state", conv_bias="conv_bias", bias="bias", dt_min="dt_min", dt_max="dt_max",
        dt_floor="dt_init_floor",
    )
    return {ours: _ssm(known, lambda o, d, theirs=theirs: o[theirs]) for ours, theirs in names.items()}


def _mha(read: Any) -> Both:
    return _from("attn_cfg", MHA, read)


RECIPES = {
    "R": Recipe(
        "mamba1",
        _shared(MAMBA1) | dict(
            d_inner=_ssm(MAMBA1, lambda o, d: o["expand"] * d),
            dt_rank=_ssm(MAMBA1, lambda o, d: -(-d // 16) if o["dt_rank"] == "auto" else o["dt_rank"]),
        ),
        mixers.mamba1,
    ),
    "M": Recipe(
        "mamba2",
        _shared(MAMBA2) | dict(
            heads=_ssm(MAMBA2, _heads), head_dim=_ssm(MAMBA2, lambda o, d: o["headdim"]),
            groups=_ssm(MAMBA2, lambda o, d: o["ngroups"]), chunk=_ssm(MAMBA2, lambda o, d: o["chunk_size"]),
            gated_norm=_ssm(MAMBA2, _gated_norm), norm_eps=fixed(EPS),
            dt_limit=_ssm(MAMBA2, lambda o, d: tuple(None if n == float("inf") else n for n in o["dt_limit"])),
        ),
        mixers.mamba2,
    ),
    "A": Recipe(
        "attention",
        dict(
            heads=_mha(lambda o, d: o["num_heads"]), kv_heads=_mha(lambda o, d: o["num_heads_kv"] or o["num_heads"]),
            head_dim=_mha(_head_dim), rope=_mha(_rope), scale=_mha(lambda o, d: o["softmax_scale"]),
            qkv_bias=_mha(lambda o, d: o["qkv_proj_bias"]), o_bias=_mha(lambda o, d: o["out_proj_bias"]),
        ),
        {f"{ours}.{w}": f"{theirs}.{w}" for ours, theirs in (("qkv_proj", "in_proj"), ("o_proj", "out_proj"))
         for w in ("weight", "bias")},
    ),
    "F": Recipe(
        "mlp",
        dict(d_ff=key("d_intermediate", lambda n: -(-n // 128) * 128), act=fixed("silu"), gated=fixed(True)),
        # What is gated comes before its gate.
        {"gate_up_proj.weight": Rows(Piece("fc1.weight", ("up", "gate"))), "down_proj.weight": "fc2.weight"},
    ),
}


def layers(c: Settings) -> Iterator[Layer]:
    scan = "M" if _is_mamba2(c) else "R"
    for i in range(c.n_layer):
        at = f"backbone.layers.{i}"
        yield Layer(("A" if i in c.attn_layer_idx else scan,), (f"{at}.mixer",), f"{at}.norm.weight")
        if c.d_intermediate:
            yield Layer(("F",), (f"{at}.mlp",), f"{at}.norm2.weight")


def order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    raise Unlike("mamba_ssm's own checkpoints are read, not written")


def _vocab(c: Settings) -> int:
    step = c.pad_vocab_size_multiple
    return -(-c.vocab_size // step) * step


FAMILIES = (
    Family(
        "mamba_ssm", "MambaLMHeadModel",
        dict(
            vocab=read_only(("vocab_size", "pad_vocab_size_multiple"), _vocab), d_model="d_model",
            norm=key("rms_norm", lambda rms: form("rmsnorm" if rms else "layernorm", eps=EPS)),
            tie_embeddings="tie_embeddings",
            residual_dtype=key("residual_in_fp32", lambda wide: "fp32" if wide else "model"),
        ),
        RECIPES, layers, order, embed="backbone.embedding.weight", final="backbone.norm_f.weight",
        follows=("attn_layer_idx", "n_layer", "fused_add_norm", "ssm_cfg", "attn_cfg"), config=config,
    ),
)
