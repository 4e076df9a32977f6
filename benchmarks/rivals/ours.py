"""mambadsl's own contenders: one model for each part set, and the ways to run a step of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import mambadsl
from rivals.contender import Contender

#: Blocks to put behind a model's text: Mamba-2 that keeps all it can for the backward pass; every projection in FP8.
BLOCKS = """
parts keep : fused { mamba2.core = triton.core(keep=all) }
parts te_fp8 : te {
  mamba2.in_proj = te.norm_linear(fp8=true)
  mamba2.out_proj = te.linear(fp8=true)
  attention.qkv_proj = te.norm_linear(fp8=true)
  attention.o_proj = te.linear(fp8=true)
  mlp.up_proj = te.norm_linear(fp8=true)
  mlp.down_proj = te.linear(fp8=true)
}
"""
#: name -> part set, and how the step runs.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fused": ("fused", {}),
    "fused compile": ("fused", dict(compile=True)),
    "fused graph": ("fused", dict(graph=True)),
    "fused compile graph": ("fused", dict(compile=True, graph=True)),
    "keep compile graph": ("keep", dict(compile=True, graph=True)),
    "te": ("te", {}),
    "te graph": ("te", dict(graph=True)),
    "te fp8": ("te_fp8", {}),
    "te fp8 graph": ("te_fp8", dict(graph=True)),
}


class Ours:
    """Models by part set, built when first asked for, all with the weights of the first."""

    def __init__(self, text: str, *, device: str, dtype: str, parts: Mapping[str, str], backend: str | Callable):
        """parts: part set -> the one that stands in for it here. backend: of torch.compile."""
        self.text, self.made = text, dict(device=device, dtype=dtype)
        self.stand_ins, self.backend = parts, backend
        self.models: dict[str, Any] = {}

    def model(self, parts: str) -> Any:
        parts = self.stand_ins.get(parts, parts)
        if parts not in self.models:
            text = self.text + BLOCKS
            # Drawing the initial values on the CPU would take longer than all the rest.
            with patch("mambadsl.build.model.initialise", draw_on_device):
                model = mambadsl.load(text=text).build(parts=parts, **self.made).train()
            if self.models:
                model.load_state_dict(next(iter(self.models.values())).state_dict())
            self.models[parts] = model
        return self.models[parts]

    def weights(self) -> dict[str, Tensor]:
        """For rivals, even where no part set of ours but the reference could be built."""
        model = next(iter(self.models.values()), None) or self.model("reference")
        return dict(model.named_parameters())

    def contender(self, name: str) -> Contender:
        from mambadsl.run.step import TrainStep

        parts, how = VARIANTS[name]
        model = self.model(parts)
        step = TrainStep(model, backend=self.backend, **how)
        graph = how.get("graph", False)
        return Contender(name, step.step, list(model.parameters()), model.embed.weight, True, graph, step.close)


def draw_on_device(model: Any, *, seed: int = 0) -> Any:
    """Values by the weights' own laws, normal ones from the device's generator."""
    from mambadsl.build.init import arguments, draw

    tensors = model.tensors()
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad():
        for path, weight in model.weights.items():
            if weight.init.law == "normal":
                std = arguments(weight.init, model.graph, path=path)["std"]
                tensors[path].normal_(0, std, generator=generator)
            else:
                tensors[path].copy_(draw(weight, model.graph, path=path, seed=seed))
    return model
