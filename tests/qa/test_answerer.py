"""QuestionAnswerer says what the trainer's evaluation says, whatever the order, the length and the text."""

from __future__ import annotations

import copy
import math
import multiprocessing
import pickle
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertModel, BertTokenizerFast

import pruned_ops
from head_models import stock
from inputs import pruned_model, stock_model
from pruned_ops import Answer, QuestionAnswerer
from pruned_ops.cli import main
from pruned_ops.models.configuration import ScoreCalibration
from pruned_ops.models.natural_questions import with_answer_types
from pruned_ops.qa import answerer
from pruned_ops.qa.decoding import Decoded, decode
from pruned_ops.qa.logits import predict_logits
from pruned_ops.qa.windows import RefusedQuestion, cut_each, windows
from real_data import real_data
from thorough import EVERYTHING
from tiny_tokenizers import byte_tokenizer, word_tokenizer, words

HUNG = 300  # seconds after which a thread or a child is taken to hang
QUESTIONS = [words(1 + i % 4) for i in range(40)]
# Around one window of 80 tokens, many of them, and none.
CONTEXTS = [" ".join(f"w{(7 * i + j) % 96}" for j in range((0, 5, 70, 76, 300)[i % 5])) for i in range(40)]


def answerer_of(kind: str, **options: Any) -> QuestionAnswerer:
    """A small random model of 80 positions with a tokenizer that fits it."""
    if kind == "roberta":
        model = stock_model("roberta", vocab_size=300, max_position_embeddings=82)
        return QuestionAnswerer(model, byte_tokenizer(), **options)
    return QuestionAnswerer(pruned_model(), word_tokenizer(96), **options)


def close(found: list[Answer], expected: list[Answer]) -> bool:
    """The same answers; in another batch a logit may round differently."""
    assert [(a.answer, a.start, a.end) for a in found] == [(a.answer, a.start, a.end) for a in expected]
    return [a.score for a in found] == pytest.approx([a.score for a in expected], abs=1e-5)


def evaluated(one: QuestionAnswerer, questions: list[str], contexts: list[str]) -> list[Decoded]:
    """As the trainer's evaluation does it: all windows, all logits, then all answers."""
    cut = windows(one.tokenizer, questions, contexts, one.reading.max_length, one.reading.stride)
    return decode(cut, predict_logits(one.model, cut, 5, one.model.config.pad_token_id), contexts)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_answers_are_the_evaluations_however_batches_fall(kind: str) -> None:
    one = answerer_of(kind, tokens_per_batch=100, null_score_threshold=-0.3)
    expected = [each.answer(-0.3) for each in evaluated(one, QUESTIONS, CONTEXTS)]
    for found in (
        one.answer(QUESTIONS, CONTEXTS),
        list(one.stream(zip(QUESTIONS, CONTEXTS, strict=True), progress=False)),
        [one.answer(q, c) for q, c in zip(QUESTIONS, CONTEXTS, strict=True)],
    ):
        assert [(a.answer, a.start, a.end) for a in found] == [(a.answer, a.start, a.end) for a in expected]
    assert 0 < sum(a.answer == "" for a in expected) < len(expected)


def test_one_text_with_many_questions_and_the_other_way_round() -> None:
    one = answerer_of("bert")
    assert close(one.answer(QUESTIONS[:3], CONTEXTS[2]), [one.answer(q, CONTEXTS[2]) for q in QUESTIONS[:3]])
    assert close(one.answer(QUESTIONS[0], CONTEXTS[:3]), [one.answer(QUESTIONS[0], c) for c in CONTEXTS[:3]])
    assert one.answer([], []) == [] == one.answer([], "w1")
    top = one.answer("w1", CONTEXTS[4], top_k=30)
    assert len(top) == 30 and top[0] == one.answer("w1", CONTEXTS[4], top_k=1)[0]
    assert [a.score for a in top] == sorted((a.score for a in top), reverse=True)


