"""`pruned-ops ask` as users meet it: what was answered is written, a bad line is named, pipes and Ctrl-C end
well."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any

import pytest

from inputs import stock_model
from matching import save_checkpoint, squad_file
from pruned_ops import QuestionAnswerer
from pruned_ops.cli import main
from tiny_tokenizers import word_tokenizer, words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model, with its tokenizer of 24 words."""
    model = stock_model()
    model.config.null_score_threshold = 1e9  # it always answers
    return save_checkpoint(model, tmp_path_factory.mktemp("ask") / "model")


GOOD = [
    {"id": "a", "question": "w1", "context": words(20)},
    {"id": 7, "question": "w2 w3", "context": "w4 w5"},
    {"question": "w1", "context": ""},
    {"id": None, "question": "w5", "context": words(200), "answers": ["not read"]},
]


def lines_of(*records: Any) -> bytes:
    return b"".join(one if isinstance(one, bytes) else json.dumps(one).encode() + b"\n" for one in records)


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, list[dict[str, Any]], str]:
    """Status, answers, and what stands on stderr."""
    status = main(["ask", *map(str, argv)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_a_tokenizer_of_another_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock_model().save_pretrained(tmp_path / "model")
    word_tokenizer(200).save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("w1 w150 w2")
    capsys.readouterr()  # what saving says
    status, _, error = run(
        capsys, tmp_path / "model", "--question", "w1", "--context-file", tmp_path / "text"
    )
    assert status == 2 and error.count("\n") == 1
    assert "input_ids holds 154; its table has 100 rows" in error


def test_json_lines(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + lines_of(GOOD[0], b"  \n", *GOOD[1:]))
    status, found, error = run(capsys, folder, "--questions", source)
    assert (status, error) == (0, "")
    assert [one["line"] for one in found] == [1, 3, 4, 5]
    assert [one.get("id", "none") for one in found] == ["a", 7, "none", None]
    pairs = [(record["question"], record["context"]) for record in GOOD]
    expected = list(QuestionAnswerer(folder, device="cpu").stream(pairs, progress=False))
    for one, answer in zip(found, expected, strict=True):
        assert {"answer": one["answer"], "start": one["start"], "end": one["end"]} == {
            "answer": answer.answer, "start": answer.start, "end": answer.end,
        }  # fmt: skip
        assert one["score"] == pytest.approx(answer.score, abs=1e-5)
    status, found, _ = run(capsys, folder, "--questions", source, "--out", out, "--top-k", 2)
    assert status == 0 and found == []
    written = [json.loads(line)["answers"] for line in out.read_text("utf-8").splitlines()]
    assert [len(answers) for answers in written] == [2, 2, 1, 2]
    status, _, error = run(capsys, folder, "--questions", source, "--out", out)
    assert status == 2 and "--overwrite replaces it" in error
    status, _, error = run(capsys, folder, "--questions", source, "--out", source, "--overwrite")
    assert status == 2 and "is what is read" in error and source.stat().st_size


def test_a_file_in_squads_format_is_named_and_a_line_with_paragraphs_is_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = run(capsys, folder, "--questions", squad_file(tmp_path / "squad.json", 2, 1))
    assert status == 2 and "is SQuAD-format JSON; --questions takes JSON lines" in error
    source = tmp_path / "q.jsonl"
    source.write_bytes(lines_of({**GOOD[1], "paragraphs": [{"title": "w1"}]}))
    status, (found,), error = run(capsys, folder, "--questions", source)
    assert (status, found["id"], error) == (0, 7, "")


def test_one_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("w3 😀 w4")
    status, found, _ = run(capsys, folder, "--question", "w1", "w2", "--context-file", text)
    assert status == 0 and [one["line"] for one in found] == [1, 2]
    assert all(one["answer"] == "w3 😀 w4"[one["start"] : one["end"]] for one in found)
    text.write_bytes(b"\xff\xfe")
    for argv, message in (
        ((folder, "--question", "w1", "--context-file", text), "is no UTF-8 text"),
        ((folder, "--question", "w1"), "--question goes with --context-file"),
        ((folder, "--questions", text, "--context-file", text), "--question goes with --context-file"),
        ((folder, "--questions", tmp_path / "none"), "there is no file"),
        ((folder, "--questions", tmp_path), "there is no file"),
        ((folder, "--questions", text, "--out", tmp_path / "none" / "a"), "in a folder that is there"),
        ((tmp_path, "--questions", text), "holds no config.json"),
        ((folder, "--questions", text, "--top-k", 0), "--top-k is 0"),
        ((folder, "--questions", text, "--device", "nowhere"), "device nowhere cannot be used here"),
    ):
        status, found, error = run(capsys, *argv)
        assert (status, found) == (2, []) and message in error and error.count("\n") == 1


BAD = [
    (b"{oops\n", "no JSON object"),
    ([1, 2], "it is a list, not an object"),
    (b"\xff\n", "can't decode byte"),
    (b"[" * 100_000 + b"\n", "no JSON object"),
    ({"question": "w1"}, "the question has no context"),
    ({"question": None, "context": "w1"}, "the question has NoneType for its question"),
    (b'{"question": "\\ud83d", "context": "w1"}\n', "half a surrogate pair"),
    ({"question": words(90), "context": "w1"}, "the question is too long"),
]


def test_bad_lines(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    for line, message in BAD:
        given(lines_of(*GOOD[:2], line, GOOD[2]))
        status, found, error = run(capsys, folder, "--questions", "-")
        assert status == 2 and [one["line"] for one in found] == [1, 2]
        assert error.startswith("pruned-ops ask: line 3: ") and message in error
    given(lines_of(GOOD[0], *(line for line, _ in BAD), *GOOD[1:]))
    status, found, error = run(capsys, folder, "--questions", "-", "--skip-bad")
    assert status == 0 and [one["line"] for one in found] == [1, 10, 11, 12]
    assert all(f"line {number} skipped: " in error for number in range(2, 10))
    assert error.endswith("8 bad lines skipped\n")
    path = tmp_path / "asked.jsonl"
    path.write_bytes(lines_of(GOOD[0], BAD[0][0]))
    status, found, error = run(capsys, folder, "--questions", path)
    assert status == 2 and f"{path}: line 2: " in error and "oops" not in error
    status, found, error = run(capsys, folder, "--questions", path, "--skip-bad")
    assert status == 0 and f"{path}: line 2 skipped: " in error


# A test run that was started in the background hands on that Ctrl-C is ignored.
START = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pruned_ops.cli import main
sys.exit(main())
"""


def asking(folder: Path) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", START, "ask", str(folder), "--questions", "-"]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)


def feed(pipe: IO[bytes], content: bytes) -> None:
    """Write as long as somebody reads."""
    with suppress(BrokenPipeError):
        pipe.write(content)
    with suppress(BrokenPipeError):
        pipe.close()


def test_a_broken_pipe_ends_quietly(folder: Path) -> None:
    with asking(folder) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()  # like `| head` that has seen enough
        feed(process.stdin, lines_of(*GOOD * 500))
        assert process.wait() == 141
        assert process.stderr.read() == b""


def test_ctrl_c_keeps_what_was_answered(folder: Path) -> None:
    with asking(folder) as process:
        assert process.stdin and process.stdout and process.stderr
        # In a thread, for it is more than a pipe holds.
        writer = Thread(target=feed, args=(process.stdin, lines_of(*GOOD * 2000)))
        writer.start()
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read().splitlines()
        assert process.wait() == 130
        writer.join()
        assert process.stderr.read() == b"interrupted\n"
    found = [json.loads(line)["line"] for line in (first, *rest)]
    assert found == list(range(1, len(found) + 1)) and len(found) < 8000


def test_always_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that never answers gives its best span where that is asked for, with the span's own score."""
    model = stock_model()
    model.config.null_score_threshold = -1e9
    shy = save_checkpoint(model, tmp_path / "shy")
    text = tmp_path / "text.txt"
    text.write_text(words(20), encoding="utf-8")
    asked = (shy, "--question", "w1", "--context-file", text)
    assert run(capsys, *asked)[1][0]["answer"] == ""
    status, (found,), _ = run(capsys, *asked, "--always-answer")
    assert status == 0 and found["answer"] == words(20)[found["start"] : found["end"]] != ""
    expected = QuestionAnswerer(shy, device="cpu").answer("w1", words(20), allow_none=False)
    assert found["score"] == pytest.approx(expected.score, abs=1e-5)
    _, (listed,), _ = run(capsys, *asked, "--always-answer", "--top-k", 1000)
    assert len(listed["answers"]) > 1 and all(answer["answer"] for answer in listed["answers"])
