"""Models as a server holds them: loaded, optimised, and computed a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pruned_ops.checkpoints.loading import (
    cast_and_dtype,
    checked_device,
    checkpoint_folder,
    default_device,
    first_line,
    load_any_head,
    load_model,
    load_tokenizer,
    only_errors,
)
from pruned_ops.models.inputs import longest_sequence, padding_id, pool_tokens
from pruned_ops.models.int8_checkpoints import dequantised
from pruned_ops.qa.answerer import QuestionAnswerer
from pruned_ops.qa.logits import select_logits, split_logits
from pruned_ops.runtime.batch_runner import BatchRunner, Tensors, padded, token_batches
from pruned_ops.runtime.optimize import optimize, restore
from pruned_ops.runtime.packed_encoder import packed_encoders
from pruned_ops.serving.folders import Contents, Kind, contents_of, folder_of
from pruned_ops.serving.texts import TextEncoder

FloatArray = NDArray[np.float32]

_MISSING = 'a model with this pooling needs sentence-transformers: pip install "pruned_ops[st]"'
# Tokens of a batch of calibration texts.
_CALIBRATION_TOKENS = 2048


@dataclass(frozen=True)
class Loading:
    """How models are loaded.

    device: where they run; by default on the GPU where there is one, and on the CPU where a model's weights
    are quantised. dtype: None, "bfloat16" or "int8"; on a GPU None, "float16" or "bfloat16".
    calibration: texts with which int8 chooses the linears that stay in fp32 (see `pruned_ops.optimize`).
    plain: run the models as transformers runs them, to compare with.
    Errors: ValueError for what does not go together.
    """

    device: str | None = None
    dtype: str | None = None
    calibration: Sequence[str] = ()
    plain: bool = False

    def __post_init__(self) -> None:
        if self.calibration and self.dtype != "int8":
            raise ValueError("calibration texts are for int8: give --dtype int8, too")
        if self.plain and self.dtype is not None:
            raise ValueError(f"a plain model runs in its own dtype, not in {self.dtype}")

    def prepare(self, model: Any, encoder: TextEncoder, pad: int) -> torch.device:
        """Put a model on its device and, unless it is to be plain, optimise it in place. Where there are
        calibration texts, what the model puts out for them decides what runs in int8. pad: the padding's id.
        Returns the device. Errors: ValueError for one that cannot be used here."""
        device = self.device
        if device is None:
            quantised = (module for module in model.modules() if getattr(module, "is_quantized", False))
            device = default_device(next(quantised, None))
        place = checked_device(device)
        cast, dtype = cast_and_dtype(self.dtype, place)
        model.to(place, cast).eval()
        if not self.plain:
            batches = list(self._batches(encoder, pad, place)) if self.calibration else None
            # Nobody saves what is served: bfloat16 need not keep what it rounds.
            optimize(model, dtype=dtype, calibration=batches, keep_fp32=dtype != "bfloat16")
        return place

    def _batches(self, encoder: TextEncoder, pad: int, place: torch.device) -> Iterator[Tensors]:
        """The calibration texts as a model's arguments."""
        sequences = encoder.encode(self.calibration, cut=True)
        for places in token_batches(sequences, _CALIBRATION_TOKENS):
            inputs = padded([sequences[place] for place in places], pad)
            yield {name: tensor.to(place) for name, tensor in inputs.items()}


@dataclass(frozen=True, eq=False)
class Served:
    """One model that a server holds.

    name: what requests call it. source: where it came from; requests may call it that, too. runner: computes
    batches. dtype: of its linear layers. dimension: numbers of an embedding, 0 for other kinds. labels: of a
    classifier or reranker. multi_label: whether several of them may hold. pooling: of an embedder. prompts:
    texts to be put before others, by name. default_prompt: the name of the one for requests that name none.
    notes: what a user should know. answerer: reads questions, of a model that answers them.
    """

    name: str
    source: str
    kind: Kind
    encoder: TextEncoder
    runner: BatchRunner
    dtype: str
    dimension: int = 0
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    pooling: str = ""
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    notes: tuple[str, ...] = ()
    answerer: QuestionAnswerer | None = None

    def compute(self, sequences: list[Any]) -> list[Any]:
        """The result of each sequence, None where it is not finite: an embedding (dimension,), logits
        (labels,), or the start and end logits of a window, (tokens,) each."""
        ((_, tensors),) = self.runner.run([sequences])
        if self.answerer is not None:
            windows = list(split_logits(sequences, tensors))
            return [window if all(np.isfinite(part).all() for part in window) else None for window in windows]
        values = tensors["values"]
        rows, finite = values.numpy(), torch.isfinite(values).all(1).tolist()
        # Copies: a view would keep the whole batch for as long as one client takes to read its answer.
        return [row.copy() if is_finite else None for row, is_finite in zip(rows, finite, strict=True)]


