"""A figure of bench_models.py's rows: milliseconds a batch of each runtime, workload by workload."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLORS = {"dense": "#9aa7b1", "pruned": "#1f6f8b"}


def draw(rows: Sequence[Row], path: Path) -> str | None:
    """Write the PNG; why it cannot be drawn, where it cannot."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        return f"no figure: matplotlib cannot be imported ({error})"
    timed = [row for row in rows if "refused" not in row]
    workloads = list(dict.fromkeys(row["workload"] for row in timed))
    if not workloads:
        return "no figure: nothing was timed"
    most = max(sum(row["workload"] == name for row in timed) for name in workloads)
    figure, axes = pyplot.subplots(
        len(workloads), 1, figsize=(9, len(workloads) * (0.6 + 0.22 * most)), squeeze=False
    )
    for axis, name in zip(axes[:, 0], workloads, strict=True):
        some = [row for row in timed if row["workload"] == name]
        spread = [
            [row["ms_p50"] - row["ms_p20"] for row in some],
            [row["ms_p80"] - row["ms_p50"] for row in some],
        ]
        axis.barh(
            [row["runner"] for row in some], [row["ms_p50"] for row in some], xerr=spread,
            color=[COLORS[row["model"]] for row in some],
        )  # fmt: skip
        axis.invert_yaxis()
        axis.set_title(name, fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
    axes[-1, 0].set_xlabel("milliseconds a batch, median and 20th to 80th percentile", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return None
