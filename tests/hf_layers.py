"""One layer of a tiny Hugging Face model with random weights, and what went through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

COMMON = dict(vocab_size=61, hidden_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)


@dataclass
class Layer:
    """module, its input and its output [B, T, D] in one forward pass of the whole model."""

    module: nn.Module
    x_BTD: Tensor
    y_BTD: Tensor
    config: Any

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict())


def layer(
    model: str, module: str, *, index: int = 0, length: int = 12, seed: int = 0, **config: Any
) -> Layer:
    """model: class prefix, "Llama"; module: class name of the wanted layer, the `index`-th of them."""
    torch.manual_seed(seed)
    config = {**COMMON, **config}
    config_class = config.pop("config_class", f"{model}Config")
    made = getattr(transformers, config_class)(**config)
    made._attn_implementation = "eager"
    network = getattr(transformers, f"{model}ForCausalLM")(made).eval()
    if hasattr(network, "set_experts_implementation"):
        network.set_experts_implementation("eager")
    _randomise(network, seed)
    found = [m for m in network.modules() if type(m).__name__ == module]
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        seen.append((x, output[0] if isinstance(output, tuple) else output))

    found[index].register_forward_hook(keep, with_kwargs=True)
    ids = torch.randint(3, 61, (2, length))
    with torch.no_grad():
        network(input_ids=ids, position_ids=torch.arange(length)[None].expand(2, -1), use_cache=False)
    return Layer(found[index], *seen[0], made)


def _randomise(network: nn.Module, seed: int) -> None:
    """No weight keeps an initial value that hides a mistake (norms of one, biases of zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(p + 0.3 * noise if p.dim() < 2 else noise * p.shape[-1] ** -0.5)
        for name, b in network.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.copy_(0.2 * torch.randn(b.shape, generator=generator))
