"""Reading and writing files: what is written appears under its name only when it is whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: str | bytes) -> None:
    """Write text, as UTF-8, or bytes; the file is there whole, or as it was before."""
    if isinstance(content, str):
        # A command line may hold half a surrogate pair: UTF-8 cannot say it, JSON's escape can.
        content = content.encode(errors="backslashreplace")
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON for people and programs alike; the file is there whole, or as it was before."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def check_writable(path: Path, name: str, overwrite: bool) -> None:
    """OSError where a file cannot be written at `path`, or is there and not to be replaced: asked before the
    work whose result is to be written. name: the option or argument that named the file."""
    folder = path.absolute().parent
    if path.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: it is a folder, and {name} names a file")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path} cannot be written: {folder} is no folder, and {name} names a file in a folder that is "
            "there"
        )
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: nothing may be written into {folder}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; --overwrite replaces it")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; ValueError for another encoding."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error
