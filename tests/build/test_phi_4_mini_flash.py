"""Phi-4-mini-flash by a definition of its own: weights as its checkpoint has them, attention in stripes of heads, one
token after the other. (Hugging Face transformers has no class of it.)

Letters: T time, D d_model, I d_inner, H heads, P head_dim, N d_state.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from shrunk import shrunk
from small_models import ids, shaken

from mambadsl.build.model import build

NAME = "phi_4_mini_flash"


@pytest.fixture(scope="module")
def model():
    """The starts of lambda stay as they are built: in the published code they are no weights."""
    built = build(shrunk(NAME).layers).eval()
    starts = {path: t.clone() for path, t in built.tensors().items() if path.endswith("lambda_start")}
    built = shaken(built, size=0.05)
    with torch.no_grad():
        for path, start in starts.items():
            built.tensors()[path].copy_(start)
    return built


def norm(w, name, x_TD):
    return F.layer_norm(x_TD, x_TD.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def published(model) -> dict[str, torch.Tensor]:
    """Our weights by the checkpoint's names and in its layout: heads 0, 2, 4, ... are the first of the pairs."""
    ours = model.tensors()
    theirs = {
        "model.embed_tokens.weight": ours["embed.weight"],
        "model.final_layernorm.weight": ours["final_norm.weight"],
        "model.final_layernorm.bias": ours["final_norm.bias"],
    }
    for i, node in enumerate(model.graph.layers):
        own = {p.removeprefix(f"{node.path}."): t for p, t in ours.items() if p.startswith(f"{node.path}.")}
        base, mixer = f"model.layers.{i // 2}", node.layer.branches[0]
        place = "post_attention_layernorm" if i % 2 else "input_layernorm"
        theirs |= {f"{base}.{place}.{leaf}": own.pop(f"norm.{leaf}") for leaf in ("weight", "bias")}
        own = {name.removeprefix("mixer."): t for name, t in own.items()}
        if mixer.kind == "mlp":
            theirs[f"{base}.mlp.fc1.weight"] = own["gate_up_proj.weight"]
            theirs[f"{base}.mlp.fc2.weight"] = own["down_proj.weight"]
        elif mixer.kind == "attention":
            for leaf in "weight", "bias":
                qkv = own[f"qkv_proj.{leaf}"].unflatten(0, (-1, mixer.fields.head_dim))
                sizes = [mixer.fields.heads] + [mixer.fields.kv_heads] * (2 if mixer.fields.takes == "none" else 0)
                striped = [torch.stack(part.chunk(2), 1).flatten(0, 1) for part in qkv.split(sizes)]
                theirs[f"{base}.attn.Wqkv.{leaf}"] = torch.cat(striped).flatten(0, 1)
                theirs[f"{base}.attn.out_proj.{leaf}"] = own[f"o_proj.{leaf}"]
            for name, vector in zip(("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"), own["lambda"]):
                theirs[f"{base}.attn.inner_cross_attn.{name}"] = vector
            theirs[f"{base}.attn.inner_cross_attn.subln.weight"] = own["sub_norm.weight"]
        else:
            renamed = {"conv.weight": "conv1d.weight", "conv.bias": "conv1d.bias"}
            theirs |= {f"{base}.attn.{renamed.get(name, name)}": t for name, t in own.items()}
    return theirs


