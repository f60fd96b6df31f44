"""The commands as users meet them: bad input is one line, nothing is lost, Ctrl-C leaves a checkpoint."""

from __future__ import annotations

import html
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AlbertConfig, AlbertForQuestionAnswering, AutoModelForQuestionAnswering

from inputs import stock_model
from matching import save_checkpoint, squad_file, trained_model
from processes import with_sources
from pruned_trainer.cli import main
from pruned_trainer.demo import run as demo_run
from pruned_trainer.jobs.output import OutputFolder
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.training.callbacks import StopOnInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model and files, shared by the tests of this file."""
    folder = tmp_path_factory.mktemp("cli")
    save_checkpoint(trained_model(), folder / "model")
    squad_file(folder / "train.json", 200, 1)
    squad_file(folder / "eval.json", 60, 2, unanswerable=0.3)
    squad_file(folder / "validation.json", 60, 3, unanswerable=0.3)
    return folder


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        "prune", "--model", str(folder / "model"), "--train-file", str(folder / "train.json"),
        "--validation-file", str(folder / "validation.json"), "--eval-file", str(folder / "eval.json"),
        "--out", str(out), "--max-length", "24", "--stride", "4", "--gate-steps", "3",
        "--retrain-steps", "3", *more,
    ]  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    """Status 2 and one line that says it; argparse's own refusals exit with 2 as well."""
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and message in error, error
    assert "Traceback" not in error


def test_prune_compact_evaluate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(arguments(folder, out, "--params", "0.5")) == 0
    screen = capsys.readouterr().out
    for words in (
        "span F1",
        "encoder parameters",
        "size on disk",
        "sequences/s",
        "speed-up",
        "left in each layer",
        "█",
    ):
        assert words in screen
    report = json.loads((out / "report.json").read_text())
    assert report["command"] == shlex.join(["pruned-trainer", *arguments(folder, out, "--params", "0.5")])
    assert html.escape(report["command"]) in (out / "report.html").read_text(encoding="utf-8")
    assert report["target"]["asked"] == {"params": 0.5}
    card = (out / "README.md").read_text()
    assert f"| F1 | {report['dense']['f1']:.2f} | {report['pruned']['f1']:.2f} |" in card
    assert f"{report['speedup']['reached']:.2f}x" in card and report["machine"]["processor"] in card
    # compact: the same shapes from the recorded decision, without training.
    again = tmp_path / "again"
    decision = ["--decision", str(out / "decision.json"), "--out", str(again)]
    assert main(["compact", "--model", str(folder / "model"), *decision]) == 0
    shapes = AutoModelForQuestionAnswering.from_pretrained(again).config.layer_shapes
    assert shapes == report["shape"] and (again / "tokenizer.json").is_file()
    # evaluate: what the report says of the checkpoint that was saved, with the threshold that it carries.
    capsys.readouterr()
    predictions = tmp_path / "predictions.json"
    evaluate = [
        "evaluate",
        "--model",
        str(out),
        "--eval-file",
        str(folder / "eval.json"),
        "--max-length",
        "24",
    ]
    assert main([*evaluate, "--stride", "4", "--predictions", str(predictions)]) == 0
    assert f"{report['pruned']['f1']:.2f}" in capsys.readouterr().out
    assert json.loads(predictions.read_text()) == json.loads((out / "predictions-pruned.json").read_text())


def test_output_is_refused_or_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    refused(capsys, arguments(folder, out, "--macs", "0.5"), "is not empty; --overwrite replaces it")
    assert (out / "mine.txt").read_text() == "keep me"
    bad = arguments(folder, out, "--macs", "0.5", "--overwrite")
    bad[bad.index("--train-file") + 1] = str(tmp_path / "none.json")
    refused(capsys, bad, "none.json")
    assert (out / "mine.txt").read_text() == "keep me"  # what cannot work touches nothing
    assert main(arguments(folder, out, "--macs", "0.5", "--overwrite")) == 0
    assert not (out / "mine.txt").exists() and (out / "model.safetensors").is_file()