def test_a_long_text_and_a_long_stream_are_not_held() -> None:
    context = words(300) * 700  # a megabyte, 200,000 tokens
    tracemalloc.start()
    (cut,) = cut_each(word_tokenizer(), ["w1"], [context], 384, 128, [0])
    count = sum(1 for _ in cut)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 700 and peak < 10e6, (
        peak
    )  # all its windows take more than 10 MB, all its tokens' objects 40
    read = 0

    def records() -> Iterator[dict[str, str]]:
        nonlocal read
        while read < 4000:
            read += 1
            yield {"question": "w1", "context": "w2 w3", "more": "ignored"}

    stream = answerer_of("bert").stream(records(), progress=False)
    assert next(stream) is not None and read <= 3 * 512  # one block is computed, one cut and one read
    assert sum(1 for _ in stream) == 3999


@settings(deadline=None, max_examples=150)
@given(
    question=st.text(max_size=4), context=st.text(max_size=150), kind=st.sampled_from(["bytes", "wordpiece"])
)
def test_spans_are_of_the_text_given(question: str, context: str, kind: str) -> None:
    one = UNICODE[kind]
    for found in (one.answer(question, context, top_k=5), one.answer(question, context, 5, allow_none=False)):
        assert 1 <= len(found) <= 5
        for answer in found:
            assert answer.answer == context[answer.start : answer.end] == answer.answer.strip()
            assert 0 <= answer.score <= 1
        assert sum(answer.score for answer in found) <= 1 + 1e-9
    tokens = one.tokenizer(context, add_special_tokens=False)["input_ids"]
    assert all(answer.answer for answer in found) == bool(tokens and context.strip())


def wordpiece_tokenizer() -> BertTokenizerFast:
    """BERT's own, without accents and control characters, for letters of three scripts."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?אבגדהוזשםםוע界世"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(letters)]
    vocab += [f"##{letter}" for letter in dict.fromkeys(letters)]
    return BertTokenizerFast(vocab={token: i for i, token in enumerate(vocab)})


UNICODE = {
    "bytes": answerer_of("roberta", max_length=40),
    "wordpiece": QuestionAnswerer(stock_model(vocab_size=150), wordpiece_tokenizer(), max_length=30),
}


@pytest.mark.parametrize(
    "context",
    [
        "",
        " \n\t",
        "\x00\x01\x7f",
        "a\x00b\u200bc",
        "שלום עולם, מה שלומך?",
        "\u202eabc\u202c",
        "e\u0301 👩‍👩‍👧 😀" * 30,
    ],
)
def test_odd_texts_are_answered(context: str) -> None:
    for one in UNICODE.values():
        answer = one.answer("who?", context, allow_none=False)
        assert answer.answer == context[answer.start : answer.end]
    if not context.strip():
        assert answer == Answer("", 1.0, 0, 0)


@pytest.mark.parametrize("word", ["cafe\u0301", "שבו\u05b9ם\u05b4"])
def test_an_answer_has_the_marks_of_its_last_letter(word: str) -> None:
    """BERT's tokenizer strips those that are characters of their own, and leaves them out of its tokens."""
    context = f"un {word} x"
    (window,) = windows(wordpiece_tokenizer(), ["who"], [context])
    first, last = window.context_range
    logits = np.zeros((2, len(window)), np.float32)
    logits[0, first + 2] = logits[1, last - 2] = 5.0  # "u", "##n", the word's letters, "x"
    (decoded,) = decode([window], [(logits[0], logits[1])], [context])
    assert decoded.best == Answer(word, 10.0, 3, 3 + len(word))


