"""bench_ops.py's Markdown and figure, of made-up rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from presentation import save_figure
from single_kernels.report import of_ceiling, write_report, write_tables


def row(runner: str, ms: float, ratio: float) -> dict[str, object]:
    return {
        "op": "attention", "layer": "base half", "lengths": "63 366", "runner": runner, "ms_p20": ms,
        "ms_p50": ms, "ms_p80": 2 * ms, "gflop": 4.0, "mb": 8.0, "peak_gflops": 800_000.0,
        "copy_gb_per_s": 4000.0,
        "speedup_vs_rival": ratio, "backends": "triton" if runner == "ours" else "", "dtype": "torch.float16",
        "machine_accelerator": "a card", "machine_processor": "a processor", "date": "2026-01-01",
        "command": "python ops",
    }  # fmt: skip


def test_shares_and_ratios(tmp_path: Path) -> None:
    """4 GFLOP in 10 us are half of 800 TFLOP/s; 8 MB in 20 us a tenth of 4 TB/s, and 4 GFLOP a quarter."""
    rows = [row("ours", 0.01, 1.0), row("torch sdpa", 0.02, 0.5)]
    assert [round(of_ceiling(line), 6) for line in rows] == [50, 25]
    write_report(tmp_path / "ops.csv", rows, ["linear_gelu, base half is left out: no time"])
    text = (tmp_path / "ops.md").read_text("utf-8")
    assert "| attention | base half | 2 of 63 to 366 | ours | 10 (10-20) | 50% |  | triton |" in text
    assert "| torch sdpa | 20 (20-40) | 25% | 2.00x |" in text
    assert "- linear_gelu, base half is left out: no time" in text and "a card, torch.float16" in text
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_is_whole_where_the_command_is_no_utf_8(tmp_path: Path) -> None:
    """As a command with a file's name in another encoding is."""
    rows = [row("ours", 0.01, 1.0) | {"command": "python ops \udce9"}]
    write_tables(tmp_path / "ops.csv", rows, [])
    assert (tmp_path / "ops.md").read_text("utf-8").endswith("2026-01-01: `python ops \\udce9`\n")


def test_a_figure_whose_drawing_is_interrupted_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ops.png"
    path.write_bytes(b"as before")

    def interrupted(figure: Figure, place: Any, **_: Any) -> None:
        file = place if hasattr(place, "write") else place.open("wb")
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_figure(path, (1, 1), lambda figure: None)
    assert path.read_bytes() == b"as before"