BAD_DATA: dict[str, tuple[Any, str]] = {
    "empty": ("", "the file is empty"),
    "not JSON": ("{", "not JSON"),
    "no questions": ({"version": "v2.0", "data": []}, "no questions"),
    "article": ({"data": [{"title": "Rome", "paragraphs": "x"}]}, "Rome"),
    "answer": (
        {"data": [{"title": "Rome", "paragraphs": [{"context": "a b", "qas": [
            {"id": "q7", "question": "?", "answers": [{"text": "zebra", "answer_start": 1}]}]}]}]},
        "q7",
    ),
    "outside": (
        {"data": [{"title": "Rome", "paragraphs": [{"context": "a b", "qas": [
            {"id": "q8", "question": "?", "answers": [{"text": "b", "answer_start": 400}]}]}]}]},
        "q8",
    ),
}  # fmt: skip


def test_bad_questions_are_left_out_and_counted_in_the_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One cannot be read, one leaves no room for its context, and one answer is moved by a character."""
    parsed = json.loads((folder / "train.json").read_text())
    first, second, third = (paragraph["qas"][0] for paragraph in parsed["data"][0]["paragraphs"][:3])
    first["question"] = None
    second["question"] = "w1 " * 40
    third["answers"][0]["answer_start"] += 1
    path = tmp_path / "some.json"
    path.write_text(json.dumps(parsed))
    argv = arguments(folder, tmp_path / "out", "--macs", "0.5")
    argv[argv.index("--train-file") + 1] = str(path)
    refused(capsys, argv, f"question {first['id']!r}: 'question' has type NoneType, not str")
    assert main([*argv, "--skip-bad"]) == 0
    screen = capsys.readouterr().out
    assert (
        "bad lines skipped: 1; the first" in screen
        and "answers moved to where their text stands: 1" in screen
    )
    faults = json.loads((tmp_path / "out" / "report.json").read_text())["data_faults"]
    assert (faults["skipped"], faults["repaired"]) == (2, 1)
    assert all(any(one["id"] in fault for fault in faults["first"]) for one in (first, second, third))


@pytest.mark.parametrize("fault", BAD_DATA)
def test_bad_data(fault: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = BAD_DATA[fault]
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    for option in ("--train-file", "--validation-file", "--eval-file"):
        argv = arguments(folder, tmp_path / "out", "--macs", "0.5")
        argv[argv.index(option) + 1] = str(path)
        refused(capsys, argv, message)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--params", "0.01"], "is the limit of what is within reach"),
        (["--macs", "1.5"], "a fraction kept between 0 and 1"),
        (["--macs", "0.5", "--params", "0.5"], "not allowed with"),
        ([], "a target is needed"),
        (["--macs", "0.5", "--max-length", "64"], "position table allows 32"),
        (["--macs", "0.5", "--batch-size", "0"], "batch_size is 0"),
        (["--macs", "0.5", "--gate-steps", "-3"], "gate_steps is -3"),
        (["--macs", "0.5", "--stride", "24"], "stride 24"),
        (["--macs", "0.5", "--max-minutes", "1"], "max_minutes has nothing to decide"),
        (["--macs", "0.5", "--gate-epochs", "1"], "gate_epochs, and gate_steps"),
        (["--speedup", "2", "--latency-table", "none.json"], "there is no latency table none.json"),
    ],
)
def test_bad_settings(
    more: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, arguments(folder, tmp_path / "out", *more), message)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_other_models(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 28}
    save_checkpoint(AlbertForQuestionAnswering(AlbertConfig(**sizes)), tmp_path / "albert")
    save_checkpoint(stock_model(vocab_size=28).bert, tmp_path / "headless")
    for name, message in (
        ("albert", "is a 'albert' model"),
        ("headless", "lacks qa_outputs"),
        ("none", "none"),
    ):
        argv = arguments(folder, tmp_path / "out", "--macs", "0.5")
        argv[argv.index("--model") + 1] = str(tmp_path / name)
        refused(capsys, argv, message)


def test_broken_checkpoints(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config that lies about a stock model, and a file that is none: one line each."""
    faults = {
        "layers": '"num_hidden_layers": 1',
        "width": '"hidden_size": 48',
        "text": '"hidden_size": "96"',
        "file": "",
    }
    for name, text in faults.items():
        broken = tmp_path / name
        shutil.copytree(folder / "model", broken)
        if text:
            key, value = text.split(": ")
            config = json.loads((broken / "config.json").read_text())
            config[json.loads(key)] = json.loads(value)
            (broken / "config.json").write_text(json.dumps(config))
        else:
            (broken / "model.safetensors").write_bytes(b"no tensors")
        argv = arguments(folder, tmp_path / "out", "--macs", "0.5")
        argv[argv.index("--model") + 1] = str(broken)
        refused(capsys, argv, f"{broken} cannot be loaded")


