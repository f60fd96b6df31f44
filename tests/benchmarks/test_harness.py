"""What the benchmarks share: where they write, how they end, and the processor's time of a process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import bench_models
import harness
from inputs import stock_model
from matching import save_checkpoint
from presentation import counted


def test_a_csv_that_cannot_be_written_is_refused_before_the_measurement(tmp_path: Path) -> None:
    out = tmp_path / "new" / "rows.csv"
    assert harness.out_path(out, "models") == out and list(out.parent.iterdir()) == []
    assert harness.out_path(None, "x", "cpu") == harness.result_path("x", "cpu")
    with pytest.raises(IsADirectoryError, match="a CSV is written"):
        harness.out_path(tmp_path, "models")
    out.touch()
    with pytest.raises(OSError):
        harness.out_path(out / "rows.csv", "models")


def test_a_server_called_infinity_keeps_its_name(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    rows = [{"server": "infinity", "ms": 1.5}, {"server": "plain", "ms": float("inf")}]
    harness.write_rows(out, rows)
    assert harness.read_rows(out) == rows
    harness.write_rows(out, [{"server": "plain", "ms": float("nan")}])
    assert isinstance(harness.read_rows(out)[0]["ms"], float)  # of whom nobody was answered


def test_what_the_user_can_mend_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def main() -> None:
        raise FileNotFoundError("there is\nno folder x")

    monkeypatch.setattr(sys, "argv", ["benchmarks/bench_some.py"])
    with pytest.raises(SystemExit) as ended:
        harness.run(main)
    assert ended.value.code == 2 and capsys.readouterr().err == "bench_some: there is no folder x\n"
    with pytest.raises(SystemExit) as ended:
        harness.run(lambda: 1)
    assert ended.value.code == 1


def test_a_checkpoint_that_is_missing_is_named_before_the_other_one_is_prepared(tmp_path: Path) -> None:
    here = str(save_checkpoint(stock_model(), tmp_path / "here"))
    missing = str(tmp_path / "missing")
    for dense, pruned in ((missing, here), (here, missing)):
        with pytest.raises(OSError, match="there is no folder .*missing"):
            bench_models.main(["--dense", dense, "--pruned", pruned, "--out", str(tmp_path / "rows.csv")])


def test_processor_time_has_no_steps_of_a_hundredth() -> None:
    """Short texts take a few hundredths of a second, which was all that /proc counts."""
    before, begun = harness.cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() < begun + 0.003:
        pass
    assert 0.003 <= harness.cpu_seconds(os.getpid()) - before < 0.02
    spin = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 0.5 <= harness.cpu_seconds(process.pid) < 0.6
        process.kill()


def test_processor_time_counts_a_rivals_own_threads(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def work() -> None:
        begun = time.thread_time()
        while time.thread_time() < begun + 0.05:
            pass

    def in_a_thread() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    assert harness.process_seconds(in_a_thread) >= 0.05
    monkeypatch.setattr(bench_models.torch, "get_num_threads", lambda: 1)
    for rivals in (["all"], ["hf", "ctranslate2-int8"]):
        with pytest.raises(SystemExit):
            bench_models.parsed(["--cpu-time", "--rivals", *rivals])
        assert "in a process of its own" in capsys.readouterr().err


def test_a_number_and_its_noun() -> None:
    assert [counted(number, "thread") for number in (1, 2)] == ["1 thread", "2 threads"]
