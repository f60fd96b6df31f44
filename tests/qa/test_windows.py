"""Windows and answer decoding, on tokenizers small enough to be built here and, where present, real data."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, RobertaTokenizerFast

from pruned_ops.qa import windows as windows_module
from pruned_ops.qa.decoding import Answer, Decoded, decode
from pruned_ops.qa.windows import Window, window_sizes, windows
from real_data import real_data
from tiny_tokenizers import byte_tokenizer, word_tokenizer, words


def covered(cut: list[Window]) -> list[list[list[int]]]:
    """The character spans of each window's context tokens."""
    return [window.offsets[slice(*window.context_range)].tolist() for window in cut]


def logits_for(window: Window, start: int, end: int, score: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are 0 but for the two given tokens of the window's context."""
    first = window.context_range[0]
    pair = np.zeros((2, len(window)), np.float32)
    pair[0, first + start] = pair[1, first + end] = score
    return pair[0], pair[1]


def test_stored_truncation_and_padding_do_not_apply() -> None:
    (window,) = windows(word_tokenizer(), ["w1 w2"], [words(300)])
    assert len(window) == 2 + 300 + 3
    (short,) = windows(word_tokenizer(), ["w1 w2"], ["w3"])
    assert short.input_ids.tolist() == [2, 5, 6, 3, 7, 3]
    assert short.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1]
    assert short.offsets.tolist() == [[-1, -1]] * 4 + [[0, 2], [-1, -1]]
    assert (short.cls_index, short.question_index) == (0, 0)


@settings(deadline=None)
@given(
    question=st.integers(0, 5),
    context=st.integers(0, 70),
    room=st.integers(1, 20),
    stride=st.integers(0, 19),
    padding_side=st.sampled_from(["right", "left"]),
)
def test_windows_cover_every_token_with_the_overlap_asked_for(
    question: int, context: int, room: int, stride: int, padding_side: str
) -> None:
    tokenizer, stride = word_tokenizer(padding_side=padding_side), min(stride, room - 1)
    max_length = question + 3 + room
    cut = windows(tokenizer, [words(question)], [words(context)], max_length, stride)
    spans = covered(cut)
    assert all(len(window) <= max_length for window in cut)
    joined = spans[0] + [span for earlier in spans[1:] for span in earlier[stride:]]
    assert joined == (covered(windows(tokenizer, [words(question)], [words(context)], 1000))[0])
    assert len(joined) == context
    for before, after in zip(spans, spans[1:], strict=False):
        assert before[len(before) - stride :] == after[:stride]


def same_as_overflow(tokenizer: Any, question: str, context: str, max_length: int, stride: int) -> None:
    cut = windows(tokenizer, [question], [context], max_length, stride)
    expected = tokenizer(
        question, context, truncation="only_second", max_length=max_length, stride=stride,
        return_overflowing_tokens=True, return_token_type_ids=True, padding=False,
    )  # fmt: skip
    assert len(cut) > 2
    assert [window.input_ids.tolist() for window in cut] == expected["input_ids"]
    assert [window.token_type_ids.tolist() for window in cut] == expected["token_type_ids"]


def test_windows_are_those_of_the_tokenizers_own_overflow() -> None:
    same_as_overflow(word_tokenizer(), words(4), words(350), 60, 17)
    same_as_overflow(byte_tokenizer(), "who?", "Hello wörld 😀! " * 20, 50, 9)


def test_context_comes_first_where_padding_is_left() -> None:
    (window,) = windows(word_tokenizer(padding_side="left"), ["w1"], ["w2 w3"])
    assert window.input_ids.tolist() == [2, 6, 7, 3, 5, 3]
    assert window.context_range == (1, 3)


def test_cls_index_moves_with_the_cut_where_cls_comes_last() -> None:
    tokenizer = word_tokenizer(padding_side="left")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP] [CLS]", pair="$A [SEP] $B [SEP] [CLS]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    cut = windows(tokenizer, ["w1"], [words(30)], max_length=14, stride=3)
    assert len(cut) > 2
    assert all(window.input_ids[window.cls_index] == 2 for window in cut)


def test_roberta_layout_without_token_types() -> None:
    tokenizer = byte_tokenizer()
    (window,) = windows(tokenizer, ["q"], ["c"])
    assert tokenizer.convert_ids_to_tokens(window.input_ids.tolist()) == [
        "<s>",
        "q",
        "</s>",
        "</s>",
        "c",
        "</s>",
    ]
    assert window.token_type_ids.tolist() == [0] * 6


