"""Our own Triton kernels, where measurement showed that no package does it or does it well."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.kinds.fields import Field, Int, OneOf, OrWord
from mambadsl.kinds.mamba2.kind import norm_ranks
from mambadsl.parts.part import Package, Part, Request
from mambadsl.parts.triton.decode.accepts import head, step
from mambadsl.parts.triton.limits import WIDEST_NORM

#: The scan's loops hold up to 170 KB in shared memory; GPUs before the H100 have less.
HOPPER = (9, 0)
#: Taps that the convolution keeps in registers; tiles of a chunk that shared memory holds.
TAPS, LARGEST_HEAD, LARGEST_STATE = (2, 8), 128, 256


def conv(request: Request) -> Iterator[str]:
    least, most = TAPS
    if not least <= request.fields.d_conv <= most:
        yield f"takes d_conv from {least} to {most}, not {request.fields.d_conv}"


#: For each kind that the SSD scan is of: channels of a head, and numbers of state a channel.
SCANNED = {"mamba2": lambda f: (f.head_dim, f.d_state), "lightning": lambda f: (f.head_dim, f.head_dim)}


def scan(request: Request) -> Iterator[str]:
    head_dim, d_state = SCANNED[request.slot.partition(".")[0]](request.fields)
    if head_dim > LARGEST_HEAD:
        yield f"takes head_dim up to {LARGEST_HEAD}, not {head_dim}"
    if d_state > LARGEST_STATE:
        yield f"takes d_state up to {LARGEST_STATE}, not {d_state}"


def core(request: Request) -> Iterator[str]:
    for narrow in (conv, scan, gate_norm, whole_groups):
        yield from narrow(request)


def whole_groups(request: Request) -> Iterator[str]:
    """For what norms as it scans: it cannot wait for other ranks."""
    if norm_ranks(request.fields) > 1:
        yield f"norms groups of channels that it has, not those that {norm_ranks(request.fields)} ranks share"


#: For each kind: channels that are normed together, 0 without a norm.
NORMED = {
    "mamba2": lambda f: 0 if f.gated_norm == "none" else f.heads * f.head_dim // max(1, f.norm_groups),
    "gated_delta_net": lambda f: f.value_dim,
    "kimi_delta": lambda f: f.value_dim,
}


def gate_norm(request: Request) -> Iterator[str]:
    width = NORMED[request.slot.partition(".")[0]](request.fields)
    if width > WIDEST_NORM:
        yield f"norms groups of at most {WIDEST_NORM:,} channels, not {width:,}"


def rms_norm(request: Request) -> Iterator[str]:
    if request.dims.d_model > WIDEST_NORM // 2:
        yield f"norms at most {WIDEST_NORM // 2:,} channels (and twice that with the embedding beside)"


CHUNK = Field(
    "chunk", OrWord("auto", Int(16, 128)), None, "tokens computed together, a power of two; no effect on the result"
)
KEEP = Field(
    "keep", OneOf("states", "all", "none"), "states",
    "what the forward pass keeps for the backward pass: none is smallest, all is fastest",
)
CHUNKS = Field(
    "chunks", OrWord("auto", Int(1, 1024)), None, "how many chunks of tokens the logits are computed in, one at a time"
)

PACKAGE = Package(
    name="triton",
    doc="mambadsl's own kernels, in Triton",
    modules=("triton",),
    install="pip install triton",
    distribution="triton",
    tested="3.6.0",
    source="https://github.com/triton-lang/triton",
    parts=(
        Part(
            "triton.core", ("mamba2.core",),
            "convolution, SSD scan and gated norm as one opaque op; with a state, the narrow slots",
            "mambadsl.parts.triton.core:make_core", core, (CHUNK, KEEP), capability=HOPPER,
        ),
        Part(
            "triton.conv", ("mamba2.conv", "mamba1.conv", "gated_delta_net.conv", "kimi_delta.conv"),
            "the convolution with silu, documents and states included",
            "mambadsl.parts.triton.conv:make_conv", conv,
        ),
        Part(
            "triton.plain_conv", ("short_conv.conv", "rg_lru.conv", "cca.conv"),
            "the convolution without silu, documents and states included",
            "mambadsl.parts.triton.conv:make_plain_conv", conv,
        ),
        Part(
            "triton.scan", ("mamba2.scan", "lightning.scan"), "the chunked SSD scan, initial and final states included",
            "mambadsl.parts.triton.scan:make_scan", scan, (CHUNK,), capability=HOPPER,
        ),
        Part(
            "triton.gate_norm", ("mamba2.gate_norm", "gated_delta_net.gate_norm", "kimi_delta.gate_norm"),
            "gate and grouped RMS norm in one pass",
            "mambadsl.parts.triton.gate_norm:make_gate_norm", gate_norm,
        ),
        Part(
            "triton.rms_norm", ("model.norm",), "RMS norm in one pass, float32 inside",
            "mambadsl.parts.triton.norm:make_rms_norm", rms_norm,
        ),
        Part(
            "triton.linear_cross_entropy", ("model.loss",),
            "the head's product and the loss in chunks: the logits are never whole",
            "mambadsl.parts.triton.cross_entropy:make_loss", args=(CHUNKS,),
        ),
        Part(
            "triton.step", ("mamba2.step", "attention.step", "mlp.step"),
            "one token of a whole sublayer in a few kernels, its state in place",
            "mambadsl.parts.triton.decode.steps:make_step", step,
        ),
        Part(
            "triton.embed", ("model.embed_step",), "lookup, multiplier and dtype of the stream in one kernel",
            "mambadsl.parts.triton.decode.embed:make_embed",
        ),
        Part(
            "triton.head", ("model.head_step",), "final norm and logits of one token, in one kernel for small batches",
            "mambadsl.parts.triton.decode.head:make_head", head,
        ),
        Part(
            "triton.next_token", ("model.next_token",),
            "greedy choice, written where the next step and the host read it",
            "mambadsl.parts.triton.decode.head:make_next_token",
        ),
    ),
)
