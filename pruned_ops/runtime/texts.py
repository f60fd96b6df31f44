"""`encode` and `predict` of optimised sentence-transformers models, in batches of a bounded number of tokens.

sentence-transformers sorts texts by length, tokenizes them, pools and normalises, and all of that stays its
own. Two methods on the instance come before its own: one lets it tokenize more texts at once than its
`batch_size`, the other, its forward, cuts what was tokenized into batches of like lengths. `restore` takes
both away. The library itself is never imported here: a model of it brings it along.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruned_ops.files import shown
from pruned_ops.runtime.batch_runner import LOOK_AHEAD, TOKENS_ON_A_CPU, TOKENS_ON_A_GPU, token_batches
from pruned_ops.runtime.packed_encoder import packed_encoders

_LIBRARY = "sentence_transformers"
# The models whose texts are cut, with the method that they offer and the output that it reads.
_MODELS = (
    ("SparseEncoder", "encode", "sentence_embedding"),
    ("CrossEncoder", "predict", "scores"),
    ("SentenceTransformer", "encode", "sentence_embedding"),
)
_INSIDE = "_inference"  # since 6.0 the part of both methods that worker processes call, too
_FLATTENS = "can_flatten_inputs"
_FLATTENED = "_pruned_ops_flattened"
# At most so many texts are tokenized at once, and padded to the longest of them.
_TEXTS_AT_ONCE = 1024
_EXPANSIONS = ("query_expansion", "do_query_expansion")  # what fills up a ColBERT's queries
_CHARACTERS_PER_TOKEN = 4  # of English text, about; batches are bounded by tokens whatever it really is
# A masked language model writes a row of the vocabulary for each token.
_TOKENS_OF_WIDE_OUTPUTS = 1024

_RUNNING = threading.local()  # .cut: what the `encode` or `predict` that runs in this thread asked for


@dataclass(frozen=True)
class _Kind:
    """What `encode` or `predict` is called here. output: the key of what it reads from the forward."""

    name: str
    method: str
    output: str


@dataclass(frozen=True)
class _Cut:
    """The forward of `model` is cut into batches of so many tokens, and only `output` is put together."""

    model: nn.Module
    output: str
    tokens: int


def text_model(model: Any) -> _Kind | None:
    """The kind of a model of sentence-transformers whose texts are cut; None for another model."""
    library = sys.modules.get(_LIBRARY)
    for name, method, output in _MODELS:
        known = getattr(library, name, None)
        if isinstance(known, type) and isinstance(model, known):
            inside = hasattr(known, _INSIDE)
            # Before 5.4 a CrossEncoder calls its inner model, and there is no forward of its own to cut.
            if name == "CrossEncoder" and not (inside or hasattr(known, "preprocess")):
                return None
            return _Kind(name, _INSIDE if inside else method, output)
    return None


def library_class(settings: Mapping[str, Any], path: Path) -> str:
    """The class of sentence-transformers whose model was saved with these settings, which the file at `path`
    holds. ValueError for one that is not known here: another class would load it with a mean pooling in place
    of its own modules."""
    name, known = settings.get("model_type") or "SentenceTransformer", [name for name, *_ in _MODELS]
    if name not in known:
        raise ValueError(f"{path} says that it is a {shown(name)}; known are {', '.join(known)}")
    return name


def refuse_expansion(module: nn.Module) -> str | None:
    """Why a module cannot run around an optimised encoder that is of a ColBERT, and scores what its encoder
    sees as padding; None for any other module. By default ColBERT's queries are filled up with tokens whose
    attention_mask is 0, and the states of these tokens are scored; an optimised encoder has 0 there. Models
    of sentence-transformers and of PyLate say so in their attributes."""
    expansion = getattr(module, "query_expansion", None)
    if isinstance(expansion, Mapping) and not expansion.get("attend"):
        setting = 'query_expansion with "attend": True'
    elif getattr(module, "do_query_expansion", None) is True and not getattr(
        module, "attend_to_expansion_tokens", False
    ):
        setting = "attend_to_expansion_tokens to True"
    else:
        return None
    return (
        "the tokens that fill up its queries have attention_mask 0, and their embeddings are scored, which "
        f"an optimised encoder does not compute: set {setting} if it was trained so, or leave it as it is"
    )


def _check_expansion(module: nn.Module) -> None:
    """ValueError where queries were set to be filled up after `optimize`, which refuses it."""
    refusal = refuse_expansion(module)
    if refusal is not None:
        raise ValueError(f"this {type(module).__name__} was changed after optimize: {refusal}")


def hook_texts(model: nn.Module) -> None:
    """Put the two methods on every model of sentence-transformers in `model`, and a forward that checks it
    on every module that may be set to fill up queries. A forward of the user's own stays, and its texts are
    not cut. The encoders inside run packed in any case."""
    for module in model.modules():
        kind = text_model(module)
        if kind is not None and not {kind.method, "forward"} & set(vars(module)):
            module.__dict__[kind.method] = partial(_run_texts, module, kind)
            module.__dict__["forward"] = partial(_forward, module)
        elif any(hasattr(module, name) for name in _EXPANSIONS) and "forward" not in vars(module):
            module.__dict__["forward"] = partial(_checked_forward, module)
        if vars(module).get(_FLATTENS):  # for flash attention without padding, which is not there already
            module.__dict__[_FLATTENED] = module.__dict__[_FLATTENS]
            module.__dict__[_FLATTENS] = False


def unhook_texts(model: nn.Module) -> None:
    """Undo `hook_texts`."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, partial) and value.func in (_run_texts, _forward, _checked_forward):
                del module.__dict__[name]
        if _FLATTENED in vars(module):
            module.__dict__[_FLATTENS] = module.__dict__.pop(_FLATTENED)


