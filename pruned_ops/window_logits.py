"""The logits of windows: batches bounded in tokens, and one batch through a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pruned_ops.answers import Logits
from pruned_ops.question_answering import Window


def token_batches(windows: Sequence[Window], tokens: int) -> Iterator[list[int]]:
    """Places in `windows`, as batches of like length, longest first: little padding, and too large a batch
    fails at once. A batch takes at most `tokens` with its padding, or holds one window."""
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))
    first = 0
    while first < len(order):
        rows = max(1, tokens // len(windows[order[first]]))
        yield order[first : first + rows]
        first += rows


def batch_logits(
    model: torch.nn.Module, batch: Sequence[Any], pad_token_id: int, device: torch.device
) -> Iterator[Any]:
    """The start and end logits of each window, fp32, (tokens,) each, without padding, in one call of the
    model; then its answer type logits, where the model has them.

    batch: `Window`s, or whatever has a length, input_ids and token_type_ids."""
    shape = (len(batch), max(map(len, batch)))
    ids, types, mask = np.full(shape, pad_token_id), np.zeros(shape, int), np.zeros(shape, int)
    for row, window in enumerate(batch):
        ids[row, : len(window)] = window.input_ids
        types[row, : len(window)] = window.token_type_ids
        mask[row, : len(window)] = 1
    inputs = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
    output = model(**{name: torch.from_numpy(values).to(device) for name, values in inputs.items()})
    # One copy to the host for the batch, not two for every window.
    logits = torch.stack([output.start_logits, output.end_logits]).float().cpu().numpy()
    found = getattr(output, "answer_type_logits", None)
    kinds = None if found is None else found.float().cpu().numpy()
    for row, window in enumerate(batch):
        # Copies, so that one window's logits do not keep the whole batch in memory.
        spans: Logits = logits[0, row, : len(window)].copy(), logits[1, row, : len(window)].copy()
        yield spans if kinds is None else (*spans, kinds[row])