def test_what_cannot_be_asked_is_named() -> None:
    one = answerer_of("bert")
    for question, context, error, message in (
        (None, "w1", TypeError, "question is a NoneType"),
        ("w1", b"w2", TypeError, "context is a bytes"),
        (["w1", "w2"], ["w1"], ValueError, "2 questions, but 1 contexts"),
        (["w1", 5], "w1", RefusedQuestion, "question 1 has int for its question"),
        (
            "w1",
            "w2 \ud83d",
            RefusedQuestion,
            r"question 0 .* context has half a surrogate pair \(U\+D83D\) at .* 3",
        ),
        (["w1", words(79)], words(90), RefusedQuestion, r"question 1 is too long: .* of max_length 80"),
    ):
        with pytest.raises(error, match=message):
            one.answer(question, context)
    for top_k in (0, True, "2"):
        with pytest.raises(ValueError, match="top_k is"):
            one.answer("w1", "w2", top_k)
    with pytest.raises(TypeError, match="records are a str"):
        one.stream("w1")


def test_a_batch_is_larger_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 tokens leave most of it idle."""
    tokenizer = word_tokenizer(96)
    assert QuestionAnswerer(stock_model(), tokenizer).reading.tokens_per_batch == 4096
    monkeypatch.setattr(answerer, "checked_device", torch.device)
    monkeypatch.setattr(answerer, "optimize", lambda model, dtype: model)
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, *_: model)
    for options, tokens in (({}, 16384), ({"tokens_per_batch": 100}, 100)):
        one = QuestionAnswerer(stock_model(), tokenizer, device="cuda", **options)
        assert one.reading.tokens_per_batch == tokens


def test_a_tokenizer_may_be_named_by_its_folder(tmp_path: Path) -> None:
    stock_model().save_pretrained(tmp_path)
    word_tokenizer(96).save_pretrained(tmp_path)
    expected = QuestionAnswerer(stock_model(), word_tokenizer(96)).answer("w1", words(20))
    assert QuestionAnswerer(stock_model(), str(tmp_path)).answer("w1", words(20)) == expected
    by_folder = pruned_ops.pipeline("question-answering", stock_model(), tmp_path)("w1", words(20))
    assert by_folder["answer"] in words(20)


def test_what_cannot_be_set_is_named(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(96)
    for options, message in (
        ({"max_length": 81}, "windows of 81 tokens are too long: the model takes sequences of 80"),
        ({"stride": 80}, "stride 80"),
        ({"stride": 26.5}, "stride is 26.5: an integer is needed"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        ({"max_answer_tokens": 1.5}, "max_answer_tokens is 1.5"),
        ({"null_score_threshold": math.nan}, "null_score_threshold is nan"),
        ({"device": "nowhere"}, "device nowhere cannot be used here"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
    ):
        with pytest.raises(ValueError, match=message):
            QuestionAnswerer(stock_model(), tokenizer, **options)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        QuestionAnswerer(tmp_path / "none")
    stock_model().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        QuestionAnswerer(tmp_path)
    for kind in ("sequence", "token"):
        with pytest.raises(
            ValueError, match="Classification gives no start and end logits.*pruned_ops.optimize"
        ):
            QuestionAnswerer(stock("bert", kind), tokenizer)
    with pytest.raises(ValueError, match="BertModel gives no start and end logits"):
        QuestionAnswerer(BertModel(stock_model().config), tokenizer)
    with pytest.raises(ValueError, match="pass its tokenizer"):
        QuestionAnswerer(stock_model())
    model = stock_model()
    model.config.score_calibration = {"temperature": 0, "other": 1}
    with pytest.raises(ValueError, match="temperature is 0"):
        QuestionAnswerer(model, tokenizer)


def test_the_stream_answers_all_that_comes_before_an_error() -> None:
    one = answerer_of("bert")
    good = {"question": "w1", "context": words(50)}

    def broken() -> Iterator[Any]:
        yield from [good] * 3
        raise OSError("the disk is gone")

    for records, error in ((broken(), OSError), ([good] * 3 + [{"question": "w1"}, good], RefusedQuestion)):
        found = []
        with pytest.raises(error):
            for answer in one.stream(records, progress=False):
                found.append(answer)
        assert close(found, [one.answer("w1", words(50))] * 3)
    mixed = [good, 5, {**good, "question": words(78)}, ("w1", words(50))]
    kept = list(one.stream(mixed, progress=False, keep_refused=True))
    assert close([kept[0], kept[3]], [found[0]] * 2)
    assert [each.index for each in kept[1:3]] == [1, 2] and "is a int" in str(kept[1])


def test_a_refused_entry_does_not_cost_the_others() -> None:
    one = answerer_of("bert")
    questions: list[Any] = ["w1", None, words(79), "w2"]
    found = one.answer(questions, words(90), keep_refused=True)
    assert [type(each) for each in found] == [Answer, RefusedQuestion, RefusedQuestion, Answer]
    assert [each.index for each in found[1:3]] == [1, 2]
    assert close([found[0], found[3]], one.answer(["w1", "w2"], words(90)))
    for refused in found[1:3]:  # as a pool of processes hands them over
        for same in (pickle.loads(pickle.dumps(refused)), copy.deepcopy(refused)):
            assert type(same) is RefusedQuestion and str(same) == str(refused)
            assert (same.index, same.reason) == (refused.index, refused.reason)


def test_a_question_may_wait_for_the_answer_to_the_one_before() -> None:
    """A person, or a queue: the next record comes only after the last one's answer, or its refusal."""
    one = answerer_of("bert")
    answers: Queue[Any] = Queue()

    def person() -> Iterator[Any]:
        for record in (("w1", words(20)), ("w2", words(200)), ("w3", None), ("w4", words(9))):
            yield record
            answers.get(timeout=HUNG)

    found = []
    for answer in one.stream(person(), progress=False, keep_refused=True):
        found.append(answer)
        answers.put(answer)
    assert [type(each) for each in found] == [Answer, Answer, RefusedQuestion, Answer]
    assert close(found[:2], one.answer(["w1", "w2"], [words(20), words(200)]))


