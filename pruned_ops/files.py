"""Reading and writing files: what is written appears under its name only when it is whole, and one reader of
JSON refuses what a program could stumble over later."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import math
import os
import re
import reprlib
import secrets
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

# Files of settings and results stay far below this many bytes, and are refused above it before they are read.
# Files of questions have no limit: people's data may be large.
MAX_RECORD = 1 << 28
# A value that is nested deeper is an attack: whoever walks, prints or compares it would end in a recursion.
MAX_DEPTH = 64
_DEEP = f"it is nested more than {MAX_DEPTH} deep"

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32's mark begins with one of them
_LONG_NUMBER = re.compile(r"[0-9]{309}")  # no shorter integer is beyond every float
# An escape in a JSON text. Group 1: half of a surrogate pair without its other half.
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)"
)
# A string of a JSON text, or a number (group 1), finite or not.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|(-?Infinity|NaN|[-+0-9.eE]+)')


def write_whole(path: Path, content: str | bytes) -> None:
    """Write text, as UTF-8, or bytes; the file is there whole, or as it was before.

    OSError, which names the file, where it cannot be written: the disk is full, for example.
    """
    if isinstance(content, str):
        # A command line may hold half a surrogate pair: UTF-8 cannot say it, JSON's escape can.
        content = content.encode(errors="backslashreplace")
    # The name is unique, so that two processes may write the same file: the last one to finish has it.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:  # a full disk's own error names no file
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON for people and programs alike; the file is there whole, or as it was before.

    A number that is not finite, such as the loss of a training that diverged, becomes null: JSON has no word
    for it, and `read_json` takes none."""
    write_whole(path, json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def check_new_folder(path: Path) -> None:
    """OSError where there cannot be a new folder at `path`: asked before the work whose result is to be
    written. An empty folder is as good as none. ValueError for a name that libraries cannot write to."""
    check_name(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already; give another folder")
    check_place(path)


def check_place(path: Path) -> None:
    """OSError where nothing can be made at `path`: what is above it is a file, or may not be written to."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{path} cannot be made: {above} is a file")
    if not os.access(above, os.W_OK):
        raise PermissionError(f"{path} cannot be made: nothing may be written into {above}")


def check_name(path: Path) -> None:
    """ValueError for a folder whose name is no text in UTF-8: libraries that are written in Rust, as those of
    tensors and tokenizers are, write nothing into it."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(path)!a} is no name in UTF-8; give another folder") from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that is called `path` when the block has ended well. Until then it lies beside that under
    another name, and nothing is left of it where the block fails. Errors: as `check_new_folder`'s."""
    check_new_folder(path)
    whole = path.resolve()
    whole.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{whole.name}-", dir=whole.parent))
    try:
        yield stage
        open_to_others(stage)
        os.replace(stage, whole)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def open_to_others(folder: Path) -> None:
    """Give a folder and what is in it the permissions that new folders and files have here, by the umask. The
    folders of tempfile and the files of safetensors are their maker's alone, whoever is to run the model."""
    probe = folder / f".{secrets.token_hex(4)}.partial"
    probe.touch()
    mode = probe.stat().st_mode & 0o666
    probe.unlink()
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            enter = (mode & 0o444) >> 2 if path.is_dir() else 0
            with suppress(PermissionError):  # another user's, as of a run that somebody else began
                path.chmod(path.stat().st_mode & 0o7777 | mode | enter)


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


def digest(path: Path, *patterns: str) -> str:
    """The SHA-256 of a file's content, or of a folder's files of these patterns, all by default, and their
    names.

    What says nothing of data or weights does not count: hidden files and folders, Markdown, and what
    `datasets` caches beside its files. OSError where a file cannot be read."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    inside = sorted(
        entry
        for entry in {entry for pattern in patterns or ("**/*",) for entry in path.glob(pattern)}
        if entry.is_file()
        and not any(map(entry.match, ("*.md", "cache-*.arrow")))
        and not is_hidden(entry.relative_to(path))
    )
    lines = [f"{digest(entry)} {entry.relative_to(path)}\n" for entry in inside]
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def is_hidden(path: Path) -> bool:
    """Whether a path, from a folder on, is that of a hidden file or leads through a hidden folder."""
    return any(part.startswith(".") for part in path.parts)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; ValueError for another encoding."""
    try:
        return _decoded(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from None


def read_json(path: Path, what: str = "JSON", max_bytes: int | None = MAX_RECORD) -> Any:
    """The value in a JSON file, as `parse_json` reads it. what: the kind of file, for errors.

    Errors: OSError where there is no file to read; ValueError that names the file and the place in it for
    anything else.
    """
    size = path.stat().st_size
    if max_bytes is not None and size > max_bytes:
        raise ValueError(f"{path} is {size:,} bytes large; more than {max_bytes:,} is refused")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no {what}: {error}") from None


def parse_json(content: bytes, unique: bool = False) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte order mark.

    unique: whether an object that has a name twice is refused; else the last value counts. Errors: ValueError
    for any other text, for half a surrogate pair, for a number that is not finite or beyond every float, and
    for a value that is nested more than MAX_DEPTH deep. The message is one line that names the place, and
    quotes nothing of the text but a number or a name.
    """
    text = _decoded(content)
    if not text.strip():
        raise ValueError("it is empty")
    try:
        parse_int = _int if _LONG_NUMBER.search(text) else None
        value = _DECODERS[parse_int, _unique if unique else None].decode(text)
    except _NumberFault as error:
        at = next(match.start(1) for match in _TOKEN.finditer(text) if match[1] == error.number)
        raise ValueError(f"{shown(error.number)} is no finite number: {_place(text, at)}") from None
    except RecursionError:
        raise ValueError(_DEEP) from None
    if _is_deep(value):
        raise ValueError(_DEEP)
    half = next((match for match in _ESCAPE.finditer(text) if match[1]), None)
    if half is not None:
        raise ValueError(f"half a surrogate pair (\\{half[1]}): {_place(text, half.start())}")
    return value


def shown(value: object) -> str:
    """The value as a message quotes it: on one line, cut where it is long or nested deep."""
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _finite(value: Any) -> Any:
    """The value with None in place of each float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value


def _decoded(content: bytes) -> str:
    """The text, without a byte order mark; ValueError, without the bytes in it, for another encoding."""
    try:
        return _one_line(content)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{error} (line {line})") from None


class TextFile:
    """The texts in a file, which is read anew whenever they are gone through.

    Each line of a file in UTF-8 is a text, which may hold any separator but a line feed; in a file that ends
    in .jsonl, all strings in the value of a line are texts, or those in these columns of it. Either may end
    in .gz. Texts without any character but spaces are passed over; with `in_place`, for texts that belong
    together by their places, only lines that hold no other texts are, and each column is one text. Errors:
    OSError where there is no file; ValueError that names the line for one that cannot be read, lacks a
    column, or holds something else where a text is needed, and for columns of a file that is no .jsonl.
    """

    def __init__(self, path: Path, columns: Sequence[str] | None = None, in_place: bool = False) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file; a file of texts is needed")
        self.path, self.columns, self.in_place = path, columns, in_place
        self.is_json = path.name.removesuffix(".gz").endswith(".jsonl")
        if columns is not None and not self.is_json:
            raise ValueError(f"{path} has no columns: only a .jsonl file has")

    def __iter__(self) -> Iterator[str]:
        for _, texts in self.lines():
            yield from (text for text in texts if text.strip())

    def lines(self) -> Iterator[tuple[int, list[str]]]:
        """The texts of each line that has any, with its number."""
        try:
            with (gzip.open if self.path.suffix == ".gz" else open)(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    try:
                        texts = self._texts(line) if self.is_json and line.strip() else [_one_line(line)]
                        texts = [text.rstrip("\r\n") for text in texts if self.in_place or text.strip()]
                    except ValueError as error:
                        raise ValueError(f"{self.path}, line {number}: {error}") from None
                    if any(text.strip() for text in texts):
                        yield number, texts
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{self.path} is no whole gzip file: {error}") from None

    def _texts(self, line: bytes) -> Iterable[str]:
        """The texts in the JSON of a line."""
        value = parse_json(line)
        if self.columns is not None:
            if not isinstance(value, dict):
                raise ValueError("an object with columns is needed")
            lacking = [name for name in self.columns if name not in value]
            if lacking:
                raise ValueError(f"there is no column {shown(lacking[0])}; there are {shown(list(value))}")
            for name in self.columns if self.in_place else ():
                if not isinstance(value[name], str):
                    raise ValueError(f"column {shown(name)} holds {shown(value[name])}; a text is needed")
            value = [value[name] for name in self.columns]
        return _strings(value)


def _one_line(content: bytes) -> str:
    """The text of a line; ValueError, without the bytes in it, for another encoding."""
    if content.startswith(_UTF16):
        raise ValueError("it is UTF-16 or UTF-32 text, and UTF-8 is needed")
    return content.decode("utf-8-sig")


def _strings(value: object) -> Iterator[str]:
    """All strings in a parsed value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


class _NumberFault(ValueError):
    """A number that is not finite or beyond every float."""

    def __init__(self, number: str) -> None:
        super().__init__(number)
        self.number = number


def _raise_number_fault(number: str) -> NoReturn:
    raise _NumberFault(number)


def _float(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _raise_number_fault(number)


def _int(number: str) -> int:
    _float(number)
    return int(number)


def _place(text: str, at: int) -> str:
    """Where a character stands, in the words of json's own errors."""
    return f"line {text.count(chr(10), 0, at) + 1} column {at - text.rfind(chr(10), 0, at)}"


def _is_deep(value: object) -> bool:
    """Whether a parsed value is nested more than MAX_DEPTH deep."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [part for part in level if isinstance(part, (dict, list))]
        if not level:
            return False
        level = [part for holder in level for part in (holder.values() if type(holder) is dict else holder)]
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these names and values; ValueError where a name comes twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"an object names {shown(repeated)} twice")
    return value


# By what makes integers of their digits, and objects of their names and values; None for Python's own.
_DECODERS: dict[tuple[Any, Any], json.JSONDecoder] = {
    (parse_int, hook): json.JSONDecoder(
        parse_float=_float, parse_constant=_raise_number_fault, parse_int=parse_int, object_pairs_hook=hook
    )
    for parse_int in (None, _int)
    for hook in (None, _unique)
}
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
