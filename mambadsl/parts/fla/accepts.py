"""What flash-linear-attention's parts cannot do: reasons, none where a part fits the request. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.parts.part import Request

#: The kernel of single tokens has it written in.
EPS = 1e-6
#: The smallest side of a product in Triton, and four blocks of a state's rows.
KEY_DIM = (16, 256)


def conv(request: Request) -> Iterator[str]:
    """Any number of channels, any number of taps."""
    yield from ()


def delta_rule(request: Request) -> Iterator[str]:
    f, (least, most) = request.fields, KEY_DIM
    if not least <= f.key_dim <= most:
        yield f"takes key_dim from {least} to {most}, not {f.key_dim}"
    # In 16 bits, Triton reads beyond rows of an odd length.
    for name in ("key_dim", "value_dim"):
        if f[name] % 8:
            yield f"takes {name} in eights, not {f[name]}"
    if f.qk_eps != EPS:
        yield f"norms queries and keys with an eps of {EPS:g}, not {f.qk_eps:g}"
