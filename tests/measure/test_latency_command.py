"""`pruned-ops latency-table`: the workload that it makes, the table that it writes, and what it refuses."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path

import pytest
from transformers import AlbertConfig, BertConfig

from inputs import stock_model
from matching import squad_file
from pruned_ops.cli import main
from pruned_ops.measure.latency import LatencyTable
from pruned_ops.measure.timing import Workload
from pruned_ops.qa.questions import arrival_lengths, window_lengths
from pruned_ops.qa.windows import windows
from tiny_tokenizers import word_tokenizer, words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, and a file of questions."""
    folder = tmp_path_factory.mktemp("latency")
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 40}
    stock_model("bert", **sizes).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    BertConfig().save_pretrained(folder / "config-only")
    AlbertConfig().save_pretrained(folder / "albert")
    squad_file(folder / "data.json", 40, 1)
    return folder


def test_lengths_are_those_of_arrival_order(tmp_path: Path) -> None:
    rows = [("w1", " ".join(["w2"] * n)) for n in range(1, 30)]
    paragraphs = [{"context": context, "qas": [{"question": question}]} for question, context in rows]
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs[:9]}, {"paragraphs": paragraphs[9:]}]}))
    by_question: list[list[int]] = [[] for _ in rows]
    for window in windows(word_tokenizer(), *map(list, zip(*rows, strict=True)), 20, 4):
        by_question[window.question_index].append(len(window))
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    expected = [length for number in order for length in by_question[number]]
    assert len(expected) > len(rows) and arrival_lengths(by_question) == expected
    assert window_lengths(path, word_tokenizer(), 20, 4) == expected
    assert window_lengths(path, word_tokenizer(), 20, 4, needed=7) == expected[:7]


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.json"
    common = ["latency-table", str(path), "--model", str(folder / "model"), "--rounds", "1", "--batches", "2"]
    argv = [*common, "--data", str(folder / "data.json"), "--batch-size", "3"]
    argv += ["--dtype", "int8", "--threads", "1"]
    assert main(argv) == 0
    screen = capsys.readouterr().out
    for text in ("num_heads", "ffn_width", "a quarter", "dense", "alignment", f"written to {path}"):
        assert text in screen
    made = LatencyTable.load(path)
    assert made.workload.name == "arrival-b3" and [len(b) for b in made.workload.batches] == [3, 3]
    assert made.command == " ".join(["pruned-ops", *argv])
    assert made.dtype == "int8" and made.machine["threads"] == 1
    assert made.attention[-1][0] == 4 and made.ffn[-1][0] == 40
    fixed = [*common, "--length", "9", "--batch-size", "2"]
    assert main(fixed) == 2 and "--overwrite replaces it" in capsys.readouterr().err
    assert LatencyTable.load(path) == made
    assert main([*fixed, "--overwrite"]) == 0
    again = LatencyTable.load(path)
    assert again.workload == Workload("fixed9-b2", ((9, 9),) * 2) and again.dtype == "float32"
    remade = made.remake_command(path, folder / "model", "int8", threads=1)
    assert main(shlex.split(remade)[1:]) == 0
    third = LatencyTable.load(path)
    assert third.command == remade
    assert (third.workload, third.dtype, third.machine) == (made.workload, made.dtype, made.machine)


def test_windows_of_data_are_as_long_as_the_model_takes(folder: Path, tmp_path: Path) -> None:
    """As in `pruned-ops bench`; and a window that is shorter than the usual stride has its own."""
    path, data = tmp_path / "table.json", tmp_path / "long.jsonl"
    data.write_text(json.dumps({"question": "w1", "context": words(200)}))
    argv = ["latency-table", str(path), "--model", str(folder / "model"), "--data", str(data)]
    argv += ["--rounds", "1", "--batch-size", "2", "--batches", "1", "--overwrite"]
    for more, longest in (([], 80), (["--max-length", "60"], 60)):
        assert main([*argv, *more]) == 0
        assert LatencyTable.load(path).workload.batches == ((longest, longest),)


def test_bad_questions_are_skipped_where_that_is_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = tmp_path / "table.json", tmp_path / "bad.jsonl"
    good, long = {"question": "w1", "context": words(11)}, {"question": words(99), "context": words(99)}
    data.write_text("\n".join(map(json.dumps, [good, {"question": 1}, long, good])))
    argv = ["latency-table", str(path), "--model", str(folder / "model"), "--data", str(data)]
    argv += ["--rounds", "1", "--batch-size", "2", "--batches", "2"]
    assert main(argv) == 2 and "bad.jsonl: line 2 is no object" in capsys.readouterr().err
    assert not path.exists()
    assert main([*argv, "--skip-bad"]) == 0
    assert "2 bad questions skipped; the first: " in capsys.readouterr().err
    assert LatencyTable.load(path).workload.batches == ((15, 15),)


def test_command_refuses(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, model, data = str(tmp_path / "new.json"), str(folder / "model"), str(folder / "data.json")
    (tmp_path / "text").write_text("mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    fixed = ["--model", model, "--length", "9"]
    for argv, message in (
        ([new, *fixed, "--batch-size", "0"], "--batch-size is 0"),
        ([new, *fixed, "--batches", "0"], "--batches is 0"),
        ([new, *fixed, "--threads", "0"], "--threads is 0"),
        ([new, *fixed, "--rounds", "-1"], "--rounds is -1"),
        ([new, "--model", model, "--length", "0"], "--length is 0"),
        ([new, *fixed, "--max-length", "20"], "--max-length and --stride go with --data"),
        ([new, *fixed, "--stride", "4"], "--max-length and --stride go with --data"),
        ([new, *fixed, "--skip-bad"], "--skip-bad goes with --data"),
        ([new, "--model", model, "--length", "81"], "position table allows 80"),
        ([new, "--model", str(tmp_path), "--length", "9"], "holds no config"),
        ([new, "--model", str(tmp_path / "broken"), "--length", "9"], "cannot be loaded"),
        ([new, "--model", str(folder / "albert"), "--length", "9"], "a albert model is not measured"),
        ([new, "--model", str(folder / "config-only"), "--data", data], "holds no tokenizer"),
        ([new, "--model", model, "--data", str(tmp_path / "missing.json")], "missing.json"),
        ([new, "--model", model, "--data", str(tmp_path / "text")], "is no SQuAD-format JSON"),
        ([new, "--model", model, "--data", data, "--stride", "500"], "stride 500"),
        ([new, "--model", model, "--data", data, "--max-length", "81"], "windows of 81 tokens are too long"),
        ([new, "--model", model, "--data", data, "--batch-size", "99"], "do not fill a batch of 99"),
        ([str(tmp_path), *fixed], "is a folder"),
        ([str(tmp_path / "no/t.json"), *fixed], "is no folder"),
        ([str(tmp_path / "text"), *fixed, "--overwrite"], "it is not replaced"),
    ):
        assert main(["latency-table", *argv]) == 2, argv
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert error.startswith("pruned-ops latency-table: ")
    for argv in ([new, "--model", model], [new, *fixed, "--data", data]):
        with pytest.raises(SystemExit) as stop:
            main(["latency-table", *argv])
        assert stop.value.code == 2
    assert (tmp_path / "text").read_text() == "mine" and not Path(new).exists()
