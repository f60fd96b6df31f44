"""SQuAD files and their refusals, the official metric, the null threshold, features, logits, intervals."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruned_ops.qa.decoding import Answer, Decoded
from pruned_ops.qa.questions import answer_scores, normalised_answer
from pruned_ops.qa.windows import Window, windows
from pruned_trainer.tasks import squad
from pruned_trainer.tasks.squad.task import SquadTask
from real_data import real_data
from tiny_tokenizers import byte_tokenizer, word_tokenizer, words

CONTEXT = "The cat 😀 sat on the mat."


def entry(key: str, *answers: tuple[str, int], **fields: Any) -> dict[str, Any]:
    listed = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": key, "question": f"{key}?", "answers": listed, **fields}


def squad_file(*entries: dict[str, Any], context: str = CONTEXT, title: str = "Cats") -> dict[str, Any]:
    article = {"title": title, "paragraphs": [{"context": context, "qas": list(entries)}]}
    return {"version": "v2.0", "data": [article]}


GOOD = squad_file(entry("q0", ("cat", 4)), entry("q1", is_impossible=True))


def examples(*answers: str) -> list[squad.Example]:
    """Questions q0, q1, ...: with the given answer, or impossible where it is ""."""
    gold = [(squad.GoldAnswer(text, 0),) if text else () for text in answers]
    return [squad.Example(f"q{i}", "t", "?", text, gold[i], not text) for i, text in enumerate(answers)]


def decoded(text: str, margin: float) -> Decoded:
    return Decoded((Answer(text, 1.0, 0, len(text)),), 1.0 + margin)


def test_reads_squad_2_and_squad_1(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(GOOD))
    read = squad.load_squad(path)
    assert read.parsed == GOOD and read.path == path
    answers = (squad.GoldAnswer("cat", 4),)
    assert read.examples[0] == squad.Example("q0", "Cats", "q0?", CONTEXT, answers, is_impossible=False)
    assert (read.examples[1].answers, read.examples[1].is_impossible) == ((), True)
    assert squad.parse_squad(squad_file(entry("q0", ("sat", 10))))[0].answers == (("sat", 10),)


def test_refuses_what_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        squad.load_squad(tmp_path / "absent.json")
    path = tmp_path / "broken.json"
    for content, message in ((b"", "the file is empty"), (b"{", "line 1"), (b"\xff", "decode byte 0xff")):
        path.write_bytes(content)
        with pytest.raises(squad.SquadFormatError, match=rf"broken\.json: not JSON: .*{message}"):
            squad.load_squad(path)


PLACE = r"gold: article 0 \('Cats'\), paragraph 0"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), [], "gold: an object with 'data' is needed, not list"),
        (("data",), None, "gold: no 'data'"),
        (("data",), {}, "gold: 'data' has type dict, not list"),
        (("data",), [], "gold: no questions at all"),
        (("data", 0), "text", "gold: article 0: an object is needed, not str"),
        (("data", 0, "title"), None, "gold: article 0: no 'title'"),
        (("data", 0, "paragraphs"), 3, r"gold: article 0 \('Cats'\): 'paragraphs' has type int, not list"),
        (("data", 0, "paragraphs", 0, "context"), None, f"{PLACE}: no 'context'"),
        (("data", 0, "paragraphs", 0, "qas", 0, "id"), 7, f"{PLACE}, question 0: 'id' has type int, not str"),
        (("data", 0, "paragraphs", 0, "qas", 0, "question"), None, f"{PLACE}, question 'q0': no 'question'"),
        (("data", 0, "paragraphs", 0, "qas", 0, "answers"), None, f"{PLACE}, question 'q0': no 'answers'"),
        (("data", 0, "paragraphs", 0, "qas", 1, "id"), "q0", "question 'q0': this id appears twice"),
        (("data", 0, "paragraphs", 0, "qas", 1, "is_impossible"), "no", "has type str, not bool"),
        (("data", 0, "paragraphs", 0, "qas", 0, "answers", 0, "answer_start"), True, "has type bool"),
        (("data", 0, "paragraphs", 0, "qas", 0, "answers", 0, "text"), None, "'q0', answer 0: no 'text'"),
    ],
)  # fmt: skip
def test_refuses_other_layouts_and_names_the_place(path: tuple[Any, ...], value: Any, message: str) -> None:
    parsed: Any = copy.deepcopy(GOOD)
    if not path:
        parsed = value
    else:
        holder = parsed
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
        if value is None:
            del holder[path[-1]]
    for mode in ("raise", "keep"):
        with pytest.raises(squad.SquadFormatError, match=message):
            squad.parse_squad(parsed, on_bad_answer=mode)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (entry("q", ("cat", -1)), "answer_start -1 is outside the context of 25 characters"),
        (entry("q", ("cat", 25)), "answer_start 25 is outside"),
        (entry("q", ("cat", 5)), "answer 'cat' is not at 5; there stands 'at '"),
        (entry("q", ("mat. And", 21)), "answer 'mat. And' is not at 21; there stands 'mat.'"),
        (entry("q", (" ", 3)), "an answer is empty"),
        (entry("q", is_impossible=False), "'is_impossible' is false, but it has 0 answers"),
        (entry("q", ("cat", 4), is_impossible=True), "'is_impossible' is true, but it has 1 answers"),
    ],
)
def test_refuses_bad_answers_unless_told_to_keep_them(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(squad.SquadFormatError, match=f"{PLACE}, question 'q': {message}"):
        squad.parse_squad(squad_file(bad))
    assert len(squad.parse_squad(squad_file(bad), on_bad_answer="keep")) == 1


def moved(text: str, start: int, context: str) -> squad.GoldAnswer | str:
    """The answer as a repairing reader takes it, or its refusal."""
    repaired: list[str] = []
    try:
        (example,) = squad.parse_squad(
            squad_file(entry("q", (text, start)), context=context), repaired=repaired
        )
    except squad.SquadFormatError as error:
        assert not repaired
        return str(error)
    (answer,) = example.answers
    assert context[answer.start : answer.start + len(answer.text)] == answer.text
    assert len(repaired) == ((text, start) != answer)
    assert all(f"question 'q': answer {text!r} at {start} is {answer.text!r} at" in one for one in repaired)
    return answer


FACES = "😀 " * 7
LINES = "Åsa and Örjan live in Örebro.\nThey own a boat.\nIt is called Älva."


@pytest.mark.parametrize(
    ("text", "start", "context", "expected"),
    [
        ("lens", 8, "the old lens", ("lens", 8)),
        ("lens", 7, "the old lens", ("lens", 8)),  # a blank before the context was stripped
        ("lens", 12, "the old lens", ("lens", 8)),
        ("lens", 3, "the old lens", ("lens", 8)),  # as far as it may be
        ("5 km long", 3, "is 5\u00a0km\u202flong.", ("5\u00a0km\u202flong", 3)),
        ("5\u00a0km", 3, "is 5 km long.", ("5 km", 3)),
        ("Älva", len(LINES[: LINES.index("Älva")].encode()), LINES, ("Älva", LINES.index("Älva"))),
        ("boat", LINES.index("boat") + 1, LINES, ("boat", LINES.index("boat"))),  # \\r\\n counted as two
        ("called", LINES.index("called"), LINES.replace("\n", "\r\n"), ("called", LINES.index("called") + 2)),
        ("mat", len(f"{FACES} sat on a ".encode("utf-16-le")) // 2, f"{FACES} sat on a mat", ("mat", 24)),
    ],
)  # fmt: skip
def test_answers_are_moved_where_their_place_is_sure(
    text: str, start: int, context: str, expected: tuple[str, int]
) -> None:
    assert moved(text, start, context) == expected


@pytest.mark.parametrize(
    ("text", "start", "context"),
    [
        ("lens", 2, "the old lens"),  # too far
        ("cat", 4, "cat dog cat"),  # as near to one as to the other
        ("at", 3, "the cat sat"),  # parts of words
        ("old", -1, "an old lens"),
        ("lens", 99, "the old lens"),
        ("mat", 8, "the old lens"),
        ("Lens", 7, "the old lens"),
    ],
)
def test_answers_are_refused_where_it_is_not(text: str, start: int, context: str) -> None:
    assert "question 'q': answer" in str(moved(text, start, context))
    skipped = squad.Skipped()
    file = squad_file(entry("q", (text, start)), entry("r", is_impossible=True), context=context)
    (left,) = squad.parse_squad(file, skipped=skipped, repaired=[])
    assert left.id == "r" and len(skipped) == 1 and "question 'q': answer" in skipped.faults[0]


@given(st.text("ab \n\u00a0", max_size=30), st.text("ab \u00a0", min_size=1, max_size=4), st.integers(-2, 40))
def test_a_moved_answer_is_the_only_one_near(context: str, text: str, start: int) -> None:
    answer = moved(text, start, context)
    if isinstance(answer, str):
        return
    plain, sought = (value.replace("\u00a0", " ").replace("\n", " ") for value in (context, text))
    assert plain[answer.start :].startswith(sought)
    if answer != (text, start):
        near = range(max(0, start - 5), start + 6)
        assert [at for at in near if plain.startswith(sought, at)] in ([answer.start], [])


def test_bad_questions_are_skipped_and_counted() -> None:
    parsed = squad_file(
        entry("q0", ("cat", 4)), entry("q0", ("cat", 4)), {"id": 7}, entry("q1", ("dog", 4)), entry("q2")
    )
    parsed["data"] += [{"title": "no paragraphs"}, {"title": "t", "paragraphs": [{"qas": []}, *[
        {"context": CONTEXT, "qas": [entry("q3", ("mat", 21))]}]]}]  # fmt: skip
    skipped = squad.Skipped()
    assert [example.id for example in squad.parse_squad(parsed, skipped=skipped)] == ["q0", "q2", "q3"]
    places = ["question 'q0'", "question 2", "question 'q1'", "article 1", "article 2 ('t'), paragraph 0"]
    assert len(skipped) == 5 and all(any(p in fault for fault in skipped.faults) for p in places)
    with pytest.raises(
        squad.SquadFormatError, match=r"no questions at all \(1 were skipped; the first: gold"
    ):
        squad.parse_squad(squad_file({}), skipped=squad.Skipped())


@pytest.mark.parametrize("make", [word_tokenizer, byte_tokenizer])
def test_blanks_around_a_question_take_no_room(make: Any) -> None:
    """SQuAD's own training file has a question behind 500 blanks."""
    example = squad.parse_squad(squad_file(entry("q", ("cat", 4))))[0]
    blank = dataclasses.replace(example, question=" " * 500 + example.question + "\n\u2003")
    (plain,) = squad.training_features([example], make(), max_length=60, stride=8)
    (feature,) = squad.training_features([blank], make(), max_length=60, stride=8)
    assert all(np.array_equal(feature[name], plain[name]) for name in plain)


