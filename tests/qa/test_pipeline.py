"""Calls of the old question-answering pipeline: same arguments, same results."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from torch.utils.data import Dataset
from transformers import BertTokenizerFast

import pruned_ops
from inputs import stock_model
from int8_anywhere import int8_anywhere
from pruned_ops.qa.pipeline import aligned
from pruned_ops.qa.windows import RefusedQuestion
from tiny_tokenizers import byte_tokenizer, word_tokenizer, words

CONTEXT = words(60)


@pytest.fixture(scope="module")
def qa() -> Any:
    return pruned_ops.pipeline(
        "question-answering", model=stock_model(), tokenizer=word_tokenizer(96), device=-1
    )


def test_every_way_to_ask(qa: Any) -> None:
    one = qa(question="w1 w2", context=CONTEXT)
    assert set(one) == {"score", "start", "end", "answer"} and 0 <= one["score"] <= 1
    assert one["answer"] == CONTEXT[one["start"] : one["end"]] != ""
    record = {"question": "w1 w2", "context": CONTEXT}
    example = SimpleNamespace(question_text="w1 w2", context_text=CONTEXT)
    for same in (
        qa(record), qa([record]), qa("w1 w2", CONTEXT), qa(X=record), qa(data=[record]), qa(example),
        qa(question=["w1 w2"], context=[CONTEXT]),
    ):  # fmt: skip
        assert same == one
    for several in (
        qa([record, record]), qa(record, record), qa([example, record]), qa(data=[record, record]),
        qa(question=["w1 w2", "w1 w2"], context=CONTEXT), qa(question=["w1 w2"] * 2, context=[CONTEXT] * 2),
        qa({"question": ["w1 w2"] * 2, "context": [CONTEXT] * 2}), list(qa(r for r in (record, record))),
    ):  # fmt: skip
        assert [found["answer"] for found in several] == [one["answer"]] * 2


def test_what_a_call_may_say(qa: Any) -> None:
    asked = {"question": "w1", "context": CONTEXT}
    top = qa(**asked, top_k=4)
    assert len(top) == 4 and top[0] == qa(**asked)
    assert [found["score"] for found in top] == sorted((found["score"] for found in top), reverse=True)
    assert qa([asked, asked], top_k=2)[1] == top[:2]
    with pytest.warns(FutureWarning, match="top_k"):
        assert qa(**asked, topk=4) == top
    assert "" not in [found["answer"] for found in qa(**asked, top_k=20)]
    assert all(len(found["answer"].split()) <= 2 for found in qa(**asked, top_k=9, max_answer_len=2))
    assert qa(**asked, top_k=1, batch_size=8, padding="longest", num_workers=2) == top[0]
    assert qa(question="w1 w2", context=CONTEXT, max_question_len=1) == qa(**asked)
    # Short windows: none of them sees the whole of the text.
    answers = qa(**asked, max_seq_len=20, doc_stride=4, top_k=20)
    assert all(found["answer"] == CONTEXT[found["start"] : found["end"]] for found in answers)
    model = qa.model
    assert pruned_ops.pipeline("question-answering", model, word_tokenizer(96), top_k=4)(**asked) == top


def test_no_answer_is_one_where_the_call_allows_it() -> None:
    model = stock_model()
    model.config.null_score_threshold = -1e9
    qa = pruned_ops.pipeline("question-answering", model, word_tokenizer(96))
    assert qa("w1", CONTEXT)["answer"] != ""
    none = qa(question="w1", context=CONTEXT, handle_impossible_answer=True)
    assert none == {"score": 1.0, "start": 0, "end": 0, "answer": ""}


def test_what_is_refused_by_name(qa: Any) -> None:
    for task in ("text-classification", "qa"):
        with pytest.raises(ValueError, match=f"no '{task}' pipeline here"):
            pruned_ops.pipeline(task, model=stock_model())
    for arguments, message in (
        ({}, "pass model="),
        ({"model": stock_model()}, "pass its tokenizer"),
        ({"model": stock_model(), "framework": "tf"}, "framework is 'tf'"),
    ):
        with pytest.raises(ValueError, match=message):
            pruned_ops.pipeline("question-answering", **arguments)
    asked = {"question": "w1", "context": "w2"}
    for given, error, message in (
        ({"question": "", "context": "w1"}, ValueError, "question is empty"),
        ({"question": "w1", "context": None}, ValueError, "context is a NoneType"),
        ({"question": "w1"}, ValueError, "question and context are needed; given question"),
        ({**asked, "data": [asked]}, TypeError, "in one way; given data=, and question= and context="),
        ({"X": [asked], "data": [asked]}, TypeError, "in one way; given X=, and data="),
        ({"data": [{"question": "w1"}]}, KeyError, "has no context"),
        ({"data": [5]}, ValueError, "a int is no question"),
        ({"data": 5}, ValueError, "a int is no question"),
        ({"question": ["w1", "w2"], "context": ["w1"]}, ValueError, "2 questions, but 1 contexts"),
        ({**asked, "top_k": 0}, ValueError, "top_k is 0"),
        ({**asked, "max_answer_len": 0}, ValueError, "max_answer_len is 0"),
        (
            {"question": "w1", "context": words(60), "max_seq_len": 30, "doc_stride": 28},
            ValueError,
            "question 0 cannot be cut: the stride of 28 is too large; .* can share 25 of them at most",
        ),
        ({**asked, "doc_stride": 100}, ValueError, "stride 100"),
        ({**asked, "max_seq_len": 40, "doc_stride": 40 / 2}, ValueError, "stride is 20.0: an integer"),
        ({**asked, "max_seq_len": 81}, ValueError, "windows of 81 tokens are too long"),
        ({**asked, "max_anser_len": 3}, TypeError, "takes no max_anser_len; it takes top_k"),
        ({"question": words(90), "context": "w2"}, ValueError, "question 0 is too long"),
    ):
        with pytest.raises(error, match=message):
            qa(**given)
    with pytest.raises(TypeError, match="in one way; given inputs by place, and question= and context="):
        qa([asked], **asked)


def test_a_bad_record_is_named_and_does_not_cost_the_others(qa: Any) -> None:
    good = {"question": "w1 w2", "context": CONTEXT}
    bad = [{**good, "context": ""}, {"question": "w1"}, 5, {**good, "question": words(90)}]
    for number, record in enumerate(bad, 1):
        with pytest.raises(ValueError, match=f"question {number} "):
            qa([good] * number + [record, good])
    with pytest.raises(KeyError, match="^question 1 has no context; a dictionary") as lacks:
        qa([good, {"question": "w1"}])
    assert str(pickle.loads(pickle.dumps(lacks.value))) == str(lacks.value)
    for records in ([good, *bad, good], iter([good, *bad, good])):
        found = list(qa(records, keep_refused=True))
        assert [result.index for result in found[1:-1]] == [1, 2, 3, 4]
        assert found[0]["answer"] == found[-1]["answer"] == qa(good)["answer"]
    half = {**good, "question": "w1 \ud83d"}
    for options in ({}, {"max_question_len": 2}):
        answers = qa([good, half, good], keep_refused=True, **options)
        assert answers[1].index == 1 and "half a surrogate pair (U+D83D)" in str(answers[1])
        assert answers[0]["answer"] == answers[2]["answer"] == qa(good)["answer"]


def test_a_generator_may_wait_for_the_answer_before(qa: Any) -> None:
    answers: Queue[Any] = Queue()

    def person() -> Iterator[Any]:
        for context in (CONTEXT, "", words(9)):
            yield {"question": "w1", "context": context}
            answers.get(timeout=300)

    found = []
    for result in qa(person(), keep_refused=True):
        found.append(result)
        answers.put(result)
    assert [type(result) for result in found] == [dict, RefusedQuestion, dict]


def test_a_data_set_is_not_held(qa: Any) -> None:
    class Rows:
        read = 0

        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, index: int) -> Any:
            self.read += 1
            return {"question": "w1", "context": "w2 w3"}

        def __iter__(self) -> Iterator[Any]:
            return map(self.__getitem__, range(len(self)))

    rows = Rows()
    assert next(qa(rows))["answer"] and rows.read <= 2000


def test_a_data_set_of_torch_is_one(qa: Any) -> None:
    """It has a length and items, and no iterator; this one has an item at any place that is asked for."""

    class Rows(Dataset[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, place: int) -> Any:
            return {"question": f"w{place}", "context": CONTEXT}

    answers, expected = qa(Rows()), qa([Rows()[place] for place in range(3)])
    assert [found["answer"] for found in answers] == [found["answer"] for found in expected]


@pytest.mark.parametrize(
    ("context", "span", "expected"),
    [
        ("กรุงเทพเป็นเมืองหลวงของประเทศไทย", "กรุงเทพ", "กรุงเทพ"),
        ("東京は日本の首都です。", "日本", "日本"),
        ("北京是中国的首都", "中国", "中国"),
        ("ที่นี่คือ Bangkok ครับ", "angko", "Bangkok"),
        ("駅はTokyoです", "oky", "Tokyo"),
        ("서울은 한국의 수도", "한국", "한국의"),  # Korean has spaces
    ],
)
def test_scripts_without_spaces_are_not_widened_to_the_sentence(
    context: str, span: str, expected: str
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    start = context.index(span)
    assert context[slice(*aligned(tokenizer, context, start, start + len(span)))] == expected


def test_whole_words_have_the_marks_of_their_last_letter() -> None:
    """BERT's tokenizer strips an accent that is a character of its own, and leaves it out of the word."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "caf", "##e"]
    wordpiece = BertTokenizerFast(vocab={token: i for i, token in enumerate(pieces)})
    context = "un cafe\u0301, ball"
    assert context[slice(*aligned(wordpiece, context, 3, 6))] == "cafe\u0301"  # "caf"


