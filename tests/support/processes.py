"""Processes that tests start."""

from __future__ import annotations

import os
from pathlib import Path

import pruned_ops


def with_sources() -> dict[str, str]:
    """This process's environment, in which the packages under test are found first, from any folder."""
    root = Path(pruned_ops.__file__).parents[1]
    path = [str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in path if part)}
