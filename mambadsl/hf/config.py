"""A model's config.json, with the place of every setting in it, and a record of which were asked for.

In: a folder or a file. Out: `Settings`, over the configuration class of transformers (which knows each family's
defaults and older spellings). What no reader asked for can be listed, so that nothing is dropped without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mambadsl.text.diagnostic import Diagnostic, MdlError, declare
from mambadsl.text.source import MAX_BYTES, Source, Span, from_bytes
from mambadsl.text.spell import nearest

E610 = declare(
    "E610",
    "no model of Hugging Face's",
    """
    A folder of Hugging Face's has a `config.json` whose `model_type` says which family the model is of. The message
    says what is missing, or which families are known. Reading it needs the transformers library, which
    has each family's defaults: pip install 'mambadsl[hf]'.
    """,
)
E611 = declare(
    "E611",
    "a setting that has no counterpart",
    """
    The configuration asks for something that mambadsl's layers do not do, so the imported model would compute
    something else. The caret is on the setting; the message says which values have a counterpart.
    """,
)
W612 = declare(
    "W612",
    "a setting that was not looked at",
    """
    Nothing in the imported model follows from this setting, and it is not one of those that are known to change
    nothing that a model computes (tokens' numbers, initial values, how Hugging Face runs it). It may be new, of another
    library, or misspelt. It is kept beside the weights, and `export hf` gives it back.
    """,
)

#: Settings that change nothing that a trained model computes.
NEUTRAL = frozenset(
    # what it is, and for whom
    "model_type architectures auto_map transformers_version _name_or_path torch_dtype dtype name_or_path "
    # tokens
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id "
    # how it is run
    "use_cache use_mamba_kernels use_mambapy use_associative_scan num_logits_to_keep return_dict output_attentions "
    "output_hidden_states output_router_logits mamba_ssm_cache_dtype moe_shared_expert_overlap attn_implementation "
    "_attn_implementation pretraining_tp is_encoder_decoder chunk_size_feed_forward use_bfloat16 torchscript "
    # initial values and training losses
    "initializer_range rescale_prenorm_residual time_step_scale time_step_init_scheme router_aux_loss_coef "
    "z_loss_coefficient w_init_variance_scale final_w_init_variance_scale router_jitter_noise initializer_cfg "
    # labels of classifiers
    "id2label label2id problem_type finetuning_task task_specific_params".split()
)


class Settings:
    """`settings.hidden_size` reads a value and records that. given: what the file itself says. inside: the model_type
    of a larger model that these are the text model's settings of."""

    def __init__(
        self, config: Any, *, source: Source | None = None, given: Mapping[str, Any] | None = None, inside: str = ""
    ):
        self.config, self.source, self.inside = config, source, inside
        self.given = dict(given if given is not None else config.to_dict())
        self.asked: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.asked |= {name, self.config.attribute_map.get(name, name)}
        return getattr(self.config, name)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name) if hasattr(self.config, name) else default

    def span(self, name: str) -> Span | None:
        """Where the file sets it."""
        return _place(self.source, name)

    def ignored(self) -> Iterator[Diagnostic]:
        """What nobody asked for, changes something perhaps, and is not as it always is."""
        if self.inside:
            message = f"only the text model of the `{self.inside}` is imported"
            yield Diagnostic(W612, message, self.span("text_config"))
        usual = type(self.config)().to_dict()
        known = {theirs: name for name, theirs in self.config.attribute_map.items()}
        for name, value in self.given.items():
            if name in self.asked or known.get(name) in self.asked or name in NEUTRAL or value is None:
                continue
            if name not in usual:
                near = nearest(name, usual)
                help = (f"did you mean `{near}`?",) if near else ()
                message = f"`{name}` is no setting that {type(self.config).__name__} has"
                yield Diagnostic(W612, message, self.span(name), help=help)
            elif value != usual[name]:
                message = f"`{name}` is not looked at; usually it is {json.dumps(usual[name])}"
                yield Diagnostic(W612, message, self.span(name))


def read(path: str | Path) -> Settings:
    """The settings in a folder, or in a file like config.json. Raises MdlError (E610)."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        what = f"the folder `{path}` has no config.json" if path.is_dir() else f"there is no file `{path}`"
        raise MdlError([Diagnostic(E610, what, help=("give a model's folder, or its config.json",))])
    try:
        with file.open("rb") as opened:
            source = from_bytes(opened.read(MAX_BYTES + 1), name=str(file), path=file)
        given = json.loads(source.text, object_hook=_special)
    except (ValueError, RecursionError) as error:
        at = getattr(error, "pos", None)
        span = Span(source, min(at, len(source.text)), min(at + 1, len(source.text))) if at is not None else None
        raise MdlError([Diagnostic(E610, f"`{file}` is not JSON: {getattr(error, 'msg', error)}", span)]) from None
    except OSError as error:
        raise MdlError([Diagnostic(E610, f"`{file}` cannot be read: {error.strerror or error}")]) from None
    if not isinstance(given, dict):
        raise MdlError([Diagnostic(E610, f"`{file}` holds no settings, but {type(given).__name__}")])
    return from_dict(given, source=source)


def from_dict(given: Mapping[str, Any], *, source: Source | None = None) -> Settings:
    """Settings from a configuration's values, as config.json has them. Raises MdlError (E610)."""
    model_type = given.get("model_type")
    place = _place(source, "model_type")
    if not isinstance(model_type, str):
        if "model_type" not in given and (own := _own(given)) is not None:
            return Settings(own, source=source, given=given)
        raise MdlError([Diagnostic(E610, "the configuration has no `model_type`", place)])
    text = given.get("text_config")
    if isinstance(text, dict) and _is_ours(text.get("model_type")) and not _is_ours(model_type):
        inner = from_dict(text, source=source)
        return Settings(inner.config, source=source, given=text, inside=model_type)
    mapping = _classes()
    if model_type not in mapping:
        from mambadsl.hf.family import names

        near = nearest(model_type, names())
        help = ((f"did you mean `{near}`?",) if near else ()) + ("known: " + ", ".join(names()),)
        message = f"transformers knows no `model_type` `{model_type}`"
        raise MdlError([Diagnostic(E610, message, place, help=help)])
    try:
        config = mapping[model_type].from_dict(dict(given))
    except Exception as error:
        message = f"transformers does not take the configuration: {' '.join(str(error).split())[:300]}"
        raise MdlError([Diagnostic(E610, message, place)]) from None
    return Settings(config, source=source, given=given)


def _is_ours(model_type: Any) -> bool:
    from mambadsl.hf.family import names

    return model_type in names()


def _own(given: Mapping[str, Any]) -> Any:
    """A configuration of a family that is not transformers'."""
    from mambadsl.hf.family import families

    found = (family.config(given) for family in families().values() if family.config)
    return next((config for config in found if config is not None), None)


def _special(value: dict) -> Any:
    """What JSON has no number for, as transformers writes it: {"__float__": "Infinity"}."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def config_class(model_type: str) -> Any:
    """transformers' class of configurations."""
    return _classes()[model_type]


def _place(source: Source | None, name: str) -> Span | None:
    found = re.search(rf'"{re.escape(name)}"\s*:\s*[^\n]*', source.text) if source is not None else None
    return Span(source, found.start(), found.end() - found.group().endswith(",")) if found else None


def _classes() -> Any:
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from transformers import CONFIG_MAPPING
    except ImportError as error:
        message = f"transformers is needed to read it, and cannot be had: {error}"
        raise MdlError([Diagnostic(E610, message, help=("pip install 'mambadsl[hf]'",))]) from None
    return CONFIG_MAPPING
