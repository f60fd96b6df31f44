"""Long texts are tokenised piece by piece: the windows are those of the whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, RobertaTokenizerFast

from pruned_ops.qa import windows as question_answering
from pruned_ops.qa.windows import windows
from real_data import real_data
from tiny_tokenizers import byte_tokenizer, word_tokenizer


def piecewise(
    tokenizer: Any, context: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Any], list[Any]]:
    """The windows of a context tokenised whole, and piece by piece."""
    found = []
    for size in (question_answering.PIECE, piece):
        with monkeypatch.context() as patch:
            patch.setattr(question_answering, "PIECE", size)
            cut = windows(tokenizer, ["w1 w2"], [context], 24, 5)
        found.append([(w.input_ids.tolist(), w.token_type_ids.tolist(), w.offsets.tolist()) for w in cut])
    return found[0], found[1]


@settings(deadline=None, max_examples=150)
@given(
    text=st.lists(st.sampled_from(["w1", "wé", "x,y", "😀", " ", "  ", "\n", "\t ", "don't"]), max_size=80),
    piece=st.integers(12, 60),
    left=st.booleans(),
)
def test_a_text_in_pieces_has_the_windows_of_the_whole(text: list[str], piece: int, left: bool) -> None:
    context = " ".join(text)
    side = {"padding_side": "left"} if left else {}
    with pytest.MonkeyPatch.context() as patch:
        for tokenizer in (word_tokenizer(**side), byte_tokenizer()):
            whole, pieces = piecewise(tokenizer, context, piece, patch)
            assert pieces == whole


def test_real_tokenizers_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        real_data("data/squad2/validation.json").read_text("utf-8")[:20_000]
        + " Émile 😀 naïve\u0301  (x)\n" * 20
    )
    for tokenizer in (
        AutoTokenizer.from_pretrained(real_data("models/minilm-l6-squad2")),
        RobertaTokenizerFast.from_pretrained(real_data("models/roberta-base-tokenizer")),
    ):
        whole, pieces = piecewise(tokenizer, text, 100, monkeypatch)
        assert len(whole) > 20 and pieces == whole


def test_tokens_after_pieces_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question_answering, "PIECE", 10)
    context = " " * 35 + "w5" + " " * 50 + "w6" + "\n" * 30
    (window,) = windows(word_tokenizer(), ["w1"], [context])
    assert window.offsets[slice(*window.context_range)].tolist() == [[35, 37], [87, 89]]
    (window,) = windows(word_tokenizer(), ["w1"], [" " * 100])
    assert window.context_range == (0, 0)