def test_a_question_without_room_is_named_or_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    read = squad.parse_squad(squad_file(*(entry(f"q{i}", ("cat", 4)) for i in range(3))))
    long = dataclasses.replace(read[1], question=words(90))
    examples = [read[0], long, read[2]]
    strict, lenient = SquadTask(64, 16), SquadTask(64, 16, skip_bad=True)
    for act in (strict.prepare, strict.features):
        with pytest.raises(squad.SquadFormatError, match="^question 'q1' is too long: .* of max_length 64"):
            act(examples, word_tokenizer())
    assert len(lenient.features(examples, word_tokenizer())) == 2
    prepared = lenient.prepare(examples, word_tokenizer())
    assert [e.id for e in prepared.examples] == ["q0", "q2"]
    assert [window.question_index for window in prepared.windows] == [0, 1]
    counts = lenient.faults.to_json()
    assert (counts["skipped"], counts["repaired"]) == (1, 0) and "question 'q1'" in counts["first"][0]
    assert capsys.readouterr().out.count("bad lines skipped: 1; the first: question 'q1'") == 1
    with pytest.raises(squad.SquadFormatError, match="no question leaves room"):
        lenient.features([long], word_tokenizer())


def test_metric_is_the_official_evaluators() -> None:
    folder = real_data("data/squad2/metric")
    gold, predictions, expected = (
        json.loads((folder / f"{name}.json").read_text("utf-8"))
        for name in ("gold", "predictions", "expected")
    )
    assert squad.squad_metrics(gold, predictions) == pytest.approx(expected, abs=1e-9, rel=0)
    del predictions[next(iter(predictions))]
    with pytest.raises(ValueError, match="1 questions have no prediction: "):
        squad.squad_metrics(gold, predictions)


