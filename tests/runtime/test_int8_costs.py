"""What int8 costs is seen: each linear's error, a warning beyond the tolerance, `pruned-ops check`; and a
switch of dtype afterwards is refused.

Where no int8 kernel runs on this processor, its reference does, so that these promises are tested everywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pruned_ops
from inputs import logits, padded_batch, pruned_model, stock_model
from int8_anywhere import int8_anywhere
from matching import save_checkpoint, squad_file
from pruned_ops.cli import main
from pruned_ops.runtime import int8_choice, refusals


@pytest.fixture(autouse=True)
def int8() -> Iterator[None]:
    with int8_anywhere():
        yield


def quantised(model: Any, **options: Any) -> Any:
    fast = pruned_ops.optimize(model, dtype="int8", **options)
    if not fast.base_model.packed.encoder.runs_in_one_call:
        pytest.skip("pruned_ops._C is not built: no weight is laid out in int8")
    return fast


def test_every_linears_error_is_kept() -> None:
    model = stock_model()
    names = [f"bert.encoder.{name}" for name in quantised(stock_model()).bert.packed.encoder.linear_names]
    batches = [padded_batch((20, 13), seed=seed) for seed in range(2)]
    fast = quantised(model, calibration=batches, tolerance=1.0)
    assert sorted(fast.int8_errors) == sorted(names)
    assert all(0 < error < 1 for error in fast.int8_errors.values())
    assert fast.bert.packed.encoder.int8_linears == {name.removeprefix("bert.encoder.") for name in names}
    assert not hasattr(pruned_ops.restore(fast), "int8_errors")


def test_the_linears_that_hurt_most_go_back() -> None:
    batches = [padded_batch((20, 13))]
    every = quantised(stock_model(), calibration=batches, tolerance=1.0).int8_errors
    tolerance = 2 * sorted(every.values())[len(every) // 2]  # of which a linear alone may take half
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        fast = quantised(stock_model(), calibration=batches, tolerance=tolerance)
    kept = {f"bert.encoder.{name}" for name in fast.bert.packed.encoder.int8_linears}
    assert kept and kept < set(every)
    assert max(every[name] for name in kept) <= min(every[name] for name in every if name not in kept)


def test_the_outputs_are_within_the_tolerance_however_errors_add_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each linear alone counts as nothing here; what they come to together is measured."""
    outputs, run = int8_choice.outputs_of, 0
    names = quantised(stock_model()).bert.packed.encoder.linear_names
    every = off_by(quantised(stock_model(), calibration=[padded_batch((20, 13))], tolerance=1.0))

    def alone_right(model: Any, batches: Any) -> Any:
        nonlocal run, exact
        run += 1
        exact = outputs(model, batches) if run == 1 else exact
        return exact if run <= len(names) + 1 else outputs(model, batches)

    exact: Any = None
    monkeypatch.setattr(int8_choice, "outputs_of", alone_right)
    with pytest.warns(RuntimeWarning, match=r"of 12 linears stay in float32, because int8 would"):
        fast = quantised(stock_model(), calibration=[padded_batch((20, 13))], tolerance=every / 2)
    assert set(fast.int8_errors.values()) == {0.0}
    assert 0 < len(fast.bert.packed.encoder.int8_linears) < len(names)
    monkeypatch.undo()
    assert 0 < off_by(fast) <= every / 2


def off_by(fast: Any) -> float:
    batches = [padded_batch((20, 13))]
    exact = int8_choice.outputs_of(pruned_ops.optimize(stock_model()), batches)
    return int8_choice.relative_error(int8_choice.outputs_of(fast, batches), exact)


@pytest.mark.parametrize("share", [0.99, 0.7, 0.4, 0.1])
def test_no_more_linears_go_back_than_it_takes(share: float) -> None:
    """One more in int8 would be too much, alone or with the others: of those that stay, the one that hurts
    least."""
    batches = [padded_batch((20, 13))]
    every = off_by(quantised(stock_model(), calibration=batches, tolerance=1.0))
    with pytest.warns(RuntimeWarning, match="linears stay in float32"):
        fast = quantised(stock_model(), calibration=batches, tolerance=share * every)
    assert off_by(fast) <= share * every
    encoder, errors = fast.bert.packed.encoder, fast.int8_errors
    kept = set(encoder.linear_names) - encoder.int8_linears
    next_one = min(kept, key=lambda name: errors[f"bert.encoder.{name}"])
    if errors[f"bert.encoder.{next_one}"] <= share * every / 2:
        encoder.pack(True, encoder.int8_linears | {next_one})
        assert off_by(fast) > share * every


