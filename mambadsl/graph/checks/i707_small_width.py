"""I707: small models wait for kernel launches."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import Diagnostic, declare

I707 = declare(
    "I707",
    "so small a model is bound by kernel launches",
    """
    For kernels: d_model is below 512 and there are recurrent layers.

    Why: a Mamba layer is a dozen small kernels; at this width the GPU computes each in less time than it
    takes to start the next.

    Example: `d_model = 256` with the part set `fused`.

    Instead: CUDA graphs (`torch.compile`, the part set `inference`), larger batches, or a wider model.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    d_model = subject.graph.model.d_model
    if d_model < 512 and any(subject.recurrent()):
        message = f"with d_model = {d_model}, time goes to kernel launches"
        help = ("CUDA graphs, or larger batches",)
        yield Problem(Diagnostic(I707, message, subject.setting("d_model"), "below 512", help=help))