def test_window_sizes_fit_the_model_where_nothing_else_is_said() -> None:
    assert window_sizes(512) == (384, 128) and window_sizes(80) == (80, 26)
    assert window_sizes(512, 100) == (100, 33) and window_sizes(80, None, 0) == (80, 0)
    for sizes, message in (
        ((80, 81), "windows of 81 tokens are too long: the model takes sequences of 80"),
        ((512, 100, 100), "stride 100 must be at least 0 and less than max_length 100"),
        ((80, None, 128), "stride 128 must be .* less than max_length 80"),
        ((80, 0), "max_length is 0"),
        ((80, None, -1), "stride is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            window_sizes(*sizes)


def test_order_and_question_index_hold_across_batches() -> None:
    questions, contexts = [f"w{i}" for i in range(5)], [words(1 + 9 * i) for i in range(5)]
    cut = windows(word_tokenizer(), questions, contexts, max_length=20, stride=4, batch_size=2, progress=True)
    assert [window.question_index for window in cut] == [0, 1, 2, 2, 3, 3, 4, 4, 4]
    assert [int(window.input_ids[1]) for window in cut] == [4 + window.question_index for window in cut]


def test_context_without_tokens_gives_one_window_and_no_answer() -> None:
    cut = windows(word_tokenizer(), ["w1", "w1"], ["", "  \n"])
    assert [window.context_range for window in cut] == [(0, 0), (0, 0)]
    first, second = decode(cut, [(np.ones(len(w)), np.ones(len(w))) for w in cut], ["", "  \n"])
    assert first == second == Decoded((), 2.0)
    assert first.answer(1e9) == first.best == Answer("", 2.0, 0, 0)


def test_refusals_of_windows() -> None:
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match=r"question 1 .* takes 33 of max_length 40 tokens; 7 are left"):
        windows(tokenizer, ["w1", words(30)], ["w1", words(20)], max_length=40, stride=8)
    with pytest.raises(ValueError, match=r"question 0 .* takes 43 of max_length 40 tokens; 0 are left"):
        windows(tokenizer, [words(40)], [""], max_length=40, stride=8)
    with pytest.raises(ValueError, match="2 questions, but 1 contexts"):
        windows(tokenizer, ["w1", "w2"], ["w1"])
    with pytest.raises(ValueError, match="stride 128 must be at least 0 and less than max_length 100"):
        windows(tokenizer, ["w1"], ["w1"], max_length=100)
    for sizes, message in (
        ({"stride": -1}, "stride is -1"),
        ({"stride": 8.0}, "stride is 8.0: an integer"),
        ({"max_length": 40.0, "stride": 8}, "max_length is 40.0: an integer"),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            windows(tokenizer, ["w1"], [words(200)], **sizes)
    with pytest.raises(TypeError, match="sequences of strings"):
        windows(tokenizer, "w1", "w2")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    with pytest.raises(ValueError, match="adds no CLS token"):
        windows(tokenizer, ["w1"], ["w1"])


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_decoding_agrees_with_brute_force(data: st.DataObject) -> None:
    context = data.draw(st.text("ab 😀é", min_size=1, max_size=14))
    n_best, longest = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 6))
    tokenizer = byte_tokenizer()
    cut = windows(tokenizer, ["q"], [context], max_length=16, stride=4)
    # Few different values, so that there are many ties.
    drawn = [data.draw(st.lists(st.integers(-2, 2), min_size=2 * len(w), max_size=2 * len(w))) for w in cut]
    logits = [(np.array(x[::2], np.float32), np.array(x[1::2], np.float32)) for x in drawn]
    spans: dict[tuple[int, int], float] = {}
    for window, (start, end) in zip(cut, logits, strict=True):
        first, last = window.context_range
        for i in range(first, last):
            for j in range(i, min(last, i + longest)):
                left, right = int(window.offsets[i, 0]), int(window.offsets[j, 1])
                while left < right and context[left].isspace():
                    left += 1
                while left < right and context[right - 1].isspace():
                    right -= 1
                if left < right:
                    spans[left, right] = max(spans.get((left, right), -np.inf), float(start[i] + end[j]))
    expected = sorted((-score, *span) for span, score in spans.items())[:n_best]
    (decoded,) = decode(cut, logits, [context], n_best, longest)
    assert [(-a.score, a.start, a.end) for a in decoded.n_best] == expected
    assert all(a.answer == context[a.start : a.end] for a in decoded.n_best)
    assert decoded.null_score == min(float(start[0] + end[0]) for start, end in logits)


def test_answers_of_bytes_are_whole_characters_without_the_space_before() -> None:
    context = "a 😀 bé"  # bytes: a, space, 4 of the emoji, space, b, 2 of é
    (window,) = windows(byte_tokenizer(), ["q"], [context])
    for start, end, text in ((1, 5, "😀"), (3, 4, "😀"), (1, 8, "😀 bé"), (8, 8, "é"), (0, 0, "a")):
        (decoded,) = decode([window], [logits_for(window, start, end)], [context])
        assert decoded.best.answer == text == context[decoded.best.start : decoded.best.end]
        assert decoded.best.score == 10.0