def test_errors_are_relative_to_what_outputs_vary_by() -> None:
    """Written out: what all rows have in common tells nothing, however large it is."""
    varying = torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    error = int8_choice.relative_error
    wrong = varying + torch.tensor([0.1, 0.0])
    assert error([wrong], [varying]) == pytest.approx(0.1)
    assert error([wrong + 2.0], [varying + 2.0]) == pytest.approx(0.1)  # half of the size is a constant
    large = torch.tensor([100.0, 100.0])
    at_least = 0.25 * float((varying + large).norm())  # a quarter of the size, where less of it varies
    assert error([wrong + large], [varying + large]) == pytest.approx(
        float((wrong - varying).norm()) / at_least
    )
    assert error([varying, wrong], [varying, varying]) == pytest.approx(0.1)  # the worst of several
    assert error([wrong * float("nan")], [varying]) == float("inf")
    assert error([varying[:1]], [varying[:1]]) == 0.0


def test_no_warning_within_the_tolerance() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        quantised(stock_model(), calibration=[padded_batch((20, 13))], tolerance=0.5)


def test_another_dtype_afterwards_is_refused() -> None:
    fast, batch = quantised(stock_model()), padded_batch()
    expected = logits(fast, batch)
    for cast in (lambda: fast.to(torch.bfloat16), fast.half, fast.double, lambda: fast.to("meta")):
        with pytest.raises(RuntimeError, match=r"int8, on a CPU.*restore\(model\) before moving or casting"):
            cast()
    assert torch.equal(logits(fast.to("cpu").float(), batch), expected)
    assert pruned_ops.restore(fast).to(torch.bfloat16).dtype == torch.bfloat16


def test_weights_that_int8_does_not_read_cannot_be_written_to() -> None:
    """Their fp32 values are kept, for `restore` and for fp32, and read as they are."""
    model = stock_model()
    dense = model.bert.encoder.layer[1].output.dense
    weight, bias = dense.weight.clone(), dense.bias.clone()
    quantised(model)
    assert torch.equal(dense.weight, weight) and torch.equal(dense.bias, bias)
    for parameter in (dense.weight, dense.bias):
        with pytest.raises(RuntimeError, match="restore"), torch.no_grad():
            parameter.zero_()
    pruned_ops.restore(model)
    assert torch.equal(dense.weight, weight) and torch.equal(dense.bias, bias)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(pruned_model(), tmp_path_factory.mktemp("int8") / "model")


def test_check_shows_what_int8_costs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantised(pruned_model())
    questions = squad_file(tmp_path / "squad.json", 10, 1)
    argv = ["check", str(folder), "--device", "cpu", "--dtype", "int8", "--questions", str(questions)]
    argv += ["--backends", "reference"]
    assert main([*argv, "--tolerance", "0.5"]) == 0
    screen = capsys.readouterr().out
    (line,) = [line for line in screen.splitlines() if line.startswith("│ int8 ")]
    error, difference, f1, changed = [cell.strip() for cell in line.strip("│").split("│")][1:]
    assert float(error) > 1e-4 and float(difference) > 1e-4 and 0 <= float(f1) <= 100 and int(changed) >= 0
    assert "passed: every error but that of int8 is at most" in screen
    assert "passed: int8 is off by 0." in screen and "within the tolerance of 0.5" in screen
    assert main([*argv, "--tolerance", "1e-6"]) == 1
    screen = capsys.readouterr().out
    assert "FAILED: int8 is off by 0." in screen and "with calibration=batches of your text" in screen
    assert "passed: every error but that of int8" in screen


def test_check_refuses_what_it_cannot_do(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["check", str(folder), "--tolerance", "0.1"]) == 2
    assert "--tolerance goes with --dtype" in capsys.readouterr().err
    monkeypatch.setattr(refusals, "_refuse_int8", lambda encoder: "no int8 here")
    assert main(["check", str(folder), "--device", "cpu", "--dtype", "int8"]) == 2
    assert "no int8 here" in capsys.readouterr().err
