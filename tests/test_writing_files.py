"""Files are written whole or not at all, whoever else writes them."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest

from pruned_ops.files import new_folder, write_json, write_whole

LARGE = 1_000_000


def _write_often(path: Path, letter: str, times: int) -> None:
    for _ in range(times):
        write_whole(path, letter * LARGE)


def test_processes_that_write_the_same_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_whole(path, "a" * LARGE)
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write_often, args=(path, letter, 30)) for letter in "bcd"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        text = path.read_text(encoding="utf-8")
        assert len(text) == LARGE and text == text[0] * LARGE
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize("content", ["x" * LARGE, b"x" * LARGE])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, content: str | bytes) -> None:
    """A limit on the size of files stands for the disk's."""
    path = tmp_path / "report.json"
    write_whole(path, "before")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="report.json cannot be written: File too large") as error:
            write_whole(path, content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG
    assert path.read_text(encoding="utf-8") == "before" and os.listdir(tmp_path) == ["report.json"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none/report.json cannot be written"):
        write_whole(tmp_path / "none" / "report.json", "text")


def test_the_mode_of_a_file_is_that_of_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_json(tmp_path / "written", {})
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("is_there", [False, True])
def test_a_new_folder_is_whole_or_not_there(is_there: bool, tmp_path: Path) -> None:
    out = tmp_path / "above" / "new"
    if is_there:
        out.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), new_folder(out) as stage:
        (stage / "half").touch()
        raise KeyboardInterrupt
    assert os.listdir(out.parent) == ["new"] * is_there and not (is_there and os.listdir(out))
    with new_folder(out) as stage:
        (stage / "whole").touch()
        assert not (out / "whole").exists()
    assert os.listdir(out.parent) == ["new"] and os.listdir(out) == ["whole"]
    assert out.stat().st_mode & 0o777 == 0o755


def test_a_folder_that_cannot_be_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for name, message in (
        (".", "is there already; give another folder"),
        ("file", "file is there already; give another folder"),
        ("file/new", "cannot be made: .*file is a file"),
        ("file/deep/new", "cannot be made: .*file is a file"),
    ):
        with pytest.raises(OSError, match=message), new_folder(Path(name)):
            raise AssertionError("the work began")
    with pytest.raises(ValueError, match="is no name in UTF-8"), new_folder(Path("raw\udcff")):
        raise AssertionError("the work began")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="nothing may be written into"), new_folder(Path("new")):
        raise AssertionError("the work began")
    assert os.listdir(tmp_path) == ["file"]
