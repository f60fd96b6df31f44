"""What an install says where it cannot be done: without torch (under build isolation), without a compiler,
with an old setuptools."""

from __future__ import annotations

import os
import platform
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="installed without the checkout"),
    pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux alone"),
]


def refusal(monkeypatch: pytest.MonkeyPatch) -> str:
    """The message of setup.py's build_ext, which metadata and the sdist do not run."""
    settings: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: settings.update(arguments))
    monkeypatch.delenv("PRUNED_OPS_BUILD_EXTENSION", raising=False)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    with pytest.raises(SetupError) as error:
        settings["cmdclass"]["build_ext"](setuptools.Distribution()).run()
    return str(error.value)


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    message = refusal(monkeypatch)
    assert "needs torch" in message and "`pip install --no-build-isolation .`" in message
    assert "PRUNED_OPS_BUILD_EXTENSION=0" in message and "\n" not in message


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    message = refusal(monkeypatch)
    assert "there is no no-such-compiler: install g++" in message and "name another in CXX" in message
    assert "PRUNED_OPS_BUILD_EXTENSION=0" in message and "\n" not in message


def test_a_compiler_with_a_quote_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setenv("CXX", "g++ 'never closed")
    with pytest.raises(SystemExit, match=r"CXX is \"g\+\+ 'never closed\", which is no command line"):
        runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_setting_is_as_good_as_none(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's build reads them later, and would compile with no compiler."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    for name in ("CXX", "MAX_JOBS"):
        monkeypatch.setenv(name, empty)
    runpy.run_path(str(ROOT / "setup.py"))
    assert "CXX" not in os.environ and "MAX_JOBS" not in os.environ


@pytest.mark.parametrize("jobs", ["all", "0", "-1"])
def test_a_number_of_jobs_that_is_none_is_refused(jobs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", jobs)
    assert f"MAX_JOBS is {jobs!r}; it is the number of files" in refusal(monkeypatch)


def test_with_an_old_setuptools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "__version__", "68.2.2")
    with pytest.raises(
        SystemExit, match="needs setuptools 77 or newer, and this is 68.2.2: run `pip install"
    ):
        runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is of x86-64")
def test_a_compiler_without_amx_leaves_it_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it does not know it refuses, as gcc 10 does; a compiler that takes any flag gets those kernels."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    compiler = tmp_path / "compiler"
    monkeypatch.setenv("CXX", str(compiler))
    for script, expected in (('case "$*" in *-mamx*) exit 1;; esac', False), ("exit 0", True)):
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
        settings = runpy.run_path(str(ROOT / "setup.py"))
        assert ("AMX_INT8" in settings["INT8_FLAGS"], "AMX_BF16" in settings["BF16_FLAGS"]) == (expected,) * 2
        assert "AVX512_VNNI" in settings["INT8_FLAGS"]