def test_metric_has_the_parts_that_there_are_and_names_missing_ids() -> None:
    metrics = squad.squad_metrics(GOOD, {"q0": "the cat sat", "q1": "", "other": "x"})
    assert metrics == {
        "exact": 50, "f1": pytest.approx(100 * (1 + 2 / 3) / 2), "total": 2,
        "HasAns_exact": 0, "HasAns_f1": pytest.approx(100 * 2 / 3), "HasAns_total": 1,
        "NoAns_exact": 100, "NoAns_f1": 100, "NoAns_total": 1,
    }  # fmt: skip
    answerable = squad_file(entry("q", ("cat", 4)))
    assert not any("NoAns" in key for key in squad.squad_metrics(answerable, {"q": ""}))
    with pytest.raises(ValueError, match="2 questions have no prediction: q0, q1$"):
        squad.squad_metrics(GOOD, {})


def test_official_rule() -> None:
    assert normalised_answer("The  U.S.A.,\tan Ann a-b “A”") == "usa ann ab “ ”"
    assert answer_scores("The cat!", ["dog", "CAT"]) == (100, 100)
    assert answer_scores("", []) == (100, 100)
    assert answer_scores("cat", []) == (0, 0)
    assert answer_scores("the", []) == (100, 100)  # nothing but an article is nothing
    assert answer_scores("", ["the", "a."]) == (100, 100)  # and so are such answers
    assert answer_scores("cat", ["the", "cat"]) == (100, 100)
    assert answer_scores("", ["cat"]) == (0, 0)
    assert answer_scores("x x y", ["x y y z"])[1] == pytest.approx(100 * 2 * 2 / (3 + 4))


