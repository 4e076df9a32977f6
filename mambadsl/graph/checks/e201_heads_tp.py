"""E201: tensor parallelism gives every device equally many heads or channels of recurrent layers."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import divide
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E201 = declare(
    "E201",
    "the heads of a recurrent layer do not divide among devices",
    """
    Tensor parallelism over `tp` devices splits Mamba-2 and Mamba-3 layers, lightning attention, Kimi Delta
    Attention and mLSTM by heads, Mamba-1 layers, short convolutions and time mixing of RWKV by
    channels; tp must divide them.

    Why: a head's state lives on one device.

    Example: `mamba2(heads=50)` with tp=4.

    Instead: `heads=48`, or tp=2.
    """,
)

#: What is split of a layer (several heads of Mamba-1: E215).
SPLIT = {
    **dict.fromkeys(("mamba2", "mamba3", "lightning", "kimi_delta", "mlstm"), "heads"),
    **dict.fromkeys(("mamba1", "short_conv", "wkv4"), "d_inner"),
}


def check(subject: Subject) -> Iterator[Problem]:
    tp = subject.facts.tp
    for site in subject.sites(*SPLIT):
        field = SPLIT[site.mixer.kind]
        count = site.f[field]
        if count % tp:
            yield site.problem(
                E201, f"`{field}` must be a multiple of the tensor-parallel size", (field,),
                label=f"{count} cannot be split over {tp} devices", help=(f"tp: {divide(count, tp)}",),
            )
