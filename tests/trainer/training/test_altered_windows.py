"""Windows with tokens masked or shuffled: what stays in its place, and how a job learns from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jobs import changed, job_settings
from matching import trained_model
from pruned_ops.checkpoints.loading import load_tokenizer
from pruned_trainer.jobs.job import start
from pruned_trainer.jobs.prune import prune
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.training.altered_windows import MASKED, AlteredWindows
from pruned_trainer.training.batches import Both

CLS, SEP, MASK = 101, 102, 103
FIRST, SECOND = list(range(200, 220)), list(range(300, 340))
IDS = np.array([CLS, *FIRST, SEP, *SECOND, SEP], np.int32)
WINDOW = {
    "input_ids": IDS,
    "token_type_ids": (np.arange(len(IDS)) > len(FIRST) + 1).astype(np.int32),
    "attention_mask": np.ones_like(IDS),
    "labels": 1,
}
BOUNDS = (0, len(FIRST) + 1, len(IDS) - 1)


def test_shuffled_tokens_stay_in_their_text() -> None:
    (window,) = AlteredWindows([WINDOW], 1.0, {CLS, SEP}, seed=3)
    ids = window["input_ids"].tolist()
    assert [ids[place] for place in BOUNDS] == [CLS, SEP, SEP]
    first, second = ids[1 : 1 + len(FIRST)], ids[2 + len(FIRST) : -1]
    assert first != FIRST and sorted(first) == FIRST
    assert second != SECOND and sorted(second) == SECOND
    assert window.keys() == WINDOW.keys() - {"labels"}
    assert window["token_type_ids"].tolist() == WINDOW["token_type_ids"].tolist()
    assert IDS[1] == FIRST[0], "the window itself was changed"


def test_a_share_of_each_text_is_masked() -> None:
    windows = AlteredWindows([WINDOW], 2.0, {CLS, SEP}, MASK, seed=3)
    assert len(windows) == len(windows[:]) == 2 and windows.lengths == [len(IDS)] * 2
    for window in windows:
        changed = np.flatnonzero(window["input_ids"] != IDS)
        assert (window["input_ids"][changed] == MASK).all()
        in_first = int((changed <= len(FIRST)).sum())
        assert in_first == round(MASKED * len(FIRST)) == 3
        assert len(changed) - in_first == round(MASKED * len(SECOND)) == 6
    one, other = windows
    assert one["input_ids"].tolist() != other["input_ids"].tolist()
    assert windows[0]["input_ids"].tolist() == one["input_ids"].tolist(), "asked again, it is another"
    again = AlteredWindows([WINDOW], 2.0, {CLS, SEP}, MASK, seed=4)
    assert again[0]["input_ids"].tolist() != one["input_ids"].tolist()


def test_a_short_text_has_one_token_masked_and_an_empty_one_none() -> None:
    window = {"input_ids": [CLS, 7, SEP, SEP], "attention_mask": [1] * 4}
    (masked,) = AlteredWindows([window], 1.0, {CLS, SEP}, MASK)
    assert masked["input_ids"].tolist() == [CLS, MASK, SEP, SEP]


def test_each_window_is_altered_as_often_as_any_other() -> None:
    windows = [{"input_ids": [CLS, n, SEP], "attention_mask": [1] * 3} for n in range(1, 9)]
    made = AlteredWindows(windows, 1.5, {CLS, SEP})
    counts = np.bincount([window["input_ids"][1] for window in made], minlength=9)[1:]
    assert counts.sum() == 12 and set(counts.tolist()) == {1, 2}


@pytest.fixture
def settings(tmp_path: Path) -> PruneSettings:
    one = job_settings(tmp_path, trained_model(steps=1))
    return changed(
        one, recipe="random", gate_steps=None, retrain_steps=None, retrain_epochs=1.0, masked_texts=0.5,
        shuffled_texts=0.25, cross_pairs=0.25,
    )  # fmt: skip


def test_a_job_trains_on_them(settings: PruneSettings) -> None:
    tokenizer = load_tokenizer(settings.model)
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(7)
    tokenizer.save_pretrained(settings.model)
    job = start(settings)
    data = job.retrain_data
    assert isinstance(data, Both) and len(data) == 1200 and len(job.gate_train) == 600
    assert "start_positions" in data[599] and "start_positions" not in data[600]
    for number, row in ((750, 0), (1049, -1)):  # after 150 pairs: 300 masked windows, then 150 shuffled ones
        windows = data._parts[2]
        assert isinstance(windows, AlteredWindows) and windows.mask_token == 7
        assert data[number]["input_ids"].tolist() == windows[row]["input_ids"].tolist()
    report = prune(settings)
    assert report["plan"]["retrain_steps"] == 38  # an epoch of all, in batches of 32
    # Some steps have no loss on labels: the mean is below that of the same run without them.
    log = report["training"]["retrain"]
    assert min(entry["loss_task"] for entry in log if "loss_task" in entry) == 0
    assert min(entry["loss_logits"] for entry in log if "loss_task" in entry) > 0


def test_a_tokenizer_without_a_mask_token(settings: PruneSettings) -> None:
    with pytest.raises(ValueError, match="the tokenizer has no mask token: masked_texts needs one"):
        start(settings)