@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from(["b d", "b", "c"]), st.integers(-3, 3)),
        min_size=1,
        max_size=12,
    )
)
def test_threshold_is_as_good_as_any(drawn: list[tuple[bool, str, int]]) -> None:
    questions = examples(*("b" if answerable else "" for answerable, _, _ in drawn))
    candidates = [decoded(text, margin) for _, text, margin in drawn]
    threshold = squad.best_null_threshold(questions, candidates)
    reached = squad.evaluate(questions, candidates, threshold).f1
    tried = [squad.evaluate(questions, candidates, margin / 2).f1 for margin in range(-9, 10)]
    assert np.isfinite(threshold)
    assert reached == pytest.approx(max(tried), abs=1e-9)


def test_threshold_at_the_edges() -> None:
    candidates = [decoded("b", -2.0), decoded("b", 3.0), Decoded((), 0.0)]
    assert squad.best_null_threshold(examples("b", "b", "b"), candidates) == 4.0
    assert squad.best_null_threshold(examples("", "", ""), candidates) == -3.0
    assert squad.best_null_threshold(examples("b", "", ""), candidates) == 0.5
    assert squad.best_null_threshold(examples("b"), [Decoded((), 0.0)]) == 0.0
    close = [decoded("b", -1.0), Decoded((Answer("b", 0.0, 0, 1),), float(np.nextafter(0, 1)))]
    assert squad.best_null_threshold(examples("b", ""), close) < close[1].null_margin
    with pytest.raises(ValueError, match="1 examples, but 0 decoded"):
        squad.best_null_threshold(examples("b"), [])


def test_evaluation_keeps_what_a_report_needs() -> None:
    questions = examples("cat", "cat", "")
    candidates = [decoded("cat", 1.0), decoded("cat dog", -1.0), decoded("x", 1.0)]
    result = squad.evaluate(questions, candidates, threshold=0.0)
    assert result.predictions == {"q0": "", "q1": "cat dog", "q2": ""}
    np.testing.assert_allclose(result.question_f1, [0, 200 / 3, 100])
    np.testing.assert_allclose(result.question_span_f1, [100, 200 / 3])
    assert result.f1_span == pytest.approx(250 / 3)
    assert (result.f1, result.exact) == (result.metrics["f1"], pytest.approx(100 / 3))
    assert squad.evaluate(examples(""), [decoded("x", 0.0)], 0.0).f1_span is None


def test_split_holds_out_whole_articles() -> None:
    sizes = [70, 3, 4, 5, 18]
    places = [(article, i) for article, size in enumerate(sizes) for i in range(size)]
    many = [squad.Example(f"{a}-{i}", f"t{a}", "?", f"c{i}", (), True) for a, i in places]
    train, held = squad.split_articles(many, 0.1, seed=3)
    assert {e.title for e in train}.isdisjoint({e.title for e in held}) and 3 <= len(held) <= 10
    assert sorted(train + held, key=many.index) == many and train == sorted(train, key=many.index)
    assert squad.split_articles(many, 0.1, seed=3) == (train, held)
    assert {e.title for e in squad.split_articles(many, 0.01)[1]} == {"t1"}
    paragraphs = [e for e in many if e.title == "t4"]
    train, held = squad.split_articles(paragraphs, 0.2)
    assert len(held) == 3 and {e.context for e in train}.isdisjoint({e.context for e in held})
    with pytest.raises(ValueError, match="nothing can be held out of 1 paragraphs"):
        squad.split_articles(paragraphs[:1])
    with pytest.raises(ValueError, match="fraction is 1.0"):
        squad.split_articles(many, 1.0)


