"""LayerGraph -> CheckedGraph, or MdlError with everything that is wrong.

A rule is a file here with `check(subject)`, and its place in one of the three lists:

- MODEL rules speak about the model, whatever is known of a run.
- RUN rules speak about the facts of a run, and are asked only if one is given.
- KERNEL rules speak about what mamba-ssm's and causal-conv1d's kernels accept, and only if those will run: a
  part set is named that has them first for a kind of the model (`fused` for Mamba-1's scan, say), or a block of the
  text names one, or the target has no other way. Under `auto` they are silent, since it chooses a kernel only
  where the kernel accepts the layer; under `reference` there is none.

So a plain `check` says what is wrong with the model anywhere, and facts add what is wrong there. Each rule's
severity is its code's first letter and never depends on facts. Rules are imported when they are asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import InitVar, dataclass
from importlib import import_module
from types import ModuleType

from mambadsl.graph.checks.facts import Facts
from mambadsl.graph.checks.subject import Problem, Subject, with_uses
from mambadsl.graph.graph import LayerGraph, Node
from mambadsl.text.diagnostic import Diagnostic, MdlError

MODEL = (
    # sizes of one layer
    "e101_head_dim", "e103_groups", "e124_norm_groups", "e125_dt_limit", "e304_init_ranges",
    "e204_attention_heads", "e208_key_heads", "e209_gate_blocks", "e215_scan_heads", "e216_head_dim",
    "e217_rope_width", "e218_rope_scaling", "e220_experts",
    # the whole
    "w505_lora_coverage", "w701_positions", "i702_first_attention", "i704_attention_share", "i705_last_mixer",
    "e706_aside", "e707_taken", "e710_streams", "e711_taken_keys", "e712_keep", "e713_blocks",
    # what the text itself claims
    "expects", "i052_unchecked", "w029_unused",
)
RUN = (
    # devices
    "e201_heads_tp", "e202_groups_tp", "e203_context_parallel", "e205_kv_heads_tp", "e206_vocab_tp",
    "e207_attention_cp", "e210_even_stages", "w211_stage_mix", "e214_shared_stages",
    # numbers, data, serving
    "w305_fp16", "e310_narrow_products", "w404_left_padding", "w501_cache_pages", "e502_state_memory",
    "w504_prefill_chunk",
    # other tools
    "e601_expressible", "w602_gated_norm", "w110_one_chunk", "w112_conv_bias",
)
KERNEL = (
    "e104_conv_width", "e105_projection_width", "e106_conv_taps", "e107_conv_grid", "e108_mamba1_state",
    "w109_chunk", "e114_norm_width", "e120_offsets", "e121_mamba1_offsets", "w122_row_offsets",
    "i707_small_width",
)
CHECKS = MODEL + RUN + KERNEL

#: The model alone, on one device, in bf16.
NO_FACTS = Facts()

#: One rule reports no more different problems than this, so that looking takes no time.
MAX_REPORTED = 50

_SEVERITIES = ("error", "warning", "info")
_SEAL = object()


@dataclass(frozen=True, eq=False)
class CheckedGraph:
    """A graph without errors under these facts, and the warnings and infos. Only `check` makes one."""

    graph: LayerGraph
    facts: Facts
    diagnostics: tuple[Diagnostic, ...]
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("a CheckedGraph comes from check(graph) only")


def check(graph: LayerGraph, facts: Facts = NO_FACTS) -> CheckedGraph:
    """Runs every rule. Raises MdlError with all errors, then the warnings and infos, if there is an error."""
    if not isinstance(facts, Facts):
        raise TypeError(f"facts are mambadsl.Facts(...), not {type(facts).__name__}")
    subject = Subject(graph, facts)
    found: dict[Diagnostic, list[Node]] = {}
    names = MODEL + (RUN if facts != NO_FACTS else ()) + (KERNEL if subject.kernels else ())
    for rule in rules(names):
        enough = len(found) + MAX_REPORTED
        for problem in rule.check(subject):
            found.setdefault(problem.diagnostic, []).extend(problem.nodes)
            if len(found) >= enough:
                break
    diagnostics = [with_uses(diagnostic, nodes) for diagnostic, nodes in found.items()]
    diagnostics.sort(key=lambda d: _SEVERITIES.index(d.severity))
    if any(d.severity == "error" for d in diagnostics):
        raise MdlError(diagnostics)
    return CheckedGraph(graph, facts, tuple(diagnostics), _SEAL)


def rules(names: tuple[str, ...] = CHECKS) -> Iterator[ModuleType]:
    """The rules of these names, in order."""
    for name in names:
        yield import_module(f"{__name__}.{name}")


__all__ = ["CHECKS", "CheckedGraph", "Facts", "Problem", "Subject", "check", "rules"]