def test_inputs_are_never_replaced(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = tmp_path / "all"
    shutil.copytree(folder, same)
    for out in (same, same / "model"):
        refused(
            capsys,
            arguments(same, out, "--macs", "0.5", "--overwrite"),
            "which is needed; give another --out",
        )
    one_file = arguments(same, tmp_path / "out", "--macs", "0.5")
    one_file[one_file.index("--validation-file") + 1] = str(same / "eval.json")
    refused(capsys, one_file, "the evaluation file is never for choices")
    for judged in ("eval", "validation"):
        one_file = arguments(same, tmp_path / "out", "--macs", "0.5")
        one_file[one_file.index(f"--{judged}-file") + 1] = str(same / "train.json")
        refused(capsys, one_file, f"the {judged}_file is the train_file, and models know what they were tra")
    assert sorted(path.name for path in same.iterdir()) == sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (".", "which is needed; give another --out"),
        ("..", "which is needed; give another --out"),
        ("/", "/ cannot be replaced; give another --out"),
        ("train.json/out", "train.json is a file; --out names a folder"),
        ("train.json/deep/out", "train.json is a file; --out names a folder"),
    ],
)
def test_outputs_that_no_folder_can_be(
    folder: Path, out: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    refused(capsys, arguments(folder, Path(out), "--macs", "0.5", "--overwrite"), message)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-length", "0"], "max_length is 0: at least 1"),
        (["--stride", "-1"], "stride is -1: at least 0"),
        (["--max-length", "384"], "max_length is 384; the model's position table allows"),
        (["--validation-file", "eval.json"], "the evaluation file is never for choices"),
    ],
)
def test_evaluate_refuses_what_prune_does(
    more: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    argv = ["evaluate", "--model", "model", "--eval-file", "eval.json", "--max-length", "24", "--stride", "4"]
    refused(capsys, [*argv, *more], message)


def test_a_neighbour_called_old_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "mine").write_text("keep me")
    for more in ([], ["--overwrite"]):
        assert main(arguments(folder, tmp_path / "out", "--macs", "0.5", *more)) == 0
    assert (tmp_path / "out.old" / "mine").read_text() == "keep me"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.old"]


def test_bad_decision(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "decision.json").write_text("{}")
    argv = ["compact", "--model", str(folder / "model"), "--decision", str(tmp_path / "decision.json")]
    refused(capsys, [*argv, "--out", str(tmp_path / "out")], "is no decision file")
    argv[-1] = str(tmp_path / "none.json")
    refused(capsys, [*argv, "--out", str(tmp_path / "out")], "there is no file")


STEPS = 800  # reported every twentieth part; ten seconds of them


@pytest.mark.parametrize(("phase", "number"), [("gate", signal.SIGINT), ("retrain", signal.SIGTERM)])
def test_a_signal_leaves_a_checkpoint(
    phase: str, number: signal.Signals, folder: Path, tmp_path: Path
) -> None:
    argv = arguments(folder, tmp_path / "out", "--macs", "0.5", f"--{phase}-steps", str(STEPS))
    command = [sys.executable, "-m", "pruned_trainer.cli", *argv]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    screen = ""
    for line in process.stdout:
        screen += line
        if f"step {STEPS // 20}/{STEPS}" in line:  # the first report, and many steps to go
            break
    process.send_signal(number)
    screen += process.stdout.read()
    assert process.wait() == 130, screen
    assert f"stopped in the {phase} phase" in screen and "Traceback" not in screen
    assert "with --resume goes on from it" in screen
    (checkpoint,) = (tmp_path / "out.partial" / ("gates" if phase == "gate" else "retrain")).glob(
        "checkpoint-*"
    )
    assert (checkpoint / "model.safetensors").is_file() and (checkpoint / "optimizer.pt").is_file()
    assert not (tmp_path / "out").exists()
    if phase == "retrain":  # a narrow model like any other
        assert AutoModelForQuestionAnswering.from_pretrained(checkpoint).config.model_type == "pruned_bert"


