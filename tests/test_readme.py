"""What the README shows runs: its Python on a small checkpoint, its commands' names and options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from inputs import stock_model
from matching import save_checkpoint
from pruned_ops.cli import main as pruned_ops_main
from pruned_trainer.cli import main as pruned_trainer_main
from tiny_tokenizers import words

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = {"pruned-ops": pruned_ops_main, "pruned-trainer": pruned_trainer_main}


def blocks(kind: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    return [text for name, text in found if name == kind]


def commands() -> list[str]:
    """Each command line of the plain blocks, continued lines joined, comments left out."""
    joined = "\n".join(blocks("")).replace("\\\n", " ")
    lines = (line.split(" #")[0].strip() for line in joined.splitlines())
    return sorted({line for line in lines if line.split(" ")[0] in COMMANDS})


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_of_the_readme(number: int, tmp_path: Path) -> None:
    folder = save_checkpoint(stock_model(), tmp_path / "model")
    source = blocks("python")[number].replace("build/demo", str(folder))
    names: dict[str, Any] = {"text": words(20), "dataset": [{"question": "w1", "context": words(9)}]}
    names["pruned_ops"] = __import__("pruned_ops")
    exec(source, names)  # the README's own lines
    assert names.get("answer") is not None


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_readme_exist(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, command, *words_of = shlex.split(line)
    with pytest.raises(SystemExit) as ended:
        COMMANDS[program]([command, "--help"])
    assert ended.value.code == 0
    known = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    assert {word.split("=")[0] for word in words_of if word.startswith("--")} <= known


def test_there_are_some() -> None:
    assert len(commands()) > 8 and len(blocks("python")) > 1