def text_batches(model: nn.Module, texts: Sequence[Any]) -> list[dict[str, Any]]:
    """What the forward of a model of sentence-transformers takes, of texts (or pairs of them), a few batches
    of like lengths.

    Errors: ValueError for another model, and where one of the texts is no text."""
    if text_model(model) is None:
        raise ValueError(
            f"texts are for models of sentence-transformers, and a {type(model).__name__} has no tokenizer: "
            "give batches of its arguments"
        )
    prepare: Any = getattr(model, "preprocess", None) or model.tokenize
    for number, text in enumerate(texts):
        parts = [text] if isinstance(text, str) else text
        if not isinstance(parts, (tuple, list)) or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"text {number} is a {type(text).__name__}; a text or a pair of texts is needed")
    ordered = sorted(texts, key=_characters, reverse=True)
    at_once = 32
    return [dict(prepare(ordered[i : i + at_once])) for i in range(0, len(ordered), at_once)]


def tokenized_batches(
    tokenizer: Any, texts: Sequence[str | tuple[str, str]], longest: int, at_once: int
) -> list[dict[str, Tensor]]:
    """Texts, or pairs of them, in their order as padded batches of so many, cut to `longest` tokens."""
    batches = []
    for start in range(0, len(texts), at_once):
        pairs = [(text, None) if isinstance(text, str) else text for text in texts[start : start + at_once]]
        first, second = (list(part) for part in zip(*pairs, strict=True))
        others = None if all(part is None for part in second) else [part or "" for part in second]
        encoded = tokenizer(
            first, others, truncation=True, max_length=longest, padding=True, return_tensors="pt"
        )
        batches.append(dict(encoded))
    return batches


def text_outputs(model: nn.Module, features: Mapping[str, Any]) -> Tensor:
    """What `encode` or `predict` would read from the forward on these features, as a dense tensor."""
    kind = text_model(model)
    assert kind is not None
    device = next(model.parameters()).device
    moved = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in features.items()
    }
    outputs: Tensor = model(moved)[kind.output]
    return outputs.to_dense() if outputs.is_sparse else outputs


def _run_texts(model: Any, kind: _Kind, *args: Any, **kwargs: Any) -> Any:
    """The model's own `encode`, `predict` or `_inference`, with its forward cut into batches."""
    own_method = getattr(type(model), kind.method)
    names = _argument_names(own_method)
    if _argument("output_value", kind.output, names, args, kwargs) != kind.output:
        return own_method(
            model, *args, **kwargs
        )  # all that the forward puts out is asked for, in the caller's batches
    tokens = _tokens(model, kind)
    inputs = args[0] if args else kwargs.get("inputs", kwargs.get("sentences"))
    batch_size = _argument("batch_size", 32, names, args, kwargs)
    if kind.name != "SparseEncoder" and isinstance(inputs, (list, tuple)) and len(inputs) and batch_size > 0:
        args, kwargs = _with_batch_size(_texts_at_once(model, inputs, tokens), names, args, kwargs)
    outer = getattr(_RUNNING, "cut", None)
    _RUNNING.cut = _Cut(model, kind.output, tokens)
    try:
        return own_method(model, *args, **kwargs)
    finally:
        _RUNNING.cut = outer


