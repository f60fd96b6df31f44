"""`encode_many` runs many tokenised texts through a model, in memory that does not grow with them.

Texts come in windows of a few batches' tokens, which `BatchRunner` runs. Results come in the texts' order.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruned_ops.models.inputs import IdOutsideTable, check_inputs, most_tokens, padding_id
from pruned_ops.runtime.arrivals import RefusedItem, blocks_of, in_one_process, is_there
from pruned_ops.runtime.batch_runner import (
    LOOK_AHEAD,
    TOKENS_ON_A_CPU,
    TOKENS_ON_A_GPU,
    BatchRunner,
    Lanes,
    Tensors,
)
from pruned_ops.runtime.packed_encoder import packed_encoders
from pruned_ops.shape import checked_int


def serves(model: Any) -> bool:
    """Whether `encode_many` can run this model: its forward takes what a tokenizer gives, by name."""
    try:
        inspect.signature(model.forward).bind(input_ids=None, attention_mask=None)
    except (TypeError, ValueError):
        return False
    return True


_PER_TOKEN = ("last_hidden_state", "start_logits", "end_logits")
_PER_TEXT = ("pooler_output", "answer_type_logits")
_READ = ("input_ids", "token_type_ids", "attention_mask")


@dataclass(frozen=True, eq=False)
class _Text:
    """A tokenised text, and its place among the caller's texts. refused: why it cannot be encoded."""

    index: int
    input_ids: Tensor
    token_type_ids: Tensor | None
    refused: RefusedText | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


class RefusedText(RefusedItem):
    """A text that cannot be encoded. index: its place among the texts; reason: what is wrong with it."""

    noun = "text"


def encode_many(
    model: Any,
    texts: Iterable[Any],
    tokens_per_batch: int | None = None,
    lanes: Lanes | None = None,
    keep_refused: bool = False,
) -> Iterator[Any]:
    """Yield the model's outputs for each of `texts`, in their order, in memory that does not grow with them.

    texts: tokenised texts without padding. Each is a mapping with `input_ids` and, if there are any,
    `token_type_ids` (what a tokenizer gives for one text), or the ids alone; (tokens,), at least one token.
    tokens_per_batch: the most tokens of a batch, padding included; a longer text is a batch by itself. By
    default TOKENS_ON_A_CPU or TOKENS_ON_A_GPU.
    lanes: how inputs and results are copied, for tests.
    keep_refused: gives a RefusedText, a ValueError, in the place of a text that cannot be read.
    The texts are computed in windows of LOOK_AHEAD batches' tokens (and at most one text more), sorted by
    length within a window, so that results come in bursts. A generator is read in a thread, one such window
    ahead; where the next text is waited for, those before it are computed at once. Which texts share a batch
    depends on when they came then, and with it the last bits of the results. On a GPU copies run on a stream
    of their own, beside the computing.
    Each result is what the model returns, with the fields of this text alone, on the CPU: hidden states,
    start and end logits and labels of tokens are (tokens, ...), labels of a text are (labels,).
    Errors: ValueError at once for wrong settings, and for a model that is not optimised. RefusedText with the
    index of a text that cannot be read, or an error of `texts` itself, after the results before it.
    ValueError for outputs that cannot be split into texts. RuntimeError in a forked child that goes on with
    its parent's results.
    """
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
        raise ValueError(f"texts are a {type(texts).__name__}; an iterable of tokenised texts is needed")
    encoder = next(iter(packed_encoders(model)), None)
    if encoder is None:
        raise ValueError("encode_many takes an optimised model: call pruned_ops.optimize(model) first")
    if not serves(model):
        raise ValueError(
            f"encode_many gives input_ids and attention_mask, and {type(model).__name__}.forward does not "
            "take them by name: call the model's own methods, which run packed"
        )
    if tokens_per_batch is None:
        tokens_per_batch = TOKENS_ON_A_GPU if encoder.device.type == "cuda" else TOKENS_ON_A_CPU
    checked_int("tokens_per_batch", tokens_per_batch, 1)
    outputs, pad = _OutputSplitter(), padding_id(encoder.config)
    runner = BatchRunner(model, pad, encoder.device, outputs.select, lanes)
    stream = _TextStream(texts, encoder.config, tokens_per_batch, keep_refused)
    return in_one_process(stream.results(runner, outputs))


