"""Reports of jobs without what takes as long as a training of a small model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_reports() -> Iterator[None]:
    """Figures without matplotlib's part, which tests/trainer/report and tests/trainer/test_cli.py have;
    timing in few rounds, and not until the speed-up settles, which tests/measure/test_latency.py has.
    The pages around the figures are written as always."""
    # Not earlier: a conftest.py that imports this file is read before environment.py is.
    from pruned_ops.measure import timing
    from pruned_trainer.report import figures
    from pruned_trainer.report.figures import Drawing

    def draw(name: str, alt: str, height: float, fill: Any) -> Drawing:
        return Drawing(name, alt, "<svg></svg>", b"\x89PNG")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", draw)
        patch.setattr(timing, "MOST_ROUNDS", 1)
        yield