def test_the_same_span_in_two_windows_counts_once_with_its_best_score() -> None:
    context = words(12)
    cut = windows(word_tokenizer(), ["w1"], [context], max_length=12, stride=4)
    assert len(cut) == 2
    (decoded,) = decode(cut, [logits_for(cut[0], 5, 5, 2.0), logits_for(cut[1], 1, 1, 3.0)], [context])
    assert decoded.best == Answer("w5", 6.0, 15, 17)
    assert [a.answer for a in decoded.n_best].count("w5") == 1


def test_answer_is_null_only_where_the_margin_exceeds_the_threshold() -> None:
    span = Answer("x", 3.0, 0, 1)
    decoded = Decoded((span,), null_score=4.5)
    assert decoded.null_margin == 1.5
    assert decoded.answer(1.5) == span
    assert decoded.answer(1.4) == Answer("", 4.5, 0, 0)


def test_refusals_of_decode() -> None:
    cut = windows(word_tokenizer(), ["w1"], ["w2"])
    good = (np.zeros(5), np.zeros(5))
    with pytest.raises(ValueError, match="1 windows, but logits of 0"):
        decode(cut, [], ["w2"])
    with pytest.raises(ValueError, match=r"window 0 has 5 tokens, but logits of \(4,\) and \(5,\)"):
        decode(cut, [(np.zeros(4), np.zeros(5))], ["w2"])
    with pytest.raises(ValueError, match="logits of window 0 are not finite"):
        decode(cut, [(np.full(5, np.nan), np.zeros(5))], ["w2"])
    with pytest.raises(ValueError, match="window 0 is of question 0 of 0"):
        decode(cut, [good], [])
    with pytest.raises(ValueError, match=r"no window of question 1 \(1 in all\)"):
        decode(cut, [good], ["w2", "w3"])
    with pytest.raises(ValueError, match="n_best is 0"):
        decode(cut, [good], ["w2"], n_best=0)


def tokens_cover_the_text(tokenizer: Any, contexts: list[str]) -> None:
    """Every character that is not white is in a token, and no token reaches outside its context."""
    cut = windows(tokenizer, ["Where?"] * len(contexts), contexts, max_length=64, stride=16)
    seen = [set(i for i, c in enumerate(context) if c.isspace()) for context in contexts]
    for window, spans in zip(cut, covered(cut), strict=True):
        seen[window.question_index].update(i for start, end in spans for i in range(start, end))
    assert seen == [set(range(len(context))) for context in contexts]


def squad_contexts() -> list[str]:
    parsed = json.loads(real_data("data/squad2/validation.json").read_text("utf-8"))
    paragraphs = [p["context"] for article in parsed["data"] for p in article["paragraphs"][:15]]
    return [*paragraphs, "  Émile 😀😀 — naïve  café\n\n 👩‍👩‍👧 x"]


def test_real_bert_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_data("models/minilm-l6-squad2"))
    tokens_cover_the_text(tokenizer, squad_contexts())
    same_as_overflow(tokenizer, "Who is it?", squad_contexts()[0] * 3, 100, 30)


def test_real_roberta_tokenizer() -> None:
    tokenizer = RobertaTokenizerFast.from_pretrained(real_data("models/roberta-base-tokenizer"))
    tokens_cover_the_text(tokenizer, squad_contexts())
    context = "It was  Émile 😀, they said."
    (window,) = windows(tokenizer, ["Who?"], [context])
    spans = covered([window])[0]
    first = next(i for i, (start, _) in enumerate(spans) if start == context.index("É"))
    last = max(i for i, (_, end) in enumerate(spans) if end == context.index(","))
    (decoded,) = decode([window], [logits_for(window, first, last)], [context])
    assert decoded.best.answer == "Émile 😀"


def piecewise(
    tokenizer: Any, context: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Any], list[Any]]:
    """The windows of a context tokenised whole, and piece by piece."""
    found = []
    for size in (windows_module.PIECE, piece):
        with monkeypatch.context() as patch:
            patch.setattr(windows_module, "PIECE", size)
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
    monkeypatch.setattr(windows_module, "PIECE", 10)
    context = " " * 35 + "w5" + " " * 50 + "w6" + "\n" * 30
    (window,) = windows(word_tokenizer(), ["w1"], [context])
    assert window.offsets[slice(*window.context_range)].tolist() == [[35, 37], [87, 89]]
    (window,) = windows(word_tokenizer(), ["w1"], [" " * 100])
    assert window.context_range == (0, 0)
