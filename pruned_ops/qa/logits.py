"""The logits that a model gives for windows, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pruned_ops.qa.decoding import Logits
from pruned_ops.runtime.batch_runner import Tensors, padded
from pruned_ops.shape import checked_int


def select_logits(output: Any) -> Tensors:
    """The part of a model's output that is copied to the host, in fp32: start and end logits as one tensor,
    (2, batch, seqlen), and answer type logits, where the model has them."""
    for name in ("start_logits", "end_logits"):
        if not isinstance(getattr(output, name, None), Tensor):
            raise ValueError(
                f"the model gives a {type(output).__name__} without {name}; a question-answering model is "
                "needed"
            )
    # One copy to the host for the batch, not two for every window.
    logits = {"spans": torch.stack([output.start_logits, output.end_logits]).float()}
    kinds: Tensor | None = getattr(output, "answer_type_logits", None)
    return logits if kinds is None else {**logits, "kinds": kinds.float()}


def split_logits(batch: Sequence[Any], logits: Tensors) -> Iterator[Any]:
    """The start and end logits of each window, (tokens,) each, without padding; then its answer type logits,
    where there are any. logits: what `select_logits` gave."""
    both, kinds = logits["spans"].numpy(), logits.get("kinds")
    for row, window in enumerate(batch):
        # Copies, so that one window's logits do not keep the whole batch in memory.
        spans: Logits = both[0, row, : len(window)].copy(), both[1, row, : len(window)].copy()
        yield spans if kinds is None else (*spans, kinds[row].numpy().copy())


def batch_logits(
    model: torch.nn.Module, batch: Sequence[Any], pad_token_id: int, device: torch.device
) -> Iterator[Any]:
    """Call the model on one batch, and give the logits of each window as `split_logits` does.

    batch: `Window`s, or whatever has a length, input_ids and token_type_ids."""
    inputs = {name: tensor.to(device) for name, tensor in padded(batch, pad_token_id).items()}
    logits = select_logits(model(**inputs))
    yield from split_logits(batch, {name: tensor.cpu() for name, tensor in logits.items()})


def predict_logits(
    model: torch.nn.Module,
    windows: Sequence[Any],
    batch_size: int = 32,
    pad_token_id: int = 0,
    progress: bool = False,
) -> list[Any]:
    """The start and end logits of every window, in the order given: fp32, (tokens,) each, without padding.

    Each window has a tuple of them; its third entry, where the model has answer types, is their logits.
    windows: `Window`s, or whatever has a length, input_ids and token_type_ids.

    The model runs in inference mode and without dropout; afterwards each of its modules trains, or does not,
    as before. Batches
    hold windows of like length, longest first, so that there is little padding and too large a batch fails at
    once. Inputs go where the model's first parameter is.
    """
    checked_int("batch_size", batch_size, 1)
    place = next(model.parameters()).device
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))
    logits: dict[int, Any] = {}
    with evaluating(model), torch.inference_mode():
        for chosen in _batches(order, batch_size, progress):
            batch = [windows[i] for i in chosen]
            logits.update(zip(chosen, batch_logits(model, batch, pad_token_id, place), strict=True))
    return [logits[i] for i in range(len(windows))]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model evaluates inside the block. After it every module is in its own mode again: who trains around
    a frozen part keeps that in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training


def _batches(order: list[int], batch_size: int, progress: bool) -> Iterator[list[int]]:
    batches = (order[first : first + batch_size] for first in range(0, len(order), batch_size))
    if not progress:
        yield from batches
        return
    from tqdm.auto import tqdm  # only for those who ask for a bar

    with tqdm(total=len(order), desc="logits", unit=" windows") as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
