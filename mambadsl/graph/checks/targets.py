"""Other tools that can be asked to run a model, and what each of them can express: a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """What a tool can do with a model; the defaults are a tool without limits.

    kinds: the kinds it knows (empty: all). sums, shared: it has layers in parallel, layers with one set of
    weights. one_size: all layers of a kind have the same fields, but those in `varied`, which some may do without.
    one_chunk: one scan chunk for all layers.
    mamba_kernels: it runs mamba-ssm's and causal-conv1d's kernels, whatever the machine offers.
    copies_kv: more devices than kv_heads share copies of them. copies_one_group: B and C of a single
    group are copied to every device. copies_groups: groups are copied under context parallelism.
    pads_vocab: it pads the vocabulary for tensor parallelism by itself, to a multiple of so many rows a
    device.
    norm_before_gate, conv_without_bias: it has these variants of Mamba-2. masks_padding: padding on the left
    does not reach recurrent state. cuts_evenly: pipeline stages have equally many layers unless told.
    shared_across_stages: a shared layer may be used in several stages.
    """

    doc: str
    kinds: tuple[str, ...] = ()
    sums: bool = True
    shared: bool = True
    one_size: bool = False
    varied: tuple[str, ...] = ()
    one_chunk: bool = False
    mamba_kernels: bool = False
    copies_kv: bool = False
    copies_one_group: bool = False
    copies_groups: bool = False
    pads_vocab: int | None = None
    norm_before_gate: bool = True
    conv_without_bias: bool = True
    masks_padding: bool = True
    cuts_evenly: bool = False
    shared_across_stages: bool = True


TARGETS = {
    "none": Target("this compiler alone"),
    "hf": Target("Hugging Face transformers", norm_before_gate=False),
    "megatron": Target(
        "Megatron-LM hybrid models",
        kinds=("mamba2", "attention", "mlp", "moe", "gated_delta_net", "mla"), sums=False, shared=False, one_size=True,
        varied=("window", "rope"), mamba_kernels=True, copies_groups=True, pads_vocab=128, norm_before_gate=False,
        conv_without_bias=False, cuts_evenly=True, masks_padding=False,
    ),
    "vllm": Target(
        "vLLM", one_chunk=True, copies_kv=True, copies_one_group=True, pads_vocab=64,
        norm_before_gate=False, shared_across_stages=False,
    ),
    "gguf": Target("llama.cpp", shared=False, norm_before_gate=False),
    "mamba_ssm": Target(
        "the mamba-ssm library", kinds=("mamba1", "mamba2", "attention", "mlp"), sums=False, shared=False,
        mamba_kernels=True, masks_padding=False,
    ),
}
