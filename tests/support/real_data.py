"""Where tests find real data and models: under PRUNED_OPS_DATA, else in `../shared` beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_BESIDE = Path(__file__).resolve().parents[3] / "shared"


def real_data(relative: str) -> Path:
    """The path of a file or folder of the real data; skips the test, with the reason, where it is absent."""
    root = Path(os.environ.get("PRUNED_OPS_DATA") or _BESIDE)
    path = root / relative
    if not path.exists():
        pytest.skip(f"real data: no {relative} under {root}; PRUNED_OPS_DATA names the folder that holds it")
    return path