class _TextStream:
    """One run over many texts."""

    def __init__(self, texts: Iterable[Any], config: Any, tokens_per_batch: int, keep_refused: bool) -> None:
        self._texts, self._config, self._keep_refused = texts, config, keep_refused
        self._tokens_per_batch = tokens_per_batch
        self._failure: Exception | None = None
        self._waiting: dict[int, Any] = {}  # results that one before them keeps back
        self._next = 0  # the text whose result comes next

    def results(self, runner: BatchRunner, outputs: _OutputSplitter) -> Iterator[Any]:
        """The results in the order of their texts; an error of the texts after them."""
        for batch, tensors in runner.scheduled(self._windows(), self._tokens_per_batch):
            for row, text in enumerate(batch):
                self._waiting[text.index] = outputs.of_text(tensors, row, len(text))
            yield from self._complete()
        yield from self._complete()
        if self._failure is not None:
            raise self._failure

    def _complete(self) -> Iterator[Any]:
        while self._next in self._waiting:
            self._next += 1
            yield self._waiting.pop(self._next - 1)

    def _windows(self) -> Iterator[list[_Text]]:
        """The texts in windows of some batches' tokens. Refused ones are put among the results."""
        enough = LOOK_AHEAD * self._tokens_per_batch
        arrivals = blocks_of(self._read(), is_there(self._texts), enough, len)
        try:
            for block in arrivals:
                self._waiting |= {text.index: text.refused for text in block if text.refused is not None}
                yield [text for text in block if text.refused is None]
        except Exception as error:  # the caller's iterable may raise any
            self._failure = error
        finally:
            arrivals.close()

    def _read(self) -> Iterator[_Text]:
        for index, text in enumerate(self._texts):
            try:
                yield _text(index, text, self._config)
            except RefusedText as refused:
                if not self._keep_refused:
                    raise
                yield _Text(index, torch.empty(1), None, refused)


def is_per_text(name: str, values: Tensor) -> bool:
    """Whether an output of this name has a row for each text, and none for each token, however many columns
    it has."""
    return name in _PER_TEXT or (name == "logits" and values.dim() < 3)


def is_per_token(name: str) -> bool:
    """Whether an output of this name has a row for each token, even one of two dimensions."""
    return name in _PER_TOKEN


class _OutputSplitter:
    """Splits a model's outputs: `select` returns a batch's tensors, and `of_text` the outputs of one text."""

    def __init__(self) -> None:
        self._kind: type[Any] | None = None  # the class of the model's output; None for one tensor

    def select(self, output: Any) -> Tensors:
        """The tensors of a model's output by name. Errors: ValueError for tensors of unknown meaning."""
        if isinstance(output, Tensor) and output.dim() < 3:
            self._kind, output = None, {"logits": output}
        elif isinstance(output, Mapping):
            self._kind = type(output)
        else:
            raise ValueError(
                "encode_many takes a model whose outputs have names, or are one tensor (batch, labels); "
                f"this one gives a {type(output).__name__}"
            )
        tensors = {name: value for name, value in output.items() if value is not None}
        for name, value in tensors.items():
            known = name in (*_PER_TOKEN, *_PER_TEXT, "logits")
            if not isinstance(value, Tensor) or not known or value.dim() > 3:
                raise ValueError(f"encode_many does not know how {name} belongs to the texts of a batch")
        return tensors

    def of_text(self, tensors: Tensors, row: int, tokens: int) -> Any:
        """The outputs of the text in this row, as copies that do not keep the whole batch in memory."""
        fields = {}
        for name, values in tensors.items():
            fields[name] = (values[row] if is_per_text(name, values) else values[row, :tokens]).clone()
        return fields["logits"] if self._kind is None else self._kind(**fields)


def _text(index: int, text: Any, config: Any) -> _Text:
    """Check a caller's text for the model of this config. Errors: RefusedText."""
    fields = dict(text) if isinstance(text, Mapping) else {"input_ids": text}
    unknown = [name for name, value in fields.items() if name not in _READ and value is not None]
    if unknown or fields.get("input_ids") is None:
        fault = f"has {', '.join(map(str, unknown))}" if unknown else "has no input_ids"
        raise RefusedText(index, f"{fault}; encode_many reads {' and '.join(_READ[:2])}")
    tensors = {name: _numbers(index, name, value) for name, value in fields.items() if value is not None}
    tokens, longest = len(tensors["input_ids"]), most_tokens(config)
    if tokens < 1 or (longest is not None and tokens > longest):
        taken = "at least 1" if longest is None else f"1 to {longest}"
        raise RefusedText(index, f"has {tokens} tokens; the model takes {taken}")
    for name, values in tensors.items():
        if len(values) != tokens:
            raise RefusedText(index, f"has {tokens} input_ids, but {len(values)} {name}")
    if "attention_mask" in tensors and not bool((tensors["attention_mask"] == 1).all()):
        raise RefusedText(index, "is padded: its attention_mask has zeros; give its tokens alone")
    try:
        check_inputs(config, tensors["input_ids"], None, None, tensors.get("token_type_ids"))
    except IdOutsideTable as error:
        raise RefusedText(index, f"cannot be run: {error}") from None
    return _Text(index, tensors["input_ids"], tensors.get("token_type_ids"))


def _numbers(index: int, name: str, values: Any) -> Tensor:
    """The values as int64 (tokens,) on the CPU. They may be a batch of one, as tokenizers make them with
    return_tensors."""
    try:
        numbers = torch.as_tensor(values if isinstance(values, (Tensor, Sequence)) else list(values)).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RefusedText(index, f"cannot be read: its {name} are no numbers ({error})") from None
    if numbers.dim() == 2 and len(numbers) == 1:
        numbers = numbers[0]
    whole = not (numbers.is_floating_point() or numbers.is_complex())
    if numbers.dim() != 1 or not (whole or numbers.numel() == 0):
        shape = tuple(numbers.shape)
        raise RefusedText(
            index,
            f"cannot be read: its {name} are {numbers.dtype} {shape}; whole numbers (tokens,) are needed",
        )
    return numbers.long()
