"""Questions with other windows' texts, which nobody labelled: how they are made, batched and learned from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs import changed, job_settings
from matching import trained_model
from pruned_trainer.jobs.job import start
from pruned_trainer.jobs.prune import prune
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.tasks.options import STRIDE
from pruned_trainer.training.batches import Both, LengthGroupedSampler
from pruned_trainer.training.cross_pairs import CrossPairs
from pruned_trainer.training.distillation import Distillation

CLS, SEP = 101, 102


def _window(question: list[int], text: list[int], middle: int = 1) -> dict[str, np.ndarray]:
    ids = np.array([CLS, *question, *[SEP] * middle, *text, SEP], np.int32)
    types = (np.arange(len(ids)) > len(question) + 1).astype(np.int32)
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": np.ones_like(ids)}


def test_a_pair_is_a_question_and_another_text() -> None:
    windows = [{**_window([n, n], [50 + n] * (n + 1)), "start_positions": 3} for n in range(1, 9)]
    pairs = CrossPairs(windows, 2.0, SEP, 9, seed=1)
    assert len(pairs) == 16 and len(pairs[3:5]) == 2
    asked = set()
    for pair, first, second in zip(pairs, pairs.first, pairs.second, strict=True):
        question, text = first + 1, 50 + second + 1
        whole = [CLS, question, question, SEP, *[text] * (second + 2), SEP]
        assert pair["input_ids"].tolist() == (whole if len(whole) <= 9 else [*whole[:8], SEP])
        assert pair["token_type_ids"].tolist() == [0] * 4 + [1] * (len(pair["input_ids"]) - 4)
        assert pair.keys() == {"input_ids", "token_type_ids", "attention_mask"}
        asked.add(question)
    assert asked == set(range(1, 9))  # each question as often as any other
    again = CrossPairs(windows, 2.0, SEP, 9, seed=1)
    assert again.second == pairs.second and CrossPairs(windows, 2.0, SEP, 9, seed=2).second != pairs.second


def test_two_separators_between_the_texts_and_no_types() -> None:
    """As RoBERTa has them."""
    windows = [_window([n], [50 + n], middle=2) for n in (1, 2, 3)]
    for window in windows:
        del window["token_type_ids"]
    pairs = CrossPairs(windows, 1.0, SEP, 99)
    for pair, first, second in zip(pairs, pairs.first, pairs.second, strict=True):
        assert pair["input_ids"].tolist() == [CLS, first + 1, SEP, SEP, 51 + second, SEP]


def test_a_window_without_a_second_text_makes_pairs_all_the_same() -> None:
    """A question of SQuAD whose context is empty has none: training ended where it was drawn."""
    windows = [_window([1], []), _window([2], [52])]
    pairs = CrossPairs(windows, 8.0, SEP, 99)
    assert {*pairs.second} == {0, 1}
    for pair, first, second in zip(pairs, pairs.first, pairs.second, strict=True):
        question = [CLS, 1, SEP, SEP] if first == 0 else [CLS, 2, SEP]
        assert pair["input_ids"].tolist() == [*question, *([] if second == 0 else [52, SEP])]


def test_one_text_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="the windows hold one text each"):
        CrossPairs([{"input_ids": np.array([CLS, 5, SEP])}], 1.0, SEP, 99)


def test_a_batch_is_of_one_kind() -> None:
    kinds = [0] * 21 + [1] * 10
    sampler = LengthGroupedSampler(list(range(31)), 4, 0, kinds=kinds)
    rows = list(sampler)
    assert len(rows) == len(sampler) == 28
    batches = [{kinds[row] for row in rows[start : start + 4]} for start in range(0, 28, 4)]
    assert sorted(map(tuple, batches)) == [(0,)] * 5 + [(1,)] * 2


def test_each_epoch_has_its_own_order_which_a_resumed_run_finds_again() -> None:
    """Full batches of either kind: 1 and 1 of 15 and 15 windows, and not 3 of 30."""
    steps = [0]
    sampler = LengthGroupedSampler([9] * 30, 10, 0, lambda: steps[0], kinds=[0] * 15 + [1] * 15)
    orders = []
    for step in range(4):
        steps[0] = step
        orders.append(list(sampler))
    assert sampler.batches == 2 and orders[0] == orders[1] != orders[2] == orders[3]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PruneSettings:
    one = job_settings(tmp_path_factory.mktemp("pairs"), trained_model(steps=1))
    return changed(
        one, recipe="random", gate_steps=None, retrain_steps=None, retrain_epochs=1.0, cross_pairs=0.5
    )


def test_a_job_trains_on_them(settings: PruneSettings) -> None:
    job = start(settings)
    data = job.retrain_data
    assert isinstance(data, Both) and len(data) == 900 and len(job.gate_train) == 600
    assert "start_positions" in data[599] and "start_positions" not in data[600]
    assert max(len(data[row]["input_ids"]) for row in range(600, 900)) <= settings.max_length
    report = prune(settings)
    assert report["plan"]["retrain_steps"] == 29  # an epoch of both, in batches of 32
    # Some steps have no loss on labels: the mean is below that of the same run without them.
    log = report["training"]["retrain"]
    assert min(entry["loss_task"] for entry in log if "loss_task" in entry) == 0
    assert min(entry["loss_logits"] for entry in log if "loss_task" in entry) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_pairs": -1.0}, "cross_pairs is -1.0"),
        ({"shuffled_texts": -1.0}, "shuffled_texts is -1.0"),
        ({"distil_in": "gates"}, "no teacher teaches in the retrain phase"),
        (
            {"distillation": Distillation.none()},
            "cross_pairs have no labels, and no teacher teaches",
        ),
        ({"cross_pairs": 0.0, "masked_texts": 1.0, "distil_in": "none"}, "masked_texts have no labels"),
        (
            {"task": "text-classification", "stride": STRIDE},
            "cross_pairs are of a question and a text: for squad",
        ),
    ],
)
def test_refusals(settings: PruneSettings, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(settings, **changes)


def test_too_few_for_a_batch(settings: PruneSettings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="600 windows and 6 unlabelled ones made of them: a batch of 32"):
        start(replace(settings, cross_pairs=0.01))
