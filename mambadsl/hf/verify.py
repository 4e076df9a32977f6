"""A model of ours beside the same one of Hugging Face's: the stream after each layer, and the logits.

Both in float32 with the same weights and tokens, without cache, eager attention and experts. `time_step_limit` is what
the configuration says, also where the class of transformers puts another one in its place (Nemotron-H, Zamba2); what a
folder holds also counts where loading it puts other numbers there (Zaya). RWKV's stream is not halved every so many
layers, which half precision needs.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambadsl.adapt.files import Files
from mambadsl.adapt.same import differences
from mambadsl.build.checkpoint import load_weights
from mambadsl.build.model import Model, build
from mambadsl.compile import Program
from mambadsl.hf.config import E610, read
from mambadsl.hf.exporter import E614
from mambadsl.hf.importer import Imported, import_settings
from mambadsl.hf.weights import Source
from mambadsl.text.diagnostic import Diagnostic, MdlError

#: Largest difference over the root mean square, of a stream or of logits, that is rounding still. Deep models with
#: delta rules come to a tenth of it; what is computed otherwise is a hundred times more.
TOLERANCE = 1e-3
#: Packages whose kernels transformers would take instead of torch, whatever the device.
KERNELS = ("mamba_ssm", "causal_conv1d", "fla", "kernels", "mambapy")
_BLOCK = re.compile(r"(layers|blocks)\.(\d+)(\.|$)")


@dataclass(frozen=True)
class Compared:
    """at: our path (`embed`, `stack.3`, `logits`); theirs: their module. difference: the largest, over the root mean
    square of theirs."""

    at: str
    theirs: str
    difference: float

    @property
    def same(self) -> bool:
        return self.difference <= TOLERANCE


@dataclass(frozen=True)
class Verified:
    """rows: in order, the logits last. random: the folder had no tensors, so both had the same random ones. notes: what
    was set in their model."""

    rows: tuple[Compared, ...]
    random: bool
    notes: tuple[str, ...]

    @property
    def same(self) -> bool:
        return self.rows[-1].same

    @property
    def first(self) -> Compared | None:
        """The first that differs."""
        return next((row for row in self.rows if not row.same), None)


def verify_hf(
    program: Program, folder: str | Path, *, weights: str | Path | None = None, length: int = 48, seed: int = 0
) -> Verified:
    """weights: a folder of ours (default: those of `folder`). Raises MdlError where the two are not the same model."""
    settings = read(folder)
    imported = import_settings(settings, name=program.layers.name, tail=program.layers.mtp is not None)
    if found := list(differences(program.layers, imported.graph)):
        message = f"`{program.layers.name}` is not the model in `{folder}`"
        raise MdlError([Diagnostic(E614, message, notes=tuple(text for text, _ in found[:12]))])
    place = Path(folder) if Path(folder).is_dir() else Path(folder).parent
    random = not any(place.glob("*.safetensors")) and not any(place.glob("*.bin"))
    with tempfile.TemporaryDirectory() as scratch:
        theirs, notes = _theirs(settings.config, None if random else place, seed=seed)
        if random:
            theirs.save_pretrained(scratch)
        ours = build(program.checked)
        if weights is not None:
            load_weights(ours, weights)
        else:
            source = Source(imported, scratch if random else place)
            ours.load_state_dict({path: source.read(path) for path in ours.weights})
        return Verified(_compare(ours.eval(), theirs, imported, length=length, seed=seed), random, notes)


def _theirs(config: Any, folder: Path | None, *, seed: int) -> tuple[Any, tuple[str, ...]]:
    for name in KERNELS:
        sys.modules.setdefault(name, None)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    auto = transformers.AutoModelForCausalLM
    try:
        if folder is not None:
            model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        else:
            torch.manual_seed(seed)
            model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
    except (OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:300]
        raise MdlError([Diagnostic(E610, f"transformers does not load the model: {why}")]) from None
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    if folder is None:
        _shake(model, seed=seed)
    as_saved = () if folder is None else _as_saved(model, folder)
    return model.eval(), (*as_saved, *_without_floors(model, config), *_without_halving(model.config))


def _shake(model: Any, *, seed: int) -> None:
    """Norms of 1 and biases of 0 would hide where they go."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if parameter.dim() < 2 else 0.5 * parameter.shape[-1] ** -0.5))


def _as_saved(model: Any, folder: Path) -> Iterator[str]:
    """Zaya's class sets the last of a router's biases anew after it has loaded them."""
    files, changed = Files(folder), []
    for name, buffer in model.named_buffers():
        if name in files.shapes and not torch.equal(buffer, saved := files.get(name).to(buffer)):
            buffer.copy_(saved)
            changed.append(name)
    if changed:
        yield f"{len(changed)} tensors like {changed[0]} are the folder's, which loading changes"


def _without_floors(model: Any, config: Any) -> Iterator[str]:
    wanted = tuple(getattr(config, "time_step_limit", None) or (0.0, float("inf")))
    changed = [m for m in model.modules() if tuple(getattr(m, "time_step_limit", None) or wanted) != wanted]
    for module in changed:
        module.time_step_limit = wanted
    if changed:
        yield f"time_step_limit is {wanted} in {len(changed)} layers of theirs, as the configuration says"


def _without_halving(config: Any) -> Iterator[str]:
    if getattr(config, "rescale_every", 0) > 0:
        config.rescale_every = 0
        yield "rescale_every is 0 in theirs"


def _compare(ours: Model, theirs: Any, imported: Imported, *, length: int, seed: int) -> tuple[Compared, ...]:
    vocab = imported.graph.model.vocab
    tokens = torch.randint(0, vocab, (2, length), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(length).expand(2, -1)
    blocks = {path: number for path, at in imported.at.items() if (number := _number(at)) is not None}
    # After the last of our layers in each block of theirs.
    ends = {number: path for path, number in blocks.items()}
    named = {_number(name): (name, m) for name, m in theirs.named_modules() if _ends(name)}
    with torch.no_grad(), _outputs({n: m for n, (_, m) in named.items()}) as their_stream:
        inputs = dict(input_ids=tokens, use_cache=False)
        try:
            their_logits = theirs(**inputs, position_ids=positions).logits
        except TypeError:
            their_logits = theirs(**inputs).logits
    modules = {node.path: ours.get_submodule(node.owner) for node in ours.graph.layers if not node.shared}
    with torch.no_grad(), _outputs(modules) as our_stream:
        our_logits = ours(tokens)
    rows = [
        Compared(path, named[n][0], _apart(our_stream[path], their_stream[n]))
        for n, path in ends.items() if n in their_stream and path in our_stream
    ]
    return (*rows, Compared("logits", "lm_head", _apart(our_logits, their_logits)))


def _number(path: str) -> int | None:
    found = _BLOCK.search(path)
    return int(found.group(2)) if found else None


def _ends(name: str) -> bool:
    found = _BLOCK.search(name)
    return found is not None and found.end() == len(name)


@contextmanager
def _outputs(modules: dict[Any, Any]) -> Iterator[dict[Any, Tensor]]:
    """What each module gives, filled in while it runs."""
    found: dict[Any, Tensor] = {}

    def keep(key: Any) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            found[key] = (output[0] if isinstance(output, tuple) else output).float()

        return hook

    handles = [module.register_forward_hook(keep(key)) for key, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().square().mean().sqrt()).item()
