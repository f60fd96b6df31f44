"""Between examples and a model: features to train on, and the logits of windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pruned_ops.qa.logits import batch_logits
from pruned_ops.qa.windows import Window, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pruned_trainer.tasks.squad.examples import Example


def training_features(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int = 384,
    stride: int = 128,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """One dictionary per window: input_ids, token_type_ids, attention_mask, start_positions, end_positions.

    The first three are (tokens,) int32 arrays without padding; a padding collator takes them as they are.
    The positions are those of the first and last token of the example's first answer; of the CLS token
    where the question has no answer, or the window does not hold it whole.
    """
    questions = [example.question for example in examples]
    contexts = [example.context for example in examples]
    cut = windows(tokenizer, questions, contexts, max_length, stride, progress=progress)
    return [_feature(window, examples[window.question_index]) for window in cut]


def _feature(window: Window, example: Example) -> dict[str, Any]:
    start, end = _answer_tokens(window, example)
    return {
        "input_ids": window.input_ids,
        "token_type_ids": window.token_type_ids,
        "attention_mask": np.ones_like(window.input_ids),
        "start_positions": start,
        "end_positions": end,
    }


def _answer_tokens(window: Window, example: Example) -> tuple[int, int]:
    """First and last token of the first answer; the CLS token, twice, where the window lacks part of it."""
    found = None
    if example.answers and not example.is_impossible:
        text, start = example.answers[0]
        found = span_tokens(window, start + len(text) - len(text.lstrip()), start + len(text.rstrip()))
    return found or (window.cls_index, window.cls_index)


def span_tokens(window: Window, start: int, end: int) -> tuple[int, int] | None:
    """First and last token of the context's characters [start, end); None where the window lacks some."""
    first, last = window.context_range
    if first == last:
        return None
    starts, ends = window.offsets[first:last].T
    if start < starts[0] or end > ends[-1]:
        return None
    # Tokens that share a character with the span: several tokens may be parts of one character.
    inside = np.flatnonzero((ends > start) & (starts < end))
    return (first + int(inside[0]), first + int(inside[-1])) if len(inside) else None


def predict_logits(
    model: torch.nn.Module,
    windows: Sequence[Any],
    batch_size: int = 32,
    pad_token_id: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> list[Any]:
    """The start and end logits of every window, in the order given: fp32, (tokens,) each, without padding.

    A tuple each; of three, the answer type logits last, where the model has them. windows: `Window`s, or
    whatever has a length, input_ids and token_type_ids.

    Runs in inference mode and without dropout; the model's training mode is as before afterwards. Batches
    hold windows of like length, longest first: little padding, and too large a batch fails at once.
    device: where the model's inputs go; by default where its first parameter is.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1 is needed")
    place = torch.device(device) if device is not None else next(model.parameters()).device
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))
    found: dict[int, Any] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for chosen in _batches(order, batch_size, progress):
                batch = [windows[i] for i in chosen]
                found.update(zip(chosen, batch_logits(model, batch, pad_token_id, place), strict=True))
    finally:
        model.train(was_training)
    return [found[i] for i in range(len(windows))]


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