def test_who_stops_early_ends_the_threads() -> None:
    """One is blocked in the caller's generator until that goes on, and then ends, and lets go of it."""
    one, go_on, is_closed = answerer_of("bert"), Event(), Event()

    def endless() -> Iterator[Any]:
        try:
            yield "w1", words(5)
            go_on.wait(HUNG)
            yield "w2", words(5)
            raise AssertionError("nobody asked for a third")
        finally:
            is_closed.set()

    before = set(threading.enumerate())
    stream = one.stream(endless(), progress=False)
    next(stream)
    stream.close()
    (reader,) = set(threading.enumerate()) - before
    assert reader.daemon
    go_on.set()
    reader.join(HUNG)
    assert not reader.is_alive() and is_closed.is_set()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_answers_whatever_other_threads_did_at_the_fork() -> None:
    """Here another thread is at work with the tokenizer, whose lock it holds."""
    one = answerer_of("bert")
    expected = one.answer("w1", words(20))
    stream = one.stream([("w1", words(20))] * 2, progress=False)
    next(stream)

    def child(sender: Any) -> None:
        with pytest.raises(RuntimeError, match="this stream was begun in process .* of the child's own"):
            next(stream)
        answer = one.answer("w1", words(20))
        sender.send((answer.answer, answer.start, answer.end))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender,))
    with one.lock:
        process.start()
    assert receiver.poll(HUNG), "the forked child hangs"
    assert receiver.recv() == (expected.answer, expected.start, expected.end)
    process.join(HUNG)
    assert process.exitcode == 0 and next(stream).answer == expected.answer


def test_a_data_set_with_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    one = answerer_of("bert")
    rows = datasets.Dataset.from_dict({"id": list(range(40)), "question": QUESTIONS, "context": CONTEXTS})
    assert list(one.stream(rows)) == one.answer(QUESTIONS, CONTEXTS)
    assert "40/40" in capsys.readouterr().err


