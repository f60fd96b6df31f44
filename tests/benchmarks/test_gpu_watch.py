"""Processes of tests that hang or whose GPU is lost: the test is named, and the others run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parents[1] / "support"
CONFTEST = """
import os
from gpu_watch import GpuWatch

LOST = []

def pytest_configure(config):
    config.pluginmanager.register(GpuWatch(8, lambda: bool(LOST)))
"""
TESTS = """
import time
import conftest

def test_before():
    pass

def test_that_loses_the_gpu():
    conftest.LOST.append(1)
    assert False, "an illegal memory access"

def test_between():
    assert not conftest.LOST

def test_that_hangs():
    print("captured")
    time.sleep(600)

def test_after():
    assert not conftest.LOST
"""


def outcome(folder: Path, *options: str) -> list[str]:
    """The lines that pytest prints on these tests."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-c", "/dev/null"]
    environment = os.environ | {"PYTHONPATH": f"{SUPPORT}:{folder}", "COLUMNS": "200"}
    command += ["--rootdir", str(folder), str(folder), *options]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200
    )
    return done.stdout.splitlines()


def test_another_process_goes_on_behind_the_test_that_is_named(tmp_path: Path) -> None:
    lines = outcome(tmp_path, "-n", "1", "--dist", "worksteal")
    failed = [line.split(" - ")[0] for line in lines if line.startswith("FAILED")]
    assert {line.rpartition("::")[2] for line in failed} == {"test_that_loses_the_gpu", "test_that_hangs"}
    assert lines[-1].split(", ")[1].startswith("3 passed")
    assert any("an illegal memory access" in line for line in lines)
    assert any(line.endswith("the GPU is lost after test_it.py::test_that_loses_the_gpu") for line in lines)
    assert any("in test_that_hangs" in line for line in lines)  # where it is


def test_alone_it_stops_and_says_so(tmp_path: Path) -> None:
    """Without another process, tests that failed behind it would say nothing."""
    lines = outcome(tmp_path, "-p", "no:xdist")
    assert sum(line.startswith("FAILED") for line in lines) == 1
    assert any("the GPU is lost after test_it.py::test_that_loses_the_gpu" in line for line in lines)
    assert lines[-1].startswith("1 failed, 1 passed")
