"""The logits of windows: what a model says of a batch of them, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pruned_ops.qa.decoding import Logits
from pruned_ops.runtime.streaming import Tensors, padded


def select_logits(output: Any) -> Tensors:
    """Of a model's output, what is copied to the host, fp32: start and end logits as one, (2, batch, seqlen),
    and answer type logits, where the model has them."""
    # One copy to the host for the batch, not two for every window.
    found = {"spans": torch.stack([output.start_logits, output.end_logits]).float()}
    kinds: Tensor | None = getattr(output, "answer_type_logits", None)
    return found if kinds is None else {**found, "kinds": kinds.float()}


def split_logits(batch: Sequence[Any], found: Tensors) -> Iterator[Any]:
    """The start and end logits of each window, (tokens,) each, without padding; then its answer type logits,
    where there are any."""
    logits, kinds = found["spans"].numpy(), found.get("kinds")
    for row, window in enumerate(batch):
        # Copies, so that one window's logits do not keep the whole batch in memory.
        spans: Logits = logits[0, row, : len(window)].copy(), logits[1, row, : len(window)].copy()
        yield spans if kinds is None else (*spans, kinds[row].numpy().copy())


def batch_logits(
    model: torch.nn.Module, batch: Sequence[Any], pad_token_id: int, device: torch.device
) -> Iterator[Any]:
    """`split_logits` of one call of the model.

    batch: `Window`s, or whatever has a length, input_ids and token_type_ids."""
    inputs = {name: tensor.to(device) for name, tensor in padded(batch, pad_token_id).items()}
    found = select_logits(model(**inputs))
    yield from split_logits(batch, {name: tensor.cpu() for name, tensor in found.items()})