def mamba(w, x_TD):
    """Output, and the scan before the gate."""
    x_TI, z_TI = (x_TD @ w["in_proj.weight"].T).chunk(2, -1)
    taps = w["conv1d.weight"]
    padded = F.pad(x_TI, (0, 0, taps.shape[1] - 1, 0))
    windows = [padded[t : t + taps.shape[1]].T for t in range(len(x_TI))]
    x_TI = F.silu(torch.stack([(window * taps).sum(1) for window in windows]) + w["conv1d.bias"])
    N = w["A_log"].shape[1]
    low, B_TN, C_TN = (x_TI @ w["x_proj.weight"].T).split([w["dt_proj.weight"].shape[1], N, N], -1)
    dt_TI = F.softplus(low @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    h_IN, ys = torch.zeros_like(w["A_log"]), []
    for x_I, dt_I, B_N, C_N in zip(x_TI, dt_TI, B_TN, C_TN):
        h_IN = torch.exp(-dt_I[:, None] * w["A_log"].exp()) * h_IN + (dt_I * x_I)[:, None] * B_N
        ys.append(h_IN @ C_N + w["D"] * x_I)
    scan_TI = torch.stack(ys)
    return (scan_TI * F.silu(z_TI)) @ w["out_proj.weight"].T, scan_TI


def softmax_attention(q_P, k_SP, v_SP):
    return torch.softmax(k_SP @ q_P / math.sqrt(len(q_P)), 0) @ v_SP


def attention(w, x_TD, layer, heads, kv_heads, window, kv=None):
    """Output, and (k, v) [T, H, P]."""
    T, P = len(x_TD), w["inner_cross_attn.lambda_q1"].shape[0]
    qkv = (x_TD @ w["Wqkv.weight"].T + w["Wqkv.bias"]).unflatten(-1, (-1, P))
    q_THP = qkv[:, :heads]
    k_THP, v_THP = kv if kv is not None else (qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :])
    start = 0.8 - 0.6 * math.exp(-0.3 * layer)
    q1, k1, q2, k2 = (w[f"inner_cross_attn.lambda_{name}"] for name in ("q1", "k1", "q2", "k2"))
    share = torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + start
    rows = []
    for t in range(T):
        seen = slice(0 if window is None else max(0, t - window + 1), t + 1)
        out = []
        for pair in range(heads // 2):
            # Two queries and two keys of a pair, and both its values side by side.
            kv_pair = pair * kv_heads // heads
            v_SV = v_THP[seen, 2 * kv_pair : 2 * kv_pair + 2].flatten(1)
            first, second = (
                softmax_attention(q_THP[t, 2 * pair + i], k_THP[seen, 2 * kv_pair + i], v_SV) for i in (0, 1)
            )
            y_V = first - share * second
            y_V = y_V / torch.sqrt((y_V**2).mean() + 1e-5) * w["inner_cross_attn.subln.weight"]
            out.append(y_V * (1 - start))
        rows.append(torch.cat(out))
    return torch.stack(rows) @ w["out_proj.weight"].T + w["out_proj.bias"], (k_THP, v_THP)


def logits(w, tokens_T, *, layers, heads, kv_heads, window):
    x_TD = w["model.embed_tokens.weight"][tokens_T]
    scan = kv = None
    for i in range(layers):
        base = f"model.layers.{i}"
        own = {name.removeprefix(f"{base}.attn."): t for name, t in w.items() if name.startswith(f"{base}.attn.")}
        h_TD = norm(w, f"{base}.input_layernorm", x_TD)
        if i % 2:
            shared = kv if i > layers // 2 + 1 else None
            y_TD, kv = attention(own, h_TD, i, heads, kv_heads, window if i < layers // 2 else None, shared)
        elif i > layers // 2:
            y_TD = (F.silu(h_TD @ own["in_proj.weight"].T) * scan) @ own["out_proj.weight"].T
        else:
            y_TD, scan = mamba(own, h_TD)
        x_TD = x_TD + y_TD
        gate, up = (norm(w, f"{base}.post_attention_layernorm", x_TD) @ w[f"{base}.mlp.fc1.weight"].T).chunk(2, -1)
        x_TD = x_TD + (F.silu(gate) * up) @ w[f"{base}.mlp.fc2.weight"].T
    return norm(w, "model.final_layernorm", x_TD) @ w["model.embed_tokens.weight"].T


def test_the_small_model_is_its_definition(model):
    """More tokens than a window has."""
    f = next(n.layer.branches[0].fields for n in model.graph.layers if "takes" in n.layer.branches[0].fields)
    tokens = ids(1, 20, vocab=256)
    with torch.no_grad():
        sizes = dict(layers=32, heads=f.heads, kv_heads=f.kv_heads, window=f.window)
        expected = logits(published(model), tokens[0], **sizes)
        found = model(tokens)[0]
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)


def test_names_are_those_of_the_checkpoint(model):
    """Each of our weights is in the checkpoint once, but for the start of lambda, which is a number of the code."""
    ours = {p: w for p, w in model.weights.items() if not p.endswith("lambda_start")}
    assert sum(t.numel() for t in published(model).values()) == sum(w.elements for w in ours.values())
