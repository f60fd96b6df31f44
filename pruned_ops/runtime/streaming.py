"""Many sequences through a model at full rate: like lengths together, and copies beside the computing.

Sequences come in blocks of a few batches' tokens and are sorted by length within a block, so that batches of
a bounded number of tokens hold little padding. On a GPU a batch is computed while the next one's inputs are
on their way there, and the results of the one before on theirs back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from pruned_ops.layers.packing import with_lengths
from pruned_ops.models.inputs import longest_sequence
from pruned_ops.runtime.packed_encoder import PackedEncoder

# Batches that a block is sorted over: with so many, padding is a few percent of the tokens.
LOOK_AHEAD = 8

T = TypeVar("T", bound=Any)
Tensors = dict[str, Tensor]


def token_batches(sequences: Sequence[Any], tokens: int) -> Iterator[list[int]]:
    """Places in `sequences`, as batches of like length, longest first: little padding, and too large a batch
    fails at once. A batch takes at most `tokens` with its padding, or holds one sequence."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    first = 0
    while first < len(order):
        rows = max(1, tokens // len(sequences[order[first]]))
        yield order[first : first + rows]
        first += rows


def padded(batch: Sequence[Any], pad_token_id: int) -> Tensors:
    """A model's inputs on the host, right-padded, int64 (batch, seqlen).

    batch: whatever has a length, input_ids and token_type_ids (None: all 0). Types are left out where nobody
    has any."""
    shape = (len(batch), max(map(len, batch)))
    ids, types, mask = np.full(shape, pad_token_id), np.zeros(shape, int), np.zeros(shape, int)
    for row, one in enumerate(batch):
        ids[row, : len(one)] = one.input_ids
        mask[row, : len(one)] = 1
        if one.token_type_ids is not None:
            types[row, : len(one)] = one.token_type_ids
    made = {"input_ids": ids, "attention_mask": mask}
    if any(one.token_type_ids is not None for one in batch):
        made["token_type_ids"] = types
    return {name: torch.from_numpy(values) for name, values in made.items()}


class Lanes(Protocol):
    """Copies to where a model is and back. Both begin at once, and return what waits for their end."""

    ahead: int  # batches that are on their way there, and as many on theirs back, while one is computed

    def to_device(self, host: Tensors) -> Callable[[], Tensors]: ...

    def to_host(self, device: Tensors) -> Callable[[], Tensors]: ...

    def wait(self) -> None:
        """Until nothing is on its way."""


class HostLanes:
    """The model is on the CPU: nothing is copied, and every batch's results come before the next is read."""

    ahead = 0

    def to_device(self, host: Tensors) -> Callable[[], Tensors]:
        return lambda: host

    def to_host(self, device: Tensors) -> Callable[[], Tensors]:
        return lambda: device

    def wait(self) -> None:
        pass


class CudaLanes:
    """Copies on a stream of their own, from and to pinned memory, beside the caller's current stream."""

    ahead = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def to_device(self, host: Tensors) -> Callable[[], Tensors]:
        pinned = {name: tensor.pin_memory() for name, tensor in host.items()}
        with torch.cuda.stream(self._copies):
            there = {name: one.to(self._device, non_blocking=True) for name, one in pinned.items()}
            arrived = self._copies.record_event()

        def wait() -> Tensors:
            torch.cuda.current_stream(self._device).wait_event(arrived)
            return there

        return wait

    def to_host(self, device: Tensors) -> Callable[[], Tensors]:
        self._copies.wait_event(torch.cuda.current_stream(self._device).record_event())
        with torch.cuda.stream(self._copies):
            found = {}
            for name, one in device.items():
                found[name] = torch.empty(one.shape, dtype=one.dtype, pin_memory=True)
                found[name].copy_(one, non_blocking=True)
            copied = self._copies.record_event()

        def wait() -> Tensors:
            copied.synchronize()
            return found

        return wait

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()
        self._copies.synchronize()


class BatchRunner:
    """Batches through a model, one after another.

    select: the model's output -> its tensors that are wanted on the host. lanes: for tests; by default those
    of the device.
    """

    def __init__(
        self,
        model: Any,
        pad_token_id: int,
        device: torch.device,
        select: Callable[[Any], Tensors],
        lanes: Lanes | None = None,
    ) -> None:
        self._model, self._pad, self._select = model, pad_token_id, select
        if lanes is None:
            lanes = CudaLanes(device) if device.type == "cuda" else HostLanes()
        self._lanes = lanes

    def scheduled(self, blocks: Iterable[Sequence[T]], tokens: int) -> Iterator[tuple[list[T], Tensors]]:
        """Every block's sequences in batches of at most `tokens` (see `token_batches`), with their results on
        the host. A block is read when the batches before it are computed, but for `lanes.ahead` of them."""
        return self.run(
            [block[place] for place in places] for block in blocks for places in token_batches(block, tokens)
        )

    def run(self, batches: Iterable[list[T]]) -> Iterator[tuple[list[T], Tensors]]:
        """Each batch with its results, in the order given."""
        ahead = self._lanes.ahead
        # What a copy reads is kept with it until its end is waited for.
        coming: deque[tuple[list[T], Callable[[], Tensors]]] = deque()
        going: deque[tuple[list[T], Tensors, Callable[[], Tensors]]] = deque()
        try:
            for batch in batches:
                coming.append((batch, self._lanes.to_device(padded(batch, self._pad))))
                if len(coming) > ahead:
                    going.append(self._computed(*coming.popleft()))
                if len(going) > ahead:
                    yield _arrived(going.popleft())
            while coming:
                going.append(self._computed(*coming.popleft()))
                if len(going) > ahead:
                    yield _arrived(going.popleft())
            while going:
                yield _arrived(going.popleft())
        finally:
            self._lanes.wait()  # before memory is given back that a copy may still use

    def _computed(
        self, batch: list[T], arrive: Callable[[], Tensors]
    ) -> tuple[list[T], Tensors, Callable[[], Tensors]]:
        inputs = arrive()
        # The host knows the lengths: without them a GPU would be waited for.
        inputs["attention_mask"] = with_lengths(inputs["attention_mask"], tuple(map(len, batch)))
        with torch.inference_mode():
            outputs = self._select(self._model(**inputs))
        return batch, inputs | outputs, self._lanes.to_host(outputs)


def _arrived(
    going: tuple[list[T], Tensors, Callable[[], Tensors]],
) -> tuple[list[T], Tensors]:
    batch, _, arrive = going
    return batch, arrive()


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