def _tokens(model: nn.Module, kind: _Kind) -> int:
    """The most tokens of a batch, padding included."""
    if kind.name == "SparseEncoder":
        return _TOKENS_OF_WIDE_OUTPUTS
    encoder = next(iter(packed_encoders(model)), None)
    on_gpu = encoder is not None and encoder.device.type == "cuda"
    return TOKENS_ON_A_GPU if on_gpu else TOKENS_ON_A_CPU


@cache
def _argument_names(method: Any) -> tuple[str, ...]:
    """The names of a method's arguments after `self`."""
    return tuple(inspect.signature(method).parameters)[1:]


def _argument(name: str, default: Any, names: tuple[str, ...], args: tuple[Any, ...], kwargs: Any) -> Any:
    """The value that a call gives to the argument of this name."""
    if name in names and names.index(name) < len(args):
        return args[names.index(name)]
    return kwargs.get(name, default)


def _with_batch_size(
    size: int, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    place = names.index("batch_size")
    if place < len(args):
        return (*args[:place], size, *args[place + 1 :]), kwargs
    return args, {**kwargs, "batch_size": size}


def _texts_at_once(model: Any, inputs: Sequence[Any], tokens: int) -> int:
    """How many of these texts are tokenized together: some batches' tokens of them, by their characters."""
    longest = getattr(model, "max_seq_length", None) or getattr(model, "max_length", None) or 512
    most = longest * _CHARACTERS_PER_TOKEN
    characters = sum(min(_characters(text), most) for text in inputs)
    mean = max(1.0, characters / len(inputs) / _CHARACTERS_PER_TOKEN)
    return int(max(1, min(_TEXTS_AT_ONCE, LOOK_AHEAD * tokens / mean)))


def _characters(text: Any) -> int:
    """The characters of a text, or of a pair of texts; other inputs count as one."""
    if isinstance(text, str):
        return len(text)
    if isinstance(text, (tuple, list)):
        return sum(len(part) if isinstance(part, str) else 1 for part in text)
    return 1


def _forward(model: Any, input: Any, **kwargs: Any) -> Any:
    """The model's own forward, batch by batch where `encode` or `predict` is running it. `input` is what
    sentence-transformers calls the features, which callers may give by that name."""
    own_forward = type(model).forward
    if torch.compiler.is_compiling():
        return own_forward(model, input, **kwargs)
    _check_expansion(model)
    cut: _Cut | None = getattr(_RUNNING, "cut", None)
    if cut is None or cut.model is not model:
        return own_forward(model, input, **kwargs)
    places = _places(input, cut.tokens)
    if len(places) < 2:
        return own_forward(model, input, **kwargs)
    output = cut.output
    outputs = [own_forward(model, _rows(input, rows), **kwargs)[output] for rows in places]
    order = torch.tensor([row for rows in places for row in rows], device=outputs[0].device)
    return {**input, output: torch.cat(outputs).index_select(0, order.argsort())}


def _checked_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward, unless it is set to fill up queries with what is padding to its encoder."""
    if not torch.compiler.is_compiling():
        _check_expansion(module)
    return type(module).forward(module, *args, **kwargs)


def _places(features: Any, tokens: int) -> list[list[int]]:
    """The rows of each batch of at most so many tokens, like lengths together; nothing where the features are
    not a padded batch of tokens, or are one such batch as they are."""
    ids, mask = features.get("input_ids"), features.get("attention_mask")
    if (
        not isinstance(ids, Tensor)
        or not isinstance(mask, Tensor)
        or ids.dim() != 2
        or ids.shape != mask.shape
    ):
        return []
    if ids.numel() <= tokens:
        return []
    return list(token_batches([range(extent) for extent in _extents(mask)], tokens))


def _extents(mask: Tensor) -> list[int]:
    """How many columns each row of a mask takes up to its last real token, at least 1."""
    columns = torch.arange(1, mask.size(1) + 1, device=mask.device)
    return ((mask != 0) * columns).amax(1).clamp_min(1).tolist()


def _rows(features: Any, rows: list[int]) -> dict[str, Any]:
    """The features of these texts alone, without the columns that only longer ones need."""
    mask = features["attention_mask"]
    longest = max(_extents(mask[rows]))
    shape, chosen = mask.shape, torch.tensor(rows, device=mask.device)

    def of_rows(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != shape[0]:
            return value
        value = value.index_select(0, chosen.to(value.device))
        return value[:, :longest] if value.dim() > 1 and value.size(1) == shape[1] else value

    return {name: of_rows(value) for name, value in features.items()}