def test_training_features_point_at_the_first_answer_where_it_is_whole() -> None:
    entries = [entry("q0", ("w9 w10", 27), ("w1", 3)), entry("q1", is_impossible=True)]
    read = squad.parse_squad(squad_file(*entries, context=words(20)))
    features = squad.training_features(read, word_tokenizer(), max_length=14, stride=3)
    # 10 context tokens a window behind [CLS] question [SEP], 7 a step: 0-9, 7-16, 14-19.
    positions = [(f["start_positions"], f["end_positions"]) for f in features]
    assert positions == [(0, 0), (5, 6), (0, 0)] + [(0, 0)] * 3
    assert all(len(f["attention_mask"]) == len(f["input_ids"]) == f["attention_mask"].sum() for f in features)
    emoji = squad.parse_squad(squad_file(entry("q", ("😀 sat", 8))))
    (feature,) = squad.training_features(emoji, byte_tokenizer())
    (window,) = windows(byte_tokenizer(), [emoji[0].question], [CONTEXT])
    start, end = window.offsets[feature["start_positions"], 0], window.offsets[feature["end_positions"], 1]
    assert CONTEXT[start:end] == "😀 sat"


class Echo(torch.nn.Module):
    """Start logit = id of the token, end logit = its type + 10 * unmasked tokens of its row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.lengths: list[int] = []

    def forward(self, input_ids: Any, token_type_ids: Any, attention_mask: Any) -> SimpleNamespace:
        assert not self.training and torch.is_inference_mode_enabled()
        assert (input_ids[attention_mask == 0] == 9).all()
        self.lengths.append(input_ids.shape[1])
        end = token_type_ids + 10 * attention_mask.sum(1, keepdim=True)
        return SimpleNamespace(start_logits=input_ids * self.weight.bfloat16(), end_logits=end * self.weight)


def test_logits_come_back_in_order_without_padding() -> None:
    ids = [np.arange(n, dtype=np.int32) for n in (3, 7, 2, 5, 6)]
    cut = [Window(0, tokens, tokens % 2, np.zeros((len(tokens), 2), np.int32), 0) for tokens in ids]
    model = Echo().train()
    logits = squad.predict_logits(model, cut, batch_size=2, pad_token_id=9, progress=True)
    assert model.lengths == [7, 5, 2] and model.training
    for window, (start, end) in zip(cut, logits, strict=True):
        assert start.dtype == end.dtype == np.float32
        np.testing.assert_array_equal(start, window.input_ids)
        np.testing.assert_array_equal(end, window.token_type_ids + 10 * len(window))
    assert squad.predict_logits(model, []) == []


def test_a_frozen_part_of_a_model_that_trains_stays_in_evaluation_mode() -> None:
    model = Echo().train()
    model.frozen, model.learnt = torch.nn.Dropout().eval(), torch.nn.Dropout()
    window = Window(0, np.arange(3, dtype=np.int32), np.zeros(3, int), np.zeros((3, 2), np.int32), 0)
    squad.predict_logits(model, [window])
    assert (model.training, model.frozen.training, model.learnt.training) == (True, False, True)


def test_bootstrap_interval() -> None:
    random = np.random.default_rng(5)
    first, noise = random.uniform(0, 100, 2000), random.normal(0, 10, 2000)
    low, high = squad.bootstrap_interval(first, first - 3 + noise)
    error = 10 / 2000**0.5
    assert (low, high) == squad.bootstrap_interval(first, first - 3 + noise)
    middle = 3 - noise.mean()
    assert (low, high) == pytest.approx((middle - 1.96 * error, middle + 1.96 * error), abs=0.2 * error)
    assert squad.bootstrap_interval(first, first - 1) == pytest.approx((1, 1))
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\) are no pairs"):
        squad.bootstrap_interval([1, 2], [1, 2, 3])
