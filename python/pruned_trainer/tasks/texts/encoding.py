"""Texts as a model reads them, cut to its length, and what a model says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pruned_ops.qa.logits import evaluating
from pruned_ops.runtime.batch_runner import padded
from pruned_ops.runtime.optimize import optimized
from pruned_trainer.distributed import is_main, shared
from pruned_trainer.tasks.faults import FormatError

BATCH_SIZE = 32
# What is read of a model's outputs for a batch: (batch, ...), or (batch, seqlen, ...); mask: (batch, seqlen).
Read = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Encoded:
    """A window: a text or a pair, with the special tokens. (tokens,) each; token_type_ids is None where the
    tokenizer gives none."""

    input_ids: NDArray[np.int32]
    token_type_ids: NDArray[np.int32] | None

    def __len__(self) -> int:
        return len(self.input_ids)

    def feature(self, **labels: Any) -> dict[str, Any]:
        """The window as training takes it."""
        types = {} if self.token_type_ids is None else {"token_type_ids": self.token_type_ids}
        ids = self.input_ids
        return {"input_ids": ids, **types, "attention_mask": np.ones_like(ids), **labels}


def encode(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[str, ...]], max_length: int
) -> list[Encoded]:
    """Each text, or pair, as a window of at most max_length tokens; of a pair the longer text is cut first.

    The number of texts that were cut is printed. Errors: FormatError where max_length leaves no room."""
    if not texts:
        return []
    room = max_length - tokenizer.num_special_tokens_to_add(pair=len(texts[0]) > 1)
    if room < len(texts[0]):
        raise FormatError(f"max_length {max_length} leaves no room for a text beside the special tokens")
    columns = [list(column) for column in zip(*texts, strict=True)]
    rows = tokenizer(
        *columns, truncation=True, max_length=max_length, padding=False, return_overflowing_tokens=False
    )
    windows = [encoded(rows, row) for row in range(len(texts))]
    full = [row for row, window in enumerate(windows) if len(window) >= max_length]
    # Only a window of the full length may have been cut: whether it was, its whole text says.
    cut = sum(
        len(tokenizer(*texts[row], truncation=False, padding=False)["input_ids"]) > max_length for row in full
    )
    if cut and is_main():
        print(
            f"-- {cut:,} of {len(texts):,} texts are longer than {max_length} tokens, and are cut", flush=True
        )
    return windows


def encoded(rows: Any, row: int) -> Encoded:
    """One row of what a tokenizer returned."""
    types = rows.get("token_type_ids")
    return Encoded(
        np.asarray(rows["input_ids"][row], np.int32),
        None if types is None else np.asarray(types[row], np.int32),
    )


def model_outputs(model: PreTrainedModel, windows: Sequence[Any], read: Read) -> list[NDArray[np.float32]]:
    """What the model says of each window, in their order: fp32, without the padding of what has a row for
    each token. The model runs packed meanwhile, on all processes. Errors: ValueError for numbers that are not
    finite."""
    with optimized(model):
        outputs = shared(partial(_outputs, model, read), windows)
    for number, values in enumerate(outputs):
        if not np.isfinite(values).all():
            raise ValueError(f"the model's outputs for window {number} are not finite")
    return outputs


@torch.inference_mode()
def _outputs(model: PreTrainedModel, read: Read, windows: Sequence[Any]) -> list[NDArray[np.float32]]:
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))
    by_window: dict[int, NDArray[np.float32]] = {}
    with evaluating(model):
        for rows in _batches(order):
            batch = [windows[row] for row in rows]
            inputs = {
                name: tensor.to(model.device)
                for name, tensor in padded(batch, model.config.pad_token_id or 0).items()
            }
            values = read(model(**inputs), inputs["attention_mask"]).float().cpu().numpy()
            per_token = values.ndim > 2
            for place, row in enumerate(rows):
                value = values[place, : len(windows[row])] if per_token else values[place]
                by_window[row] = value.copy()
    return [by_window[row] for row in range(len(windows))]


def _batches(order: list[int]) -> Iterator[list[int]]:
    starts = range(0, len(order), BATCH_SIZE)
    if is_main():
        from tqdm.auto import tqdm

        starts = tqdm(starts, desc="outputs", unit=" batches")
    for start in starts:
        yield order[start : start + BATCH_SIZE]
