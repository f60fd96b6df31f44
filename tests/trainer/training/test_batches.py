"""The windows of a training as sequences: whatever makes them, a position, a negative one and a slice mean
what they mean for a list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pruned_trainer.jobs.rows import Rows
from pruned_trainer.tasks.windows import Features, lengths_of
from pruned_trainer.training.altered_windows import AlteredWindows
from pruned_trainer.training.batches import NUMBER, Both, Numbered, Share
from pruned_trainer.training.cross_pairs import CrossPairs

CLS, SEP = 1, 2
WINDOWS = [{"input_ids": np.array([CLS, 10 + i, SEP, *range(30, 33 + i), SEP])} for i in range(5)]
MAKERS: dict[str, Callable[[], Features]] = {
    "rows": lambda: Rows(WINDOWS, "training data"),
    "numbered": lambda: Numbered(WINDOWS),
    "share": lambda: Share(WINDOWS, 0.8, seed=1),
    "both": lambda: Both(WINDOWS, WINDOWS[:2], WINDOWS[3:]),
    "cross pairs": lambda: CrossPairs(WINDOWS, 2.0, SEP, 9, seed=1),
    "altered": lambda: AlteredWindows(WINDOWS, 1.6, {CLS, SEP}, seed=1),
}


def plain(windows: Any) -> list[dict[str, Any]]:
    return [{name: np.asarray(value).tolist() for name, value in window.items()} for window in windows]


@pytest.mark.parametrize("kind", MAKERS)
def test_windows_are_asked_for_as_the_entries_of_a_list(kind: str) -> None:
    windows = MAKERS[kind]()
    entries = plain(windows)
    assert len(entries) == len(windows) >= 4
    for number in (0, 1, -1, -len(windows), np.int64(2)):
        assert plain([windows[number]]) == [entries[number]]  # type: ignore[call-overload]
    for part in (slice(None), slice(1, 3), slice(-2, None), slice(None, None, -1), slice(99, None)):
        assert plain(windows[part]) == entries[part]
    for outside in (len(windows), -len(windows) - 1):
        with pytest.raises(IndexError):
            windows[outside]


def test_each_sequence_holds_what_it_says() -> None:
    assert [window[NUMBER] for window in Numbered(WINDOWS)] == [0, 1, 2, 3, 4]
    share = Share(WINDOWS, 0.4, seed=3)
    assert len(share) == 2 and share.lengths == [len(window["input_ids"]) for window in share]
    assert len(Share(WINDOWS, 0.01, seed=3)) == 1
    both = Both(WINDOWS, WINDOWS[:2], WINDOWS[3:])
    assert plain(both) == plain([*WINDOWS, *WINDOWS[:2], *WINDOWS[3:]])
    assert both.kinds == [0] * 5 + [1] * 4 and both.lengths == lengths_of(list(both))
    both.check_batches(4)
    with pytest.raises(ValueError, match="a batch of 5 of each"):
        both.check_batches(5)
