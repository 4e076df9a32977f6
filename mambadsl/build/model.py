"""LayerGraph -> torch: the whole model, or one pipeline stage of it.

In: a graph (or the checked graph around it) and dtype, device, seed, part set, stage. Out: `Model`, whose
parameters and buffers are named as `graph.weights` names them. Refuses (MdlError) what `refuse` lists and
stages that are not the model (E904).

Letters: B batch, T time, D d_model, V vocab, L the last tokens asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.build.carried import closed, relays
from mambadsl.build.device import device as usable
from mambadsl.build.earlier import States, apart
from mambadsl.build.failure import located
from mambadsl.build.fill import fill
from mambadsl.build.init import initialise
from mambadsl.build.loss import logits_of
from mambadsl.build.losses import Losses
from mambadsl.build.machine import machine
from mambadsl.build.meta import WithMeta, ahead, packed
from mambadsl.build.refuse import problems
from mambadsl.build.residual import scaled
from mambadsl.build.stage import Stage, choose
from mambadsl.build.state import DecodingState, describe
from mambadsl.build.streams import Narrow, widen
from mambadsl.build.sublayer import Sublayer
from mambadsl.build.tail import Ahead, Depth
from mambadsl.graph.graph import LayerGraph, Node, Role
from mambadsl.graph.weights import node_weights
from mambadsl.kinds.module import Holder
from mambadsl.kinds.norm import Norm
from mambadsl.kinds.state import Room
from mambadsl.kinds.streams import final_norm
from mambadsl.kinds.tokens import Tokens
from mambadsl.plan.assign import Assignment, assign
from mambadsl.text.diagnostic import MdlError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(
    graph: Any, *, dtype: str | torch.dtype = "fp32", device: Any = "cpu", seed: int = 0,
    parts: str = "reference", plan: Any = None, stage: int | None = None,
) -> Model:
    """The torch module of a LayerGraph or CheckedGraph, with the initial values of `seed`.

    dtype: "fp32", "bf16" or a torch dtype; weights declared float32 stay so. device="meta": no memory, no
    values (`init.materialise` gives both later, the same ones). parts: a part set, or a `parts` block of the text;
    what runs where is then in `model.assignment`. stage: build this pipeline stage only, of `plan` (a Plan, or a
    list of lists of node paths), or of the text's `|` marks.

    Raises MdlError: E901 and E906 what cannot be built, E902 and E907 part sets, E904 stages. ValueError: a dtype
    that weights cannot have, a device that this machine does not.
    """
    graph = graph if isinstance(graph, LayerGraph) else graph.graph
    if found := problems(graph):
        raise MdlError(found)
    made = DTYPES.get(dtype, dtype)
    if not (isinstance(made, torch.dtype) and made.is_floating_point):
        known = ", ".join(map(repr, DTYPES))
        raise ValueError(f"dtype must be {known} or a float torch dtype, not {dtype!r}")
    place = usable(device)
    stage_of = choose(graph, plan=plan, stage=stage)
    named = next((name for name, torch_dtype in DTYPES.items() if torch_dtype == made), str(made))
    assignment = assign(graph, parts=parts, machine=machine(place), dtype=named)
    model = Model(graph, stage_of, assignment, dtype=made, device=place)
    if place.type != "meta":
        initialise(model, seed=seed)
    return model


class Model(Ahead, Losses, nn.Module):
    """A language model, or one stage of it. What its `mtp` tail does is in `Ahead`, what it is trained on in `Losses`.

    graph, stage: what it was built from. weights: path -> Weight of everything in it. assignment: which part fills
    each slot, and why.
    Weights have no values yet: `build` and `init` give them.
    """

    def __init__(
        self, graph: LayerGraph, stage: Stage, assignment: Assignment, *, dtype: torch.dtype = torch.float32,
        device: Any = None,
    ):
        super().__init__()
        self.graph, self.stage, self.assignment = graph, stage, assignment
        self.frame = fill(assignment, "model").functions
        #: Rows of the table by ids, and how many ids there are: more than rows, where ranks share the table.
        self.look_up, self.vocab = F.embedding, graph.model.vocab
        self.relays = relays(graph, stage)
        self.streams, self.blocks = graph.streams, graph.blocks
        #: What layers above give and each layer reads, by its path.
        self.taken = {node.path: tuple(graph.reads[node.path] & graph.carried) for node in stage.nodes}
        self.weights = {path: w for node in stage.nodes for path, w in node_weights(graph, node)}
        for node in stage.nodes:
            self._add(node, dtype=dtype, device=device)

    def _add(self, node: Node, **made: Any) -> None:
        model = self.graph.model
        match node.role:
            case Role.EMBED:
                self._add_table("embed", model.vocab, **made)
                self.embed_norm = Norm(model.embedding_norm, model.d_model, **self._rms(), **made)
                if model.meta_tokens:
                    self._add_table("meta", model.meta_tokens, **made)
            case Role.HEAD:
                streams = self.graph.streams[node.path].read
                self.narrow = Narrow(model, streams, **self._rms(), **made)
                self.final_norm = Norm(final_norm(model, streams), model.d_model, **self._rms(), **made)
                # A tied head reads the embedding's table; a last stage without the embedding has a copy.
                self._add_table("embed" if self.graph.tied else "head", model.vocab, **made)
            case Role.MTP_IN:
                streams = self.graph.streams[f"mtp.{node.depth}.out"].read
                self._placed(node.depth_owner, lambda: Depth(model, streams, **self._rms(), **made))
            case Role.LAYER:
                filled = tuple(fill(self.assignment, path) for path, _, _ in node.branches())
                streams = self.graph.most_streams[node.owner]
                how = dict(d_model=model.d_model, filled=filled, streams=streams, **self._rms(), **made)
                owner = self._placed(node.owner, lambda: Sublayer(node, **how))
                if node.shared:
                    self._placed(node.path, lambda: Sublayer(node, of=owner, **how))

    def _placed(self, path: str, make: Callable[[], nn.Module]) -> nn.Module:
        """The module at the path; made, and the groups on the way, if it is not there."""
        *groups, leaf = path.split(".")
        at = self
        for group in groups:
            if group not in at._modules:
                at.add_module(group, nn.ModuleDict())
            at = at._modules[group]
        if leaf not in at._modules:
            at.add_module(leaf, make())
        return at._modules[leaf]

    def _rms(self) -> dict[str, Any]:
        """What computes RMS norms, where a part does."""
        return {"rms": self.frame["norm"]} if "norm" in self.frame else {}

    def _add_table(self, name: str, rows: int, *, dtype: torch.dtype, device: Any) -> None:
        if name not in self._modules:
            holder = Holder()
            shape = rows, self.graph.model.d_model
            holder.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            self.add_module(name, holder)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights that are not declared float32."""
        named = self.tensors()
        return next((named[path].dtype for path, w in self.weights.items() if not w.fp32), torch.float32)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device

    def tensors(self) -> dict[str, Tensor]:
        """Path -> parameter or buffer, the very tensors of the modules; the keys are those of `weights`."""
        return self.state_dict(keep_vars=True)

    def forward(
        self, *inputs: Tensor, segments: Tensor | None = None, valid: Tensor | None = None,
        positions: Tensor | None = None, state: DecodingState | None = None, last: int | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Token ids [B, T] -> float32 logits [B, T, V]. A stage takes the tensors `stage.takes` names and,
        if it is not the last, gives a tuple of those `stage.gives` names; it has the same keywords.

        segments: document numbers [B, T] of packed rows, non-decreasing, negative for padding. valid: bool
        [B, T], False for padding (left, right or both). positions: [B, T] or [T], default counted in each
        document. state: from `init_state`; tokens go on from it and it moves on with them. last: logits of
        only the last so many tokens, [B, L, V]. Logits at padding mean nothing.

        Logits are float32 in any dtype of the weights: losses and sampling want them so, and the multiplier
        and the soft cap are applied after the widening.
        """
        self._check(inputs)
        if last is not None and last < 1:
            raise ValueError(f"`last` is a number of tokens, at least 1, not {last}")
        stream = self._through(inputs, segments=segments, valid=valid, positions=positions, state=state, last=last)[0]
        if self.stage.gives == ("logits",):
            return stream["logits"] if "logits" in stream else self.logits(stream["h"])
        return tuple(closed(stream[name]) for name in self.stage.gives)

    def _check(self, inputs: tuple[Any, ...]) -> None:
        if len(inputs) != len(self.stage.takes) or not all(isinstance(x, Tensor) for x in inputs):
            takes, given = ", ".join(self.stage.takes), ", ".join(type(x).__name__ for x in inputs)
            raise TypeError(f"stage {self.stage.index} takes {takes} (tensors), not {given or 'nothing'}")

    def _through(
        self, inputs: tuple[Tensor, ...], *, segments: Tensor | None, valid: Tensor | None,
        positions: Tensor | None, state: DecodingState | None = None, last: int | None = None,
    ) -> tuple[dict[str, Tensor], Tokens]:
        """The named tensors after the stage's nodes up to the head, and what the tokens are; "h" is what the head
        reads, unless a fused step has made "logits" already."""
        axes = ("batch", "time") if self.stage.takes[0] == "tokens" else ("batch", "time", "d_model")
        if inputs[0].dim() != len(axes):
            wanted = f"{self.stage.takes[0]} [{', '.join(axes)}]"
            raise ValueError(f"the first input must be {wanted}, not {list(inputs[0].shape)}")
        rows, tokens = self._rows(inputs[0], segments=segments, valid=valid, positions=positions, state=state)
        stream = dict(zip(self.stage.takes, inputs))
        for name, relay in self.relays.items():
            stream[name] = relay.opened(stream[name], rows.tokens, state)
        if "x" in stream and state is not None:
            stream["x"] = stream["x"].clone()
        if "x" in stream:
            stream["x"] = self._laid(stream["x"])
        for node in self.stage.body:
            with located(node):
                _RUN[node.role](self, node, stream, rows, state, last)
        if state is not None:
            state.advance(rows.tokens)
        return stream, tokens

    def _rows(
        self, x: Tensor, *, segments: Tensor | None, state: DecodingState | None, **what: Tensor | None
    ) -> tuple[WithMeta, Tokens]:
        """The rows as layers see them, and their tokens as the caller does. x: what the stage's first input is."""
        (B, T), count = x.shape[:2], self.graph.model.meta_tokens
        begins = count > 0 and (state is None or state.empty)
        if count and state is not None and segments is not None:
            raise ValueError("rows of a state are one document each where there are meta tokens: `valid` says padding")
        if begins and self.stage.takes[0] != "tokens":
            # Later stages get rows that have them.
            T = T - count if segments is None else segments.shape[1]
        if begins and state is not None and state.room is not None:
            state.room.check(count + T)
        tokens = describe((B, T), device=x.device, segments=segments, state=state, **what)
        if not begins:
            return WithMeta(tokens), tokens
        return (ahead if segments is None else packed)(tokens, count), tokens

    def init_state(
        self, batch: int, *, capacity: int | None = None, dtype: torch.dtype | None = None,
        state_dtype: torch.dtype = torch.float32, device: Any = None, depth: int | None = None,
    ) -> DecodingState:
        """The decoding state of `batch` rows before their first token; depth: that of one depth of `mtp`, for `ahead`.

        capacity: tokens that a row can have, padding included; all memory is taken at once, tensors are written in
        place, rows are one document each, and one token at a time goes through fused steps where parts have them.
        Without it, the state grows. dtype: of what kinds do not declare float32 (default: the model's);
        state_dtype: of what they do.
        """
        if batch < 1:
            raise ValueError(f"a batch has at least one row, not {batch}")
        if capacity is not None and capacity < 1:
            raise ValueError(f"a decoding state has room for at least one token, not {capacity}")
        room = None if capacity is None else Room(capacity + self.graph.model.meta_tokens)
        device = device or self.device
        made = dict(dtype=dtype or self.dtype, device=device, room=room, state_dtype=state_dtype)
        layers = {}
        if depth is None:
            layers = {relay.path: relay.init_state(batch, **made) for relay in self.relays.values()}
        for node, sublayer in self.sublayers():
            if node.depth != depth:
                continue
            for (path, _, _), mixer in zip(node.branches(), sublayer.mixer_modules()):
                layers[path] = mixer.init_state(batch, **made)
        return DecodingState(layers, torch.zeros(batch, dtype=torch.int64, device=device), room=room)

    def sublayers(self) -> Iterator[tuple[Node, Sublayer]]:
        """Every layer here, in order; a shared one has a sublayer for each use."""
        for node in self.stage.nodes:
            if node.role is Role.LAYER:
                yield node, self.get_submodule(node.path)

    def extra_repr(self) -> str:
        stage = f", stage {self.stage.index} of {self.stage.count}" if self.stage.count > 1 else ""
        return self.graph.name + stage

    def _embed(self, node, stream, rows, state, last) -> None:
        if stream["tokens"].dtype not in (torch.int64, torch.int32):
            raise TypeError(f"token ids must be int64 or int32, not {stream['tokens'].dtype}")
        meta_MD = self.meta.weight if self.graph.model.meta_tokens else None
        x_BTD = rows.insert(self._embedded(stream["tokens"], state), meta_MD)
        if self.stage.keeps_embedding:
            # Fused steps add to the stream in place.
            stream["x0"] = x_BTD if state is None else x_BTD.clone()
        stream["x"] = self._laid(widen(x_BTD, self.streams[node.path].given))

    def _laid(self, x_BTS: Tensor) -> Tensor | States:
        """The stream as the layers of a stage have it."""
        return apart(x_BTS, self.graph.model.d_model) if self.blocks else x_BTS

    def _embedded(self, tokens_BT: Tensor, state: DecodingState | None) -> Tensor:
        model = self.graph.model
        dtype = torch.float32 if model.residual_dtype == "fp32" else self.embed.weight.dtype
        if self._steps("embed_step", tokens_BT, state):
            how = dict(multiplier=model.embedding_multiplier, dtype=dtype)
            x_BTD = self.frame["embed_step"](tokens_BT[:, 0], self.embed.weight, **how)[:, None]
            return self.embed_norm(x_BTD, dtype=dtype)
        try:
            x_BTD = self.look_up(tokens_BT, self.embed.weight)
        except IndexError:
            low, high = tokens_BT.min().item(), tokens_BT.max().item()
            legal = f"token ids must be from 0 to {self.vocab - 1} (vocab = {self.vocab})"
            raise ValueError(f"{legal}; here they are from {low} to {high}") from None
        return self.embed_norm(scaled(x_BTD, model.embedding_multiplier), dtype=dtype)

    def _steps(self, slot: str, some_BT: Tensor, state: DecodingState | None) -> bool:
        """Whether the slot's part does one token of each row, as sublayers' steps do."""
        return (
            state is not None and slot in self.frame and state.room is not None and some_BT.shape[1] == 1
            and not torch.is_grad_enabled()
        )

    def _layer(self, node, stream, rows, state, last) -> None:
        sublayer = self.get_submodule(node.path)
        states = None if state is None else [state.layers[path] for path, _, _ in node.branches()]
        taken = {name: stream[name] for name in self.taken[node.path]}
        y_BTD = sublayer(stream["x"], stream.get("x0"), rows.tokens, states, t_BTD=stream.pop("t", None), taken=taken)
        if sublayer.gives:
            y_BTD, given = y_BTD
            stream.update(given)
        stream["t" if node.aside else "x"] = y_BTD

    def _head(self, node, stream, rows, state, last) -> None:
        stream["x"] = closed(stream["x"])
        stream |= {name: rows.strip(stream[name]) for name in ("x", "x0") if name in stream}
        x_BLD = self.narrow(stream["x"] if last is None else stream["x"][:, -last:])
        if self._steps("head_step", x_BLD, state):
            how = dict(multiplier=self.graph.model.logits_multiplier, softcap=self.graph.model.logits_softcap)
            x_BD = x_BLD[:, 0].contiguous()
            logits_BV = self.frame["head_step"](self.final_norm, x_BD, self._head_weight(), **how)
            stream["logits"] = logits_BV[:, None]
            return
        stream["h"] = self.final_norm(x_BLD, dtype=self._head_weight().dtype)

    def _head_weight(self) -> Tensor:
        return (self.embed if self.graph.tied else self.head).weight

    def logits(self, h_BLD: Tensor) -> Tensor:
        """Logits [B, L, V], float32, of what `hidden` or `ahead` gave."""
        model = self.graph.model
        how = dict(multiplier=model.logits_multiplier, softcap=model.logits_softcap)
        return logits_of(h_BLD, self._head_weight(), **how)


#: How a node of each role changes the stream of named tensors.
_RUN: dict[Role, Callable[..., None]] = {
    Role.EMBED: Model._embed, Role.LAYER: Model._layer, Role.HEAD: Model._head,
}

