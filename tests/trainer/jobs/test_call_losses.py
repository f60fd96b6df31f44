"""What the report of a call from Python says is lost: by the caller's metrics and the agreement with the
teacher, with intervals over samples of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from calls import rows
from pruned_trainer.jobs.examples import RESAMPLES, DatasetExamples, DatasetResult
from pruned_trainer.jobs.rows import Rows, default_collate


def results(metrics: Any, size: int = 40) -> list[DatasetResult]:
    """Of a dense model that is always right, like its teacher, and of a pruned one that is wrong on the first
    row alone, whose label is the only 0 among 1s."""
    data = [{**row, "labels": int(number > 0)} for number, row in enumerate(rows(size))]
    labelled = Rows(data, "evaluation dataset")
    examples = DatasetExamples(labelled, default_collate(0, 16), ["labels"], metrics, 8, "mean")
    right = [{"logits": np.eye(2)[row["labels"]]} for row in data]
    return [DatasetResult(examples, outputs, right) for outputs in (right, [right[1], *right[1:]])]


def accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def of_both_classes(predicted: Any) -> dict[str, float]:
    if not (predicted.label_ids == 0).any():
        raise ValueError("only one class is present")
    return accuracy(predicted)


def test_a_metric_that_fails_on_many_samples_has_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    """Those on which it gives a number are not drawn by chance: here each has the row that was lost. The
    agreement, which asks no metric, has its interval."""
    dense, pruned = results(of_both_classes)
    losses = dense.losses(pruned)
    assert losses["accuracy_loss"] == pytest.approx(1 / 40) and losses["accuracy_loss_interval"] is None
    low, high = losses["agreement_loss_interval"]
    assert losses["agreement_loss"] == pytest.approx(2.5) and low == 0 < 2.5 <= high
    (line,) = capsys.readouterr().out.splitlines()
    number = int(line.split()[6])
    assert number / RESAMPLES == pytest.approx((1 - 1 / 40) ** 40, abs=0.1)
    assert line == (
        f"-- accuracy is no number on {number} of the {RESAMPLES} samples of the evaluation dataset "
        f"(compute_metrics fails on {number} of them: ValueError: only one class is present): its loss has "
        "no interval"
    )


def test_a_metric_that_fails_on_few_samples_has_an_interval(capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def fails_now_and_then(predicted: Any) -> dict[str, float]:
        calls.append(predicted)
        if len(calls) in (50, 90):
            raise ZeroDivisionError
        return accuracy(predicted)

    dense, pruned = results(fails_now_and_then)
    losses = dense.losses(pruned)
    low, high = losses["accuracy_loss_interval"]
    assert low == 0 < losses["accuracy_loss"] <= high
    (line,) = capsys.readouterr().out.splitlines()
    assert (
        line.startswith(f"-- accuracy is no number on 2 of the {RESAMPLES} samples")
        and "no interval" not in line
    )


def test_an_error_is_told_apart_from_a_metric_that_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    """One that fails once, and is NaN wherever a class is missing."""
    calls = []

    def of_both(predicted: Any) -> dict[str, float]:
        calls.append(predicted)
        if len(calls) == 50:
            raise ZeroDivisionError("once")
        both = (predicted.label_ids == 0).any()
        return accuracy(predicted) | {"both": accuracy(predicted)["accuracy"] if both else float("nan")}

    dense, pruned = results(of_both)
    losses = dense.losses(pruned)
    assert losses["accuracy_loss_interval"] is not None and losses["both_loss_interval"] is None
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        f"-- accuracy is no number on 1 of the {RESAMPLES} samples of the evaluation dataset"
    )
    assert second.startswith("-- both is no number on ") and int(second.split()[6]) > 20
    for line in (first, second):
        assert "(compute_metrics fails on 1 of them: ZeroDivisionError: once)" in line


def test_losses_are_in_the_order_of_the_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    """And so is report.json, whatever Python's hashes are."""
    names = [f"metric_{number}" for number in range(9, 0, -1)]
    dense, pruned = results(lambda predicted: dict.fromkeys(names, accuracy(predicted)["accuracy"]))
    losses = [*dense.losses(pruned)]
    assert losses == [f"{name}_loss{end}" for name in (*names, "agreement") for end in ("", "_interval")]
    assert not capsys.readouterr().out