def test_several_threads_may_ask_at_once() -> None:
    one = answerer_of("bert")
    expected = one.answer(QUESTIONS, CONTEXTS)
    with ThreadPoolExecutor(4) as pool:
        assert all(
            found == expected for found in pool.map(lambda _: one.answer(QUESTIONS, CONTEXTS), range(8))
        )


def test_the_checkpoints_threshold_and_calibration_decide(tmp_path: Path) -> None:
    model = pruned_model()
    model.config.null_score_threshold, model.config.score_calibration = (
        1e9,
        {"temperature": 2.0, "other": 3.0},
    )
    model.save_pretrained(tmp_path)
    word_tokenizer(96).save_pretrained(tmp_path)
    one = QuestionAnswerer(tmp_path, device="cpu")
    assert (one.null_score_threshold, one.calibration) == (1e9, ScoreCalibration(2.0, 3.0))
    found = one.answer(QUESTIONS[1:], CONTEXTS[1:], top_k=18)
    assert all(bool(answers[0].answer) == (len(answers) > 1) for answers in found)
    assert [a.score for a in one.answer("w1", words(5), top_k=30) if not a.answer] == [0.0]
    assert all(
        sum(a.score for a in answers) < 1 and answers[0].score <= 0.25
        for answers in found
        if len(answers) > 1
    )
    never = QuestionAnswerer(tmp_path, device="cpu", null_score_threshold=-1e9)
    assert all(answer.answer == "" for answer in never.answer(QUESTIONS, CONTEXTS))
    assert never.answer(QUESTIONS[3], CONTEXTS[3], allow_none=False).answer != ""


def test_a_natural_questions_model_answers_like_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its answer types, which come after the start and end logits, are not read."""
    plain = stock_model()
    typed, tokenizer = with_answer_types(plain), word_tokenizer(96)
    typed.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = QUESTIONS[1:4], CONTEXTS[1:4]
    expected = QuestionAnswerer(plain, tokenizer).answer(*asked, allow_none=False)
    answers = QuestionAnswerer(typed, tokenizer).answer(*asked, allow_none=False)
    assert [(a.answer, a.start, a.end) for a in answers] == [(a.answer, a.start, a.end) for a in expected]
    text = tmp_path / "text"
    text.write_text(CONTEXTS[1])
    argv = ["ask", tmp_path, "--question", "w1", "--context-file", text, "--device", "cpu"]
    assert main(list(map(str, argv))) == 0
    assert '"line": 1' in capsys.readouterr().out


def test_a_model_passed_in_is_optimised_in_place() -> None:
    model = stock_model()
    one = QuestionAnswerer(model, word_tokenizer(96))
    before = one.answer("w1", words(20))
    assert one.model is model
    for same in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):  # as for a pool of processes
        assert same.model is not model and same.answer("w1", words(20)) == before
    pruned_ops.restore(model)
    assert one.answer("w1", words(20)).answer == before.answer


def test_f1_on_real_questions_is_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    from pruned_ops.checkpoints.loading import load_model, load_tokenizer
    from pruned_trainer.tasks.squad.metrics import official_metrics, question_scores
    from pruned_trainer.tasks.squad.sources import read_examples
    from pruned_trainer.tasks.squad.task import THRESHOLD, Questions

    examples = read_examples(str(real_data("data/squad2/eval.json")), "validation")
    examples = examples[: 150 if EVERYTHING else 50]
    folder = str(real_data("models/minilm-l6-squad2"))
    threshold = 0.7
    prepared = Questions.cut(examples, load_tokenizer(folder), 384, 128)
    expected = prepared.evaluate(load_model(folder), {THRESHOLD: threshold})
    one = QuestionAnswerer(folder, device="cpu", null_score_threshold=threshold)
    found = one.answer([e.question for e in examples], [e.context for e in examples])
    predictions = {e.id: answer.answer for e, answer in zip(examples, found, strict=True)}
    assert predictions == expected.predictions
    assert official_metrics(examples, question_scores(examples, predictions)) == expected.metrics