def test_an_interrupted_demo_is_not_told_to_resume(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no --resume. Neither does the folder that it leaves tell the next one of it."""

    def teacher(source: str, settings: PruneSettings, folder: OutputFolder) -> None:
        shutil.copytree(source, folder.partial, dirs_exist_ok=True)
        folder.publish()

    argv = ["demo", "--model", str(folder / "model"), "--out", str(tmp_path / "out"), "--macs", "0.5"]
    for split in ("train", "validation", "eval"):
        argv += [f"--{split}-file", str(folder / f"{split}.json")]
    argv += ["--gate-steps", "3", "--retrain-steps", "3", "--max-length", "24", "--stride", "4"]
    monkeypatch.setattr(demo_run, "_fine_tune", teacher)
    monkeypatch.setattr(StopOnInterrupt, "__init__", lambda self: setattr(self, "requested", True))
    assert main(argv) == 130
    screen = "".join(capsys.readouterr())
    assert "stopped in the gate phase after step 1; its checkpoint is" in screen and "--resume" not in screen
    assert not (tmp_path / "out.partial" / "run.json").exists()
    assert main(argv) == 2
    assert "--resume" not in (error := capsys.readouterr().err) and "--overwrite replaces it" in error


def test_the_demo_refuses_bad_files_before_it_trains(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text("{")
    argv = ["demo", "--model", str(folder / "model"), "--out", str(tmp_path / "out")]
    refused(capsys, [*argv, "--eval-file", str(tmp_path / "bad.json")], "go with --train-file")
    files = ["--train-file", str(folder / "train.json"), "--eval-file", str(tmp_path / "bad.json")]
    refused(capsys, [*argv, *files], "not JSON")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]


def test_the_demo_on_files_of_ones_own(folder: Path, tmp_path: Path) -> None:
    argv = arguments(folder, tmp_path / "out", "--macs", "0.5")
    assert main(["demo", *argv[1:]]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.teacher"]
    assert (tmp_path / "out.teacher" / "model.safetensors").is_file()


def test_the_installed_command_runs(folder: Path) -> None:
    """The packages' own imports have run when the command does."""
    argv = ["evaluate", "--model", str(folder / "model"), "--eval-file", str(folder / "eval.json")]
    script = "import sys, pruned_cli; sys.exit(pruned_cli.trainer())"
    done = subprocess.run(
        [sys.executable, "-c", script, *argv, "--max-length", "24", "--stride", "4"],
        capture_output=True,
        text=True,
        env=with_sources(),
    )
    assert done.returncode == 0, done.stderr
    assert "f1_span" in done.stdout


@pytest.mark.parametrize("place", ["nowhere", "beside a folder", "empty folder"])
@pytest.mark.parametrize("command", ["prune", "demo", "finetune", "compact", "evaluate", "report"])
def test_a_folder_that_is_not_there(
    command: str,
    place: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line that names it and says what is needed; the hub is not asked for a path, also not for one that
    looks like the hub's OWNER/NAME."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    missing, new = {"nowhere": str(tmp_path / "no" / "model")}.get(place, "build/none"), str(tmp_path / "out")
    if place == "empty folder":
        Path(missing).mkdir()
    (tmp_path / "decision.json").write_text("{}")
    argv = {
        "prune": arguments(folder, tmp_path / "out", "--macs", "0.5"),
        "demo": ["demo", "--out", new],
        "finetune": ["finetune", "--train-file", str(folder / "train.json"), "--out", new],
        "compact": ["compact", "--decision", str(tmp_path / "decision.json"), "--out", new],
        "evaluate": ["evaluate", "--eval-file", str(folder / "eval.json")],
        "report": ["report", missing],
    }[command]
    more = [] if command == "report" else ["--model", missing]
    assert main([*argv, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pruned-trainer {command}: ") and missing in error and error.count("\n") == 1
    assert "hub" not in error and not Path(new).exists()


def test_predictions_do_not_replace_what_is_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(folder / "eval.json")
    argv = ["evaluate", "--model", str(folder / "model"), "--eval-file", str(folder / "eval.json")]
    before = (folder / "eval.json").read_bytes()
    for out in (folder / "eval.json", link):
        refused(capsys, [*argv, "--predictions", str(out)], "is what is read; give another --predictions")
    assert (folder / "eval.json").read_bytes() == before
