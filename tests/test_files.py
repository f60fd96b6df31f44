"""The one reader of JSON: what is taken, what is refused, and that a refusal names the place in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruned_ops.files import (
    MAX_DEPTH,
    TextFile,
    digest,
    new_folder,
    parse_json,
    read_json,
    read_text,
    shown,
    write_json,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES, st.booleans())
def test_every_value_is_read_as_it_was_written(value: Any, escaped: bool) -> None:
    text = json.dumps(value, ensure_ascii=escaped)
    assert parse_json(text.encode()) == value == parse_json(b"\xef\xbb\xbf" + text.encode())


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    "content", [nested(MAX_DEPTH), rb'"\\ud800"', rb'"\ud83d\ude00 \\\ud83d\uDE00"', b"1e308"]
)
def test_what_only_looks_hostile_is_taken(content: bytes) -> None:
    assert parse_json(content) == json.loads(content)


def test_a_name_that_comes_twice_is_refused_where_it_is_asked_for() -> None:
    content = b'{"a": [{"b": 1, "c": 12345678901234567890, "b": 2}]}'
    assert parse_json(content) == {"a": [{"b": 2, "c": 12345678901234567890}]}
    with pytest.raises(ValueError, match="^an object names 'b' twice$"):
        parse_json(content, unique=True)
    assert parse_json(b'{"b": {"b": 1}}', unique=True) == {"b": {"b": 1}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\xef\xbb\xbf \n", "it is empty"),
        (b'{"secret": ', "Expecting value: line 1 column 12"),
        (b'{"secret":\n "\xc5sa"}', r"can't decode byte 0xc5 in position 13: .* \(line 2\)"),
        ('{"secret": 1}'.encode("utf-16"), "it is UTF-16 or UTF-32 text, and UTF-8 is needed"),
        ('{"secret": 1}'.encode("utf-16-be"), "Expecting"),
        (b'["secret",\n "\\ud800"]', r"half a surrogate pair \(\\ud800\): line 2 column 3"),
        (b'["secret \\uDC00\\uD800"]', r"half a surrogate pair \(\\uDC00\): line 1 column 10"),
        (nested(MAX_DEPTH + 1), "nested more than 64 deep"),
        (b'{"secret": ' * 65 + b"1" + b"}" * 65, "nested more than 64 deep"),
        (nested(100_000), "nested more than 64 deep"),
        (b'{"secret": "NaN", "x":\n NaN}', "'NaN' is no finite number: line 2 column 2"),
        (b"[-Infinity]", "'-Infinity' is no finite number: line 1 column 2"),
        (b'{"secret": 1e400}', "'1e400' is no finite number: line 1 column 12"),
        (b"[1, 1" + b"0" * 400 + b"]", r"'100000.*\.\.\..*000' is no finite number: line 1 column 5"),
        (b"[1, 1" + b"0" * 9000 + b"]", r"'100000.*\.\.\..*000' is no finite number: line 1 column 5"),
    ],
)
def test_a_refusal_names_the_place_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"value\.json is no JSON: .*{message}") as refusal:
        read_json(path)
    said = repr(refusal.value)
    assert "secret" not in said and "\n" not in str(refusal.value) and len(said) < 250 + len(str(path))


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"huge\.json is 1,099,511,627,776 bytes large"):
        read_json(path)


def test_texts(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffÅsa".encode())
    assert read_text(path) == "Åsa"
    path.write_bytes("secret Åsa".encode("latin1"))
    with pytest.raises(ValueError, match=r"text\.txt is no UTF-8 text: .*0xc5 in position 7") as refusal:
        read_text(path)
    assert "secret" not in repr(refusal.value)


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    """What Unicode calls a separator, and str.splitlines an end, is part of a text."""
    path, odd = tmp_path / "text.txt", "a\u2028b\x85c\x0bd\x0ce\x1cf\rg"
    path.write_bytes(f"\ufeff{odd}\r\n\n \t\n\u200b\nlast".encode())
    assert list(TextFile(path).lines()) == [(1, [odd]), (4, ["\u200b"]), (5, ["last"])]
    assert list(TextFile(path)) == [odd, "\u200b", "last"]
    for content, message in (
        ("a\nsecret Å".encode("latin1"), r"line 2: .*0xc5 in position 7: [a-z ]*$"),
        ("a".encode("utf-16"), "line 1: it is UTF-16"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(TextFile(path))


def test_values_are_quoted_short() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10_000, list(range(10_000)), {"k": ["v" * 9999] * 99}, 10**4000, deep):
        assert len(shown(value)) <= 200 and "\n" not in shown(value)
    assert shown("a\nb") == r"'a\nb'" and shown({"a": 1}) == "{'a': 1}"


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path: Path) -> None:
    """The loss of a training that diverged, say: what is written can be read again."""
    path, inf = tmp_path / "log.json", float("inf")
    write_json(path, {"log": [{"loss": float("nan"), "norm": inf, "step": 3}, (1.5, -inf)]})
    assert read_json(path) == {"log": [{"loss": None, "norm": None, "step": 3}, [1.5, None]]}


def test_a_digest_is_of_contents_and_names(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "rows.jsonl").write_text("{}\n")
    (folder / "config.json").write_text("{}")
    whole, direct = digest(folder), digest(folder, "*.*")
    (folder / ".cache").mkdir()  # the hub's client keeps the times of its downloads there
    for name in ("README.md", ".lock", "cache-1.arrow", ".cache/rows.jsonl.metadata"):
        (folder / name).write_text("not data")
    assert (digest(folder), digest(folder, "*.*")) == (whole, direct)
    (folder / "cache-of-mine.jsonl").write_text("{}")
    assert digest(folder) != whole
    (folder / "cache-of-mine.jsonl").unlink()
    (folder / "inner" / "rows.jsonl").write_text("{ }\n")
    assert digest(folder) != whole and digest(folder, "*.*") == direct
    (folder / "inner" / "rows.jsonl").write_text("{}\n")
    assert digest(folder) == whole
    (folder / "inner" / "rows.jsonl").rename(folder / "rows.jsonl")
    assert digest(folder) != whole != digest(folder / "rows.jsonl")


@pytest.mark.parametrize(("umask", "of_file", "of_folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_a_new_folder_is_as_open_as_the_umask_says(
    umask: int, of_file: int, of_folder: int, tmp_path: Path
) -> None:
    """Also what a library wrote for its maker alone, as safetensors does; what can be run stays so."""
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "new") as stage:
            (stage / "inner").mkdir(mode=0o700)
            for name, mode in (("model.safetensors", 0o600), ("inner/script", 0o700)):
                (stage / name).touch(mode)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {
        "new": of_folder,
        "inner": of_folder,
        "model.safetensors": of_file,
        "script": of_file | 0o100,
    }