def load(source: str, name: str, loading: Loading) -> Served:
    """The model in a folder, or of a hub name. What it does is read from the folder's own files.

    Errors: OSError where there is none; ImportError where a library is missing; ValueError for models that
    do nothing that can be served, that `optimize` refuses, or that cannot be loaded.
    """
    only_errors()
    folder = checkpoint_folder(folder_of(source))
    try:
        contents = contents_of(folder)
        make = _of_library if contents.library else _MAKERS[contents.kind]
        return make(folder, source, name, loading, contents)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # each library on the way raises its own kind for a broken file
        raise ValueError(f"{source} cannot be loaded: {first_line(error)}") from error


def load_all(sources: Sequence[str], loading: Loading) -> dict[str, Served]:
    """The models by the names that requests call them: NAME of NAME=MODEL, or the last part of MODEL.
    Errors: as `load`'s; ValueError for two of one name, and for NAME=MODEL without one of the two."""
    places: dict[str, str] = {}
    for source in sources:
        name, separator, place = source.partition("=")
        if not separator or Path(source).exists():
            place = source
            name = Path(source).resolve().name if Path(source).is_dir() else source
        if not name or not place:
            raise ValueError(f"{source!r} has no {'model' if name else 'name'}: NAME=MODEL is needed")
        if name in places:
            raise ValueError(f"two models are called {name!r}: give one another name, as NAME={place}")
        places[name] = place
    return {name: load(place, name, loading) for name, place in places.items()}


def _rows(output: Any) -> Tensors:
    """What of a model's output is copied to the host: (batch, numbers) in fp32."""
    return {"values": output.float()}


def _dtype(model: nn.Module) -> str:
    """The dtype that the linear layers of a model run in, which has fp32 weights or is optimised."""
    for packed in packed_encoders(model):
        return packed.linear_dtype or str(packed.dtype).removeprefix("torch.")
    return "float32"


def _pad(model: Any) -> int:
    return padding_id(model.config)


def _vocabulary(model: Any) -> int:
    """The rows of a model's table of words."""
    return int(model.get_input_embeddings().weight.size(0))


def _length(tokenizer: Any, config: Any, set_one: int | None = None) -> int:
    """The most tokens that a model takes, or fewer where its publisher set so: for its tokenizer, or as
    `set_one`, which is then the tokenizer's as well, as in sentence-transformers."""
    return min(longest_sequence(config), int(tokenizer.model_max_length) if set_one is None else set_one)


class _Pooled(nn.Module):
    """An encoder and its pooling: tokens -> embeddings (texts, dimensions)."""

    def __init__(self, encoder: Any, pooling: str) -> None:
        super().__init__()
        self.encoder, self._pooling = encoder, pooling

    def forward(self, **inputs: Any) -> Tensor:
        states = self.encoder(**inputs).last_hidden_state.float()  # so that no half rounds an embedding
        return pool_tokens(states, inputs["attention_mask"], self._pooling)


class _Chain(nn.Module):
    """The modules of a model of sentence-transformers.

    max_active_dims: how many numbers of an embedding, the largest, stay; None for all."""

    def __init__(self, modules: list[Any], max_active_dims: int | None) -> None:
        super().__init__()
        self._max_active_dims = max_active_dims
        self.chain = nn.ModuleList(modules)

    def forward(self, **inputs: Any) -> Tensor:
        features: dict[str, Any] = dict(inputs)
        for module in self.chain:
            features = module(features)
        embedding = features["sentence_embedding"]
        if embedding.is_sparse:
            embedding = embedding.to_dense()
        if self._max_active_dims is None:
            return embedding
        from sentence_transformers.util import select_max_active_dims

        return select_max_active_dims(embedding, self._max_active_dims)


