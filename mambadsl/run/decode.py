"""The decoding engine: a batch of prompts, then one token of every row a step, the whole step in one CUDA graph.

In: a whole model, and sizes that stay: batch, capacity, how to sample. Out: new tokens, in blocks. A step is embedding,
every sublayer (fused where parts can, see `Sublayer.forward`), final norm, head, sampling, and the new token's way
to the next step and to the history; positions and counts are on the device, so nothing waits for the host, which reads
the history some tokens behind. Without CUDA the same code runs eagerly. Refuses (ValueError) another number of
prompts, more tokens than the capacity, layers that cannot be captured.

Letters: B batch, T time, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mambadsl.build.model import Model
from mambadsl.run.prompts import check_count, check_model, padded, read_prompts
from mambadsl.run.sample import Sampling, draw, uniforms
from mambadsl.run.stop import Generated, Step, Stop, Writing, gather, stops_of

#: The host reads so many tokens at once, at most; the first blocks are shorter.
BLOCK = 16
#: Steps before the capture: kernels are compiled and tuned, workspaces made.
WARM_UP = 2


class Decoder:
    """A batch of rows that are decoded together.

        with Decoder(model, batch=2, capacity=256) as decoder:
            decoder.prefill([[1, 2, 3], [4]])
            texts = decoder.run(100)

    capacity: tokens of a row, prompt included (padded to the longest), the last new one not. prefill_chunk: prompts are
    read so many tokens at a time. temperature, top_k, top_p: as in `Sampling`. state_dtype: of what layers keep in
    float32 unless asked otherwise. graph: one CUDA graph a step; None: on CUDA, unless a layer cannot. captures: how
    often that was made: once here, and never again, whatever the prompts.

    The graph reads the weights where they were: writing into them is fine, moving or replacing them is not.
    """

    def __init__(
        self, model: Model, *, batch: int, capacity: int, prefill_chunk: int = 2048, temperature: float = 0.0,
        top_k: int | None = None, top_p: float | None = None, state_dtype: torch.dtype | None = None,
        graph: bool | None = None,
    ):
        check_model(model)
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1, not {prefill_chunk}")
        self.model, self.batch, self.prefill_chunk = model, batch, prefill_chunk
        self.sampling = Sampling(temperature, top_k, top_p)
        self.state = model.init_state(batch, capacity=capacity, state_dtype=state_dtype or torch.float32)
        device = model.device
        self.token_B = torch.zeros(batch, dtype=torch.int64, device=device)
        #: Tokens written so far, on the device and on the host; tokens that the caller has.
        self.written_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.written = self.given = 0
        self.history_TB = torch.zeros((capacity, batch), dtype=torch.int64, device=device)
        self.host_TB = torch.zeros_like(self.history_TB, device="cpu", pin_memory=device.type == "cuda")
        #: Writes the most likely tokens, where a part does.
        self.next_token = None if temperature else model.frame.get("next_token")
        self.uniform_TB = None
        if temperature:
            self.uniform_TB = torch.zeros((capacity, batch), dtype=torch.float64, device=device)
        self.graph, self.captures = None, 0
        if graph if graph is not None else device.type == "cuda" and not obstacles(model):
            self._capture()

    @property
    def capacity(self) -> int:
        return self.state.room.capacity - self.model.graph.model.meta_tokens

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], *, seed: int = 0) -> None:
        """Reads the prompts, after which everything of earlier ones is gone, and samples each row's first token.
        seed: of the draws; row i draws the same whatever the other rows are."""
        read = read_prompts(prompts, vocab=self.model.graph.model.vocab)
        if len(read) != self.batch:
            raise ValueError(f"the decoder is for a batch of {self.batch}, not of {len(read)}")
        T = max(map(len, read))
        if T > self.capacity:
            raise ValueError(f"a prompt of {T} tokens does not fit into a capacity of {self.capacity}")
        tokens_BT, valid_BT = padded(read, device=self.model.device)
        self._clear()
        if self.uniform_TB is not None:
            self.uniform_TB.copy_(uniforms(self.batch, self.capacity, seed=seed))
        # From here on no row has padding.
        full = T - min(map(len, read))
        with _evaluating(self.model):
            for start in range(0, T, self.prefill_chunk):
                chunk = slice(start, start + self.prefill_chunk)
                valid = None if start >= full else valid_BT[:, chunk]
                logits_B1V = self.model(tokens_BT[:, chunk], valid=valid, state=self.state, last=1)
        self._write(logits_B1V[:, -1])
        self.written = 1

    def run(
        self, max_tokens: int, *, stop: Stop = (), stream: Callable[[Step], None] | None = None
    ) -> list[Generated]:
        """The next ids of each row, at most `max_tokens`. stop, stream: as in `generate`. A row that has stopped
        goes on unheard until all have, or `max_tokens`; `prefill` comes next."""
        lines = self.steps(max_tokens, stop=stop)
        return gather(lines, rows=self.batch, stops=stops_of(stop), stream=stream)

    def steps(self, max_tokens: int, *, stop: Stop = ()) -> Iterator[Step]:
        """Every new token of every row, as it comes."""
        check_count(max_tokens)
        writing = Writing(self.batch, max_tokens=max_tokens, stops=stops_of(stop))
        for block_TB in self.blocks(max_tokens):
            for token_B in block_TB.tolist():
                yield from writing.take(token_B.__getitem__)
                if not writing.running:
                    return

    def blocks(self, count: int, *, block: int = BLOCK) -> Iterator[Tensor]:
        """The next `count` tokens of every row, [t, B] on the CPU, at most `block` at a time. While the caller looks at
        one block the device computes the next."""
        if not self.written:
            raise ValueError("there is nothing to go on from: `prefill` comes first")
        self.state.room.check(self.given + count - self.written)
        return self._blocks(self.given + count, block)

    def _blocks(self, end: int, block: int) -> Iterator[Tensor]:
        start, size, ahead = self.given, 1, None
        while start < end:
            stop = min(start + size, end)
            self._advance(stop - self.written)
            begun = self._fetch(start, stop)
            if ahead is not None:
                yield self._take(*ahead)
            ahead, start, size = begun, stop, min(2 * size, block)
        if ahead is not None:
            yield self._take(*ahead)

    def close(self) -> None:
        """Gives the graph's memory and the state back; the decoder is of no more use."""
        if self.graph is not None:
            self.graph.reset()
        self.graph = self.state = self.history_TB = self.host_TB = self.uniform_TB = None
        self.written = 0

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _step(self) -> None:
        """One token of every row: what the graph holds."""
        logits_B1V = self.model(self.token_B[:, None], state=self.state, last=1)
        self._write(logits_B1V[:, -1])

    def _write(self, logits_BV: Tensor) -> None:
        if self.next_token is not None:
            self.next_token(logits_BV, self.token_B, self.history_TB, self.written_1)
            return
        uniform_B = None if self.uniform_TB is None else self.uniform_TB.index_select(0, self.written_1)[0]
        self.token_B.copy_(draw(logits_BV, self.sampling, uniform_B))
        self.history_TB.index_copy_(0, self.written_1, self.token_B[None])
        self.written_1.add_(1)

    @torch.no_grad()
    def _advance(self, count: int) -> None:
        room = self.state.room
        with _evaluating(self.model):
            for _ in range(count):
                if self.graph is None:
                    self._step()
                else:
                    self.graph.replay()
                    room.used += 1
                self.written += 1

    def _fetch(self, start: int, stop: int) -> tuple[int, int, Any]:
        """Tokens from `start` to `stop` on their way to the host, and when they are there."""
        self.host_TB[start:stop].copy_(self.history_TB[start:stop], non_blocking=True)
        there = None
        if self.history_TB.is_cuda:
            there = torch.cuda.Event()
            there.record()
        return start, stop, there

    def _take(self, start: int, stop: int, there: Any) -> Tensor:
        if there is not None:
            there.synchronize()
        self.given = stop
        return self.host_TB[start:stop].clone()

    def _clear(self) -> None:
        self.state.clear()
        self.written_1.zero_()
        self.written = self.given = 0

    @torch.no_grad()
    def _capture(self) -> None:
        if self.model.device.type != "cuda":
            raise ValueError("a CUDA graph needs a model on a CUDA device")
        if found := obstacles(self.model):
            raise ValueError(f"no CUDA graph can hold a step: {'; '.join(found)}")
        if self.capacity == 1:
            # A prompt of one token fills it: there is no step.
            return
        with torch.cuda.device(self.model.device), _evaluating(self.model):
            side = _side_stream(self.model.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self._stand_after_one()
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            self._stand_after_one()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                self._step()
            self.graph, self.captures = graph, self.captures + 1
        self._clear()

    def _stand_after_one(self) -> None:
        """As after a prompt of one token, whose values do not matter: no layer may take the step for a first chunk."""
        self._clear()
        self.state.room.used = 1


def obstacles(model: Model) -> list[str]:
    """Why a step of the model cannot be captured: functions of layers that wait for the device. The `mtp` tail is not
    in it."""
    found = [
        f"`{node.layer.label}`: {mixer.kind.name}.{slot} waits for the device"
        for node, sublayer in model.sublayers()
        if not node.tail
        for mixer in sublayer.mixer_modules()
        for slot in mixer.waiting
    ]
    return list(dict.fromkeys(found))


@cache
def _side_stream(device: torch.device) -> Any:
    """One for all decoders: libraries keep a workspace for each stream that they have seen."""
    return torch.cuda.Stream(device)


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
