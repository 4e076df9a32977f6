"""Rotary position embedding: tables of cosines and sines in float32, and the rotation. Torch.

Half-split pairs (channel i with channel i + R), frequencies scaled for long contexts as Hugging Face's
ROPE_INIT_FUNCTIONS do. Letters: B batch, T time, H heads, P head_dim, R rotated pairs of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Variant


def rope_tables(rope: Variant, dim: int, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """cos_BTR and sin_BTR, float32, for `dim` = 2R rotated channels; rope: a form of `kind.ROPE`."""
    positions_BT = tokens.positions_BT
    scaling, device = rope.scaling, positions_BT.device
    if scaling.name == "dynamic":
        frequency = 1 / dynamic_theta(scaling, rope.theta, dim, tokens)[..., None] ** exponents(dim, device)
    else:
        frequency = frequencies(rope, dim, device)
    angle_BTR = positions_BT[..., None].float() * frequency
    factor = attention_factor(scaling)
    return angle_BTR.cos() * factor, angle_BTR.sin() * factor


def exponents(dim: int, device: torch.device) -> Tensor:
    return torch.arange(0, dim, 2, device=device).float() / dim


def frequencies(rope: Variant, dim: int, device: torch.device) -> Tensor:
    """Angle per position of each of dim / 2 pairs of channels, float32 [R]; of all scalings but `dynamic`."""
    frequency_R = SCALINGS[rope.scaling.name](rope.scaling, rope.theta, 1 / rope.theta ** exponents(dim, device))
    if rope.name == "proportional":
        frequency_R = frequency_R * (torch.arange(dim // 2, device=device) < int(rope.fraction * dim // 2))
    return frequency_R


def rotate(x_BTHP: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """The first 2R channels of each head rotated, the others as they are; same dtype."""
    R = cos_BTR.shape[-1]
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    first, second, rest = x_BTHP.split((R, R, x_BTHP.shape[-1] - 2 * R), -1)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat((*(t.to(x_BTHP.dtype) for t in turned), rest), -1)


def attention_factor(scaling: Variant) -> float:
    """What cosines and sines are multiplied by (yarn: so that attention stays as sharp)."""
    if scaling.name != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0


def _llama3(s: Variant, theta: float, frequency_R: Tensor) -> Tensor:
    """Low frequencies are divided by the factor, high ones kept, those between mixed."""
    turns_R = s.original_context * frequency_R / (2 * math.pi)
    keep_R = ((turns_R - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return frequency_R * (keep_R + (1 - keep_R) / s.factor)


def _yarn(s: Variant, theta: float, frequency_R: Tensor) -> Tensor:
    """As llama3, with a ramp that is linear in the channel (arXiv:2309.00071)."""
    dim = 2 * frequency_R.shape[0]

    def pair(turns: float) -> float:
        """The pair that turns so many times over the original context."""
        return dim * math.log(s.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(s.beta_fast)), 0)
    high = min(math.ceil(pair(s.beta_slow)), dim - 1)
    # Hugging Face's width of an empty ramp.
    width = high - low if high != low else 0.001
    pairs_R = torch.arange(dim // 2, device=frequency_R.device).float()
    scaled_R = ((pairs_R - low) / width).clamp(0, 1)
    return frequency_R * (1 - scaled_R + scaled_R / s.factor)


SCALINGS = {
    "none": lambda s, theta, frequency_R: frequency_R,
    "linear": lambda s, theta, frequency_R: frequency_R / s.factor,
    "llama3": _llama3,
    "yarn": _yarn,
}


def dynamic_theta(s: Variant, theta: float, dim: int, tokens: Tokens) -> Tensor:
    """The base for each token, [B, T]: it grows with the length of the token's document as far as this
    batch shows it. Longer than original_context, a token thus depends on how much follows it, here as
    in Hugging Face (where it depends on the longest row, too); keys in a state keep their rotation."""
    positions_BT = tokens.positions_BT
    if tokens.segments_BT is None:
        last_BT = positions_BT.amax(1, keepdim=True).expand_as(positions_BT)
    else:
        same_BTT = tokens.segments_BT[:, :, None] == tokens.segments_BT[:, None]
        last_BT = torch.where(same_BTT, positions_BT[:, None], 0).amax(2)
    length_BT = (last_BT + 1).clamp_min(s.original_context).float()
    stretch_BT = s.factor * length_BT / s.original_context - (s.factor - 1)
    # One pair of channels turns at frequency 1 whatever the base.
    return theta * stretch_BT ** (dim / max(dim - 2, 1))
