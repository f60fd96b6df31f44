"""bench_ask.py and bench_int8.py on small models: who gets what, and that they run to their end."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bench_ask
import bench_int8
import harness
from inputs import stock_model
from matching import save_checkpoint, squad_file
from pruned_ops.runtime.refusals import refuse_encoder
from rivals.rival import Batch, Refused, forward


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(stock_model(), tmp_path / "dense")


def test_the_runners_of_questions_take_turns_after_a_round_that_is_not_timed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(bench_ask, "bare", lambda *_: ran.append("bare"))
    monkeypatch.setattr(bench_ask, "plain_loop", lambda *_: ran.append("plain"))
    answer = bench_ask.QuestionAnswerer.answer
    monkeypatch.setattr(
        bench_ask.QuestionAnswerer, "answer", lambda *given: (ran.append("ours"), answer(*given))
    )
    data = squad_file(tmp_path / "eval.json", 5, 0)
    options = [str(checkpoint)] * 2 + ["--data", str(data), "--questions", "3", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["bench_ask.py", *options])
    bench_ask.main()
    shown = capsys.readouterr().out
    assert "3 questions, 3 windows" in shown and "QuestionAnswerer is 1.000 times as fast" in shown
    assert sorted(ran[:3]) == sorted(ran[3:6]) == sorted(ran[6:]) == ["bare", "ours", "plain"]
    assert ran[3:6] != ran[6:]


@pytest.mark.parametrize(("windows", "first_and_last"), [(127, (0, 125)), (300, (0, 295)), (5, (0, 4))])
def test_compared_windows_are_of_the_whole_file(
    windows: int, first_and_last: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are less than twice as many as are compared: the first ones alone are of few texts."""
    monkeypatch.setattr(bench_int8, "padded", lambda chosen, pad_token_id: chosen)
    source, model = SimpleNamespace(windows=range(windows)), SimpleNamespace(config=stock_model().config)
    cut = bench_int8.batches(source, model, 8)  # type: ignore[arg-type]
    places = [place for batch in cut for place in batch]
    assert len(places) == len(set(places)) == min(64, windows)
    assert (places[0], places[-1]) == first_and_last and places == sorted(places)


@pytest.mark.skipif(
    refuse_encoder(stock_model().base_model, int8=True) is not None, reason="no int8 kernels here"
)
def test_rivals_are_calibrated_on_training_questions_and_judged_on_others(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ours is: whoever has seen the evaluation questions has an advantage there."""
    for seed, split in enumerate(("train", "validation", "eval")):
        squad_file(tmp_path / f"{split}.json", 20, seed, unanswerable=0.3)
    seen: dict[str, list[Batch]] = {}

    def rival(name: str, model: Any, samples: list[Batch], folder: Path) -> Any:
        if name == "openvino-int8":
            raise Refused("it is not here")
        seen["calibrated"] = samples
        return lambda batch: (seen.setdefault("judged", []).append(batch), forward(model)(batch))[1]

    monkeypatch.setattr(bench_int8, "build_cpu_rival", rival)
    out = tmp_path / "rows.csv"
    options = [str(checkpoint), "--data", str(tmp_path), "--rivals", "openvino-int8", "openvino-int8-static"]
    monkeypatch.setattr(sys, "argv", ["bench_int8.py", *options, "--out", str(out)])
    bench_int8.main()
    rows = harness.read_rows(out)
    names = ["ours fp32", "ours int8", "ours int8, calibrated", "openvino-int8-static"]
    assert [row["runner"] for row in rows if row["runner"] != "ours bfloat16"] == names
    for row in rows[:-1]:
        assert 0 <= row["f1"] <= 100 and row["questions"] == 20
    known = {
        name: {tuple(ids) for batch in seen[name] for ids in batch["input_ids"].tolist()} for name in seen
    }
    assert known["calibrated"] and known["judged"] and not known["calibrated"] & known["judged"]
    assert all(set(batch) == {"input_ids", "attention_mask"} for batch in seen["calibrated"])
    assert torch.cat([batch["attention_mask"] for batch in seen["judged"]]).any()
