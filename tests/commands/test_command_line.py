"""The command lines as they are installed: what they answer without torch, and what every option says."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pruned_ops
from processes import with_sources
from pruned_ops import cli
from pruned_ops.command_line import BROKEN_PIPE
from pruned_ops.ops.backends import cpu
from pruned_trainer import cli as trainer_cli

COMMANDS = (
    "info",
    "check",
    "bench",
    "quantize",
    "serve",
    "ask",
    "export",
    "import",
    "trim-vocabulary",
    "latency-table",
)
# The installed script's way in, with modules that cannot be imported.
START = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
import pruned_cli
sys.argv = ["pruned-ops", *{argv!r}]
sys.exit(pruned_cli.ops())
"""


def started(*argv: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`pruned-ops ARGV` in a process of its own, outside the checkout."""
    return subprocess.run(
        [sys.executable, "-c", START.format(argv=argv, blocked=blocked)],
        capture_output=True,
        text=True,
        cwd="/",
        env=with_sources(),
    )


@pytest.mark.parametrize(
    "argv", [("--help",), ("--version",), *((command, "--help") for command in COMMANDS)], ids=" ".join
)
def test_help_needs_no_torch(argv: tuple[str, ...]) -> None:
    done = started(*argv, blocked=("torch", "transformers", "numpy"))
    assert (done.returncode, done.stderr) == (0, "")
    begin = f"pruned-ops {pruned_ops.__version__}\n" if argv == ("--version",) else "usage: pruned-ops "
    assert done.stdout.startswith(begin)


def test_a_mistyped_command_needs_no_torch() -> None:
    done = started("benhc", blocked=("torch",))
    assert (
        done.returncode == 2 and "invalid choice: 'benhc'" in done.stderr and "latency-table" in done.stderr
    )


def test_the_installed_command_runs() -> None:
    """The package's `__init__` has run when the command does: its ops and backends are there."""
    done = started("info")
    assert (done.returncode, done.stderr) == (0, "")
    assert "linear_add_layer_norm" in done.stdout and "reference  available" in done.stdout


@pytest.mark.skipif(cpu.extension is None, reason="pruned_ops._C is not built")
def test_a_processor_is_not_said_to_lack_what_the_environment_forbids(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ATEN_CPU_CAPABILITY leads to the least kernels on any processor; torch reads it once."""
    monkeypatch.setattr(cpu, "int8_capability", lambda: "DEFAULT")
    monkeypatch.setattr(cpu, "bf16_capability", lambda: None)
    cli.main(["info"])
    said = capsys.readouterr().out
    for kind in ("int8 kernels", "bf16 kernels"):
        (line,) = (line for line in said.splitlines() if kind in line)
        assert "or ATEN_CPU_CAPABILITY forbids them" in line


def commands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (action.choices for action in cli.build_parser()._actions if action.dest == "command")
    assert isinstance(choices, dict)
    return choices


def test_all_commands_are_there() -> None:
    assert tuple(commands()) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_sentence_and_its_default_once(command: str) -> None:
    parser = commands()[command]
    assert parser.description
    for action in parser._actions:
        assert action.help, action.dest
        said = str(parser._get_formatter()._expand_help(action))
        has_default = action.default not in (None, False, argparse.SUPPRESS)
        assert said.count("(default: ") == 1 if has_default else said.count("(default: ") <= 1, said
        assert "None" not in said and "[" not in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_long_help_comes_in_groups(command: str) -> None:
    plain = commands()[command]._action_groups[1]
    assert plain.title == "options" and len(plain._group_actions) <= 6


def test_a_path_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that has --out=~/new in one word leaves the ~ to the program."""
    monkeypatch.setenv("HOME", "/home/me")
    said = cli.parse(["bench", "~/model", "--dense=~/dense", "--html=~/page.html"])
    assert [said.folder, said.dense, said.html] == [
        Path(f"/home/me/{name}") for name in ("model", "dense", "page.html")
    ]
    assert said.command_line == "pruned-ops bench '~/model' '--dense=~/dense' '--html=~/page.html'"
    said = cli.parse(["quantize", "~/model", "~/new", "--texts=~/texts.txt"])
    assert (said.model, said.out) == ("/home/me/model", Path("/home/me/new"))
    assert cli.parse(["serve", "~/model", "owner/name"]).models == ["/home/me/model", "owner/name"]
    serve = cli.parse(["serve", "rank=~/ranker", "rank=owner/name", "~/a=b"])
    assert serve.models == ["rank=/home/me/ranker", "rank=owner/name", "/home/me/a=b"]
    assert cli.parse(["ask", "model", "--questions=~/asked.jsonl"]).questions == "/home/me/asked.jsonl"
    said = trainer_cli.parse(
        [
            "prune",
            "--model=~/model",
            "--teacher=~/teacher",
            "--train-file=~/train.json",
            "--out=~/new",
            "--macs=0.5",
        ]
    )
    assert (said.model, said.teacher) == ("/home/me/model", "/home/me/teacher")
    assert (said.train_file, said.out) == (Path("/home/me/train.json"), Path("/home/me/new"))
    assert trainer_cli.parse(["evaluate", "--model=owner/name", "--eval-file=x"]).model == "owner/name"


@pytest.mark.parametrize("command", ["latency-table", "import", "export", "ask", "check", "bench"])
def test_a_folder_that_is_not_there(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = "build/no-such-model", str(tmp_path / "new")  # OWNER/NAME, as a model of the hub has it
    argv = {
        "latency-table": [file, "--model", folder, "--length", "9"],
        "import": [folder, file],
        "export": [folder, "--onnx", file],
        "ask": [folder, "--questions", "-"],
    }.get(command, [folder])
    assert cli.main([command, *argv]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"pruned-ops {command}: {folder} holds no config.json: there is no such folder; the folder of a "
        "checkpoint is needed\n"
    )
    assert not Path(file).exists()


def test_too_little_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """As for a batch that is too large for a GPU."""

    def too_large(_: argparse.Namespace) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")

    assert cli.run(argparse.Namespace(command="bench", run=too_large)) == 2
    error = capsys.readouterr().err
    assert error == "pruned-ops bench: CUDA out of memory. Tried to allocate 9 GiB\n"


@pytest.mark.parametrize("program", [cli, trainer_cli], ids=["pruned-ops", "pruned-trainer"])
def test_a_pipe_that_nobody_reads_ends_a_command_quietly(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in `pruned-ops info | head -3`: whether the command or the last flush finds it out."""

    def printing(_: argparse.Namespace, flush: bool) -> None:
        print("a line", flush=flush)

    for flush in (True, False):
        reader, writer = os.pipe()
        os.close(reader)
        command = argparse.Namespace(command="info", run=partial(printing, flush=flush))
        with open(writer, "w") as pipe:
            monkeypatch.setattr(sys, "stdout", pipe)
            assert program.run(command) == BROKEN_PIPE
            monkeypatch.undo()
    assert capsys.readouterr().err == ""