def test_answers_are_whole_words_unless_asked_otherwise() -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "ball", ",", "un"]
    wordpiece = BertTokenizerFast(vocab={token: i for i, token in enumerate(pieces)})
    context = "ball, unplaying, ball"
    assert context[slice(*aligned(wordpiece, context, 8, 12))] == "unplaying"  # "play"
    assert context[slice(*aligned(wordpiece, context, 3, 8))] == "ball, unplaying"
    assert aligned(wordpiece, context, 0, 4) == (0, 4)
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert aligned(tokenizer, "a naïve 😀 b", 4, 5) == (2, 7)
    qa = pruned_ops.pipeline(
        "question-answering", stock_model("roberta", vocab_size=300, max_position_embeddings=82), tokenizer
    )
    asked = {"question": "q", "context": "alpha beta gamma delta", "top_k": 5, "max_answer_len": 2}
    assert {found["answer"] for found in qa(**asked)} <= set("alpha beta gamma delta".split())
    assert not {found["answer"] for found in qa(**asked, align_to_words=False)} <= set(
        asked["context"].split()
    )


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("make", [pruned_ops.pipeline, pruned_ops.QuestionAnswerer])
def test_an_int8_model_stays_what_its_calibration_made_of_it(make: Any, whole: bool) -> None:
    """Nobody asks for a dtype; with an encoder that was optimised alone, the head is added to it."""
    task = ["question-answering"] if make is pruned_ops.pipeline else []
    model, tokenizer = stock_model(), word_tokenizer(96)
    texts = [words(1 + i % 4) for i in range(8)], [words(5 + 3 * i) for i in range(8)]
    inputs = dict(tokenizer(*texts, padding=True, return_tensors="pt"))
    part = model if whole else model.bert
    with int8_anywhere(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        pruned_ops.optimize(part, dtype="int8", calibration=[inputs], tolerance=0.06)
        chosen, errors = model.bert.packed.encoder.int8_linears, part.int8_errors
        makers = [make(*task, model, tokenizer, dtype=dtype) for dtype in (None, "int8")]
        answerers = [getattr(maker, "answerer", maker) for maker in makers]
        answers = [answerer.answer(*texts) for answerer in answerers]
        assert 0 < len(chosen) < 12 and model.bert.packed.encoder.int8_linears == chosen
        assert part.int8_errors == errors and answers[0] == answers[1]
        with pytest.raises(ValueError, match="in another dtype"):
            make(*task, model, tokenizer, dtype="bfloat16")
