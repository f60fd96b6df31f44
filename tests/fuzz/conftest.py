"""Shares the time of `make fuzz` among the attacks, and says how many cases of each ran.

fuzzing brings in torch, and so is imported where it is used: tests/conftest.py says why.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


# What an attack makes a reader ask for must not take the machine's memory.
MEMORY = 24 << 30


def pytest_sessionstart() -> None:
    import fuzzing

    if fuzzing.MINUTES:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


@pytest.hookimpl(trylast=True)  # after what -k leaves out is gone
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import fuzzing

    attacks = [
        item
        for item in items
        if HERE in item.path.parents and hasattr(getattr(item, "obj", None), "hypothesis")
    ]
    fuzzing.seconds_each = 60 * fuzzing.MINUTES / max(1, len(attacks))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    import fuzzing

    if fuzzing.MINUTES and fuzzing.ran:
        terminalreporter.section("cases")
        for name, count in fuzzing.ran.items():
            terminalreporter.write_line(f"{count:>10,}  {name}")
        terminalreporter.write_line(f"{fuzzing.ran.total():>10,}  in all")
