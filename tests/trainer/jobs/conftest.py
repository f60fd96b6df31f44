"""Jobs without matplotlib's part, which takes as long as a training here: figures are drawn in
tests/trainer/report and tests/trainer/test_cli.py. The pages around them are written as always."""

from __future__ import annotations

from typing import Any

import pytest

from pruned_trainer.report import figures
from pruned_trainer.report.figures import Drawing


@pytest.fixture(scope="module", autouse=True)
def empty_figures() -> Any:
    def draw(name: str, alt: str, height: float, fill: Any) -> Drawing:
        return Drawing(name, alt, "<svg></svg>", b"\x89PNG")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", draw)
        yield
