"""`optimize(model).encode_many`: any number of texts through a model, in order, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruned_ops.models.inputs import longest_sequence
from pruned_ops.runtime.packed_encoder import PackedEncoder
from pruned_ops.runtime.streaming import LOOK_AHEAD, BatchRunner, Lanes, Tensors

# Of a batch, padding included. A CPU's caches like small batches. On a GPU so many rows make 128 tiles of 128
# rows, about one for each multiprocessor of an H200; not measured.
TOKENS_ON_A_CPU, TOKENS_ON_A_GPU = 4096, 16384
_PER_TOKEN = ("last_hidden_state", "start_logits", "end_logits")
_PER_TEXT = ("pooler_output", "answer_type_logits")
_READ = ("input_ids", "token_type_ids", "attention_mask")


@dataclass(frozen=True, eq=False)
class _Text:
    """A tokenised text, and its place among those given."""

    index: int
    input_ids: Tensor
    token_type_ids: Tensor | None

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_many(
    model: Any, texts: Iterable[Any], tokens_per_batch: int | None = None, lanes: Lanes | None = None
) -> Iterator[Any]:
    """The model's outputs for each of `texts`, in their order, in memory that does not grow with them.

    texts: tokenised, without padding: mappings with `input_ids` and, if there are any, `token_type_ids` (what
    a tokenizer gives for one text), or the ids alone; (tokens,) each, of at least one token. They are read
    in windows of LOOK_AHEAD batches' tokens (one text more at most), sorted by length within one and run in
    batches of at most `tokens_per_batch`, padding included (by default TOKENS_ON_A_CPU, TOKENS_ON_A_GPU), or
    of one longer text; so results come in bursts. On a GPU copies run beside the computing, on a stream of
    their own.
    Each result is what the model returns, with the fields of this text alone, on the CPU: hidden states,
    start and end logits and labels of tokens (tokens, ...), labels of a text (labels,).
    lanes: for tests; how inputs and results are copied.
    Errors: ValueError for settings and a model that is not optimised, at once; ValueError with the index for
    a text that cannot be read, and an error of `texts` itself, after the results before it; ValueError for
    outputs that cannot be told apart into texts.
    """
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
        raise ValueError(f"texts are a {type(texts).__name__}; an iterable of tokenised texts is needed")
    encoder = next((one for one in model.modules() if isinstance(one, PackedEncoder)), None)
    if encoder is None:
        raise ValueError("encode_many takes an optimised model: call pruned_ops.optimize(model) first")
    if tokens_per_batch is None:
        tokens_per_batch = TOKENS_ON_A_GPU if encoder.device.type == "cuda" else TOKENS_ON_A_CPU
    if isinstance(tokens_per_batch, bool) or not isinstance(tokens_per_batch, int) or tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch is {tokens_per_batch!r}; a whole number of at least 1 is needed")
    outputs = _Outputs()
    pad = encoder.config.pad_token_id or 0
    runner = BatchRunner(model, pad, encoder.device, outputs.select, lanes)
    reader = _Reader(texts, longest_sequence(encoder.config), LOOK_AHEAD * tokens_per_batch)
    return _in_order(runner, reader, outputs, tokens_per_batch)


def _in_order(
    runner: BatchRunner, reader: _Reader, outputs: _Outputs, tokens_per_batch: int
) -> Iterator[Any]:
    waiting: dict[int, Any] = {}
    following = 0
    for batch, found in runner.scheduled(reader, tokens_per_batch):
        for row, text in enumerate(batch):
            waiting[text.index] = outputs.of(found, row, len(text))
        while following in waiting:
            yield waiting.pop(following)
            following += 1
    if reader.failure is not None:
        raise reader.failure


class _Reader:
    """Iterates over windows of texts of about `tokens` tokens. failure: what ended it early, if anything."""

    def __init__(self, texts: Iterable[Any], longest: int, tokens: int) -> None:
        self._texts, self._longest, self._tokens = texts, longest, tokens
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[list[_Text]]:
        window, tokens = list[_Text](), 0
        try:
            for index, given in enumerate(self._texts):
                window.append(_text(index, given, self._longest))
                tokens += len(window[-1])
                if tokens >= self._tokens:
                    yield window
                    window, tokens = [], 0
        except Exception as error:  # whatever the caller's iterable raises; it comes back to them
            self.failure = error
        if window:
            yield window


class _Outputs:
    """A model's outputs taken apart: `select` a batch's tensors, then `of` one text."""

    def __init__(self) -> None:
        self._kind: Any = None

    def select(self, output: Any) -> Tensors:
        """The tensors of a model's output by name. Errors: ValueError for those of unknown meaning."""
        if isinstance(output, Tensor) and output.dim() < 3:
            self._kind, output = None, {"logits": output}
        elif isinstance(output, Mapping):
            self._kind = type(output)
        else:
            raise ValueError(
                "encode_many takes a model whose outputs have names, or are one tensor (batch, labels); "
                f"this one gives a {type(output).__name__}"
            )
        found = {name: value for name, value in output.items() if value is not None}
        for name, value in found.items():
            known = name in (*_PER_TOKEN, *_PER_TEXT) or (name == "logits" and value.dim() <= 3)
            if not isinstance(value, Tensor) or not known:
                raise ValueError(f"encode_many does not know how {name} belongs to the texts of a batch")
        return found

    def of(self, found: Tensors, row: int, tokens: int) -> Any:
        """Copies, so that one text's outputs do not keep the whole batch in memory."""
        one = {}
        for name, values in found.items():
            per_token = name in _PER_TOKEN or (name == "logits" and values.dim() == 3)
            one[name] = (values[row, :tokens] if per_token else values[row]).clone()
        return one["logits"] if self._kind is None else self._kind(**one)


def _text(index: int, given: Any, longest: int) -> _Text:
    """A text as it was given. Errors: ValueError that names its index."""
    fields = dict(given) if isinstance(given, Mapping) else {"input_ids": given}
    unknown = [name for name, value in fields.items() if name not in _READ and value is not None]
    if unknown or fields.get("input_ids") is None:
        what = f"has {', '.join(map(str, unknown))}" if unknown else "has no input_ids"
        raise ValueError(f"text {index} {what}; encode_many reads {' and '.join(_READ[:2])}")
    read = {name: _numbers(index, name, value) for name, value in fields.items() if value is not None}
    tokens = len(read["input_ids"])
    if not 1 <= tokens <= longest:
        raise ValueError(f"text {index} has {tokens} tokens; the model takes 1 to {longest}")
    for name, values in read.items():
        if len(values) != tokens:
            raise ValueError(f"text {index} has {tokens} input_ids, but {len(values)} {name}")
    if "attention_mask" in read and not bool((read["attention_mask"] == 1).all()):
        raise ValueError(f"text {index} is padded: its attention_mask has zeros; give its tokens alone")
    return _Text(index, read["input_ids"], read.get("token_type_ids"))


def _numbers(index: int, name: str, values: Any) -> Tensor:
    """(tokens,) int64 on the CPU; a batch of one, as tokenizers make with return_tensors, is taken too."""
    try:
        found = torch.as_tensor(values if isinstance(values, (Tensor, Sequence)) else list(values)).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"text {index}: its {name} are no numbers ({error})") from None
    if found.dim() == 2 and len(found) == 1:
        found = found[0]
    whole = not (found.is_floating_point() or found.is_complex())
    if found.dim() != 1 or not (whole or found.numel() == 0):
        shape = tuple(found.shape)
        raise ValueError(
            f"text {index}: its {name} are {found.dtype} {shape}; whole numbers (tokens,) are needed"
        )
    return found.long()
