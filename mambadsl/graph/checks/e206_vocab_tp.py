"""E206, W206: the embedding table's rows under tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import listed, multiples_near
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import Diagnostic, declare

E206 = declare(
    "E206",
    "the vocabulary does not divide among devices",
    """
    Tensor parallelism over `tp` devices splits the embedding table and the head by rows, so tp must divide
    `vocab`. (Tools that add rows by themselves get W206.)

    Why: shards of unequal size do not fit the collectives that join them.

    Example: `vocab = 50257` with tp=8.

    Instead: `vocab = 50264`; the rows added are never looked up, and their logits are to be masked.
    """,
)
W206 = declare(
    "W206",
    "the vocabulary will be padded",
    """
    For targets that pad the embedding table to a multiple of so many rows a device (Megatron 128, vLLM 64):
    `vocab` is no such multiple.

    Why: checkpoints then hold more rows than the tokenizer has tokens; an exporter has to know the true
    number, and sampling has to mask the rest.

    Example: `vocab = 50257` with tp=8 and the target `megatron`: padded to 51,200.

    Instead: write the padded number where a checkpoint that has it is to be loaded.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    facts, vocab = subject.facts, subject.graph.model.vocab
    if facts.tp == 1:
        return
    span = subject.setting("vocab")
    if facts.tool.pads_vocab is None:
        if vocab % facts.tp:
            near = listed((f"vocab = {n}" for n in multiples_near(vocab, facts.tp)), word="or")
            message = "`vocab` must be a multiple of the tensor-parallel size"
            label = f"{vocab:,} rows cannot be split over {facts.tp} devices"
            notes = () if span else (label,)
            yield Problem(Diagnostic(E206, message, span, label, notes=notes, help=(near,)))
        return
    multiple = facts.tool.pads_vocab * facts.tp
    if vocab % multiple:
        padded = -(-vocab // multiple) * multiple
        message = f"`vocab` is padded to {padded:,} rows, a multiple of {facts.tool.pads_vocab} * {facts.tp}"
        label = f"{padded - vocab:,} rows more than {vocab:,}"
        notes, help = () if span else (label,), ("export with the true number of tokens",)
        yield Problem(Diagnostic(W206, message, span, label, notes=notes, help=help))
