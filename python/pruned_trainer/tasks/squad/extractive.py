"""Between examples and a model: features to train on, and the logits of windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pruned_ops.qa.windows import Window, span_tokens, windows

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