def _embedder(folder: Path, source: str, name: str, loading: Loading, contents: Contents) -> Served:
    """An encoder whose pooling is computed here."""
    # No pooling that is computed here reads an encoder's own pooler, and few embedders are saved with it.
    model: Any = load_any_head(str(folder), takes_int8=True, encoder_alone=True)
    tokenizer = load_tokenizer(str(folder))
    limit, hidden = _length(tokenizer, model.config, contents.max_tokens), model.config.hidden_size
    encoder = TextEncoder(tokenizer, limit, _vocabulary(model), contents.lower_case)
    pooled = _Pooled(model, contents.pooling)
    place = loading.prepare(pooled, encoder, _pad(model))
    return Served(
        name,
        source,
        "embedder",
        encoder,
        BatchRunner(pooled, _pad(model), place, _rows),
        _dtype(pooled),
        dimension=min(contents.dimension or hidden, hidden),
        pooling=contents.pooling,
        prompts=contents.prompts,
        default_prompt=contents.default_prompt,
        notes=contents.notes,
    )


def _classifier(folder: Path, source: str, name: str, loading: Loading, contents: Contents) -> Served:
    model: Any = load_any_head(str(folder), takes_int8=True)
    tokenizer = load_tokenizer(str(folder))
    encoder = TextEncoder(tokenizer, _length(tokenizer, model.config), _vocabulary(model))
    place = loading.prepare(model, encoder, _pad(model))
    return Served(
        name,
        source,
        contents.kind,
        encoder,
        BatchRunner(model, _pad(model), place, lambda output: _rows(output.logits)),
        _dtype(model),
        labels=tuple(str(model.config.id2label[place]) for place in range(model.config.num_labels)),
        multi_label=model.config.problem_type == "multi_label_classification",
    )


def _question_answering(folder: Path, source: str, name: str, loading: Loading, contents: Contents) -> Served:
    model, tokenizer = load_model(str(folder), takes_int8=True), load_tokenizer(str(folder))
    if loading.plain:  # transformers has no kernels for int8 weights
        model = dequantised(model)
    encoder = TextEncoder(tokenizer, _length(tokenizer, model.config), _vocabulary(model))
    place = loading.prepare(model, encoder, _pad(model))
    answerer = QuestionAnswerer(model, tokenizer, dtype=cast_and_dtype(loading.dtype, place)[1])
    if loading.plain:
        restore(model)
    runner = BatchRunner(model, _pad(model), place, select_logits)
    return Served(name, source, contents.kind, encoder, runner, _dtype(model), answerer=answerer)


def _of_library(folder: Path, source: str, name: str, loading: Loading, contents: Contents) -> Served:
    """A model of sentence-transformers, with that library's modules. An embedder's normalisation at its end
    is left to the routes, which can be asked for embeddings without it; that of sparse ones cannot."""
    try:
        import sentence_transformers
    except ImportError as error:
        raise ImportError(_MISSING) from error
    library_class = getattr(sentence_transformers, contents.library)
    model = library_class(str(folder), device="cpu", trust_remote_code=False)
    inner, tokenizer = model[0].auto_model, model.tokenizer
    limit = _length(tokenizer, inner.config, model.max_seq_length)
    lower_case = bool(getattr(model[0], "do_lower_case", False))
    encoder = TextEncoder(tokenizer, limit, _vocabulary(inner), lower_case)
    modules = list(model)
    while contents.kind == "embedder" and type(modules[-1]).__name__ == "Normalize":
        modules.pop()
    embedder = _Chain(modules, getattr(model, "max_active_dims", None))
    place = loading.prepare(embedder, encoder, _pad(inner))
    # The name of this method is another one before sentence-transformers 5.4.
    dimension = getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension
    return Served(
        name,
        source,
        contents.kind,
        encoder,
        BatchRunner(embedder, _pad(inner), place, _rows),
        _dtype(embedder),
        dimension=int(dimension()),
        pooling=contents.pooling or "the library's own",
        prompts=contents.prompts,
        default_prompt=contents.default_prompt,
        notes=contents.notes,
    )


_MAKERS = {
    "embedder": _embedder,
    "reranker": _classifier,
    "classifier": _classifier,
    "question answering": _question_answering,
}
