"""The command line: what it answers without torch, what every option says, and the settings that it makes."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from processes import with_sources
from pruned_ops import __version__
from pruned_trainer import Target
from pruned_trainer.cli import build_parser, parse, settings_of
from pruned_trainer.demo import run as demo_run
from pruned_trainer.jobs.finetune_settings import FineTuneSettings
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.pruning.options import UNITS


def test_two_splits_of_one_name_are_two_files(tmp_path: Path) -> None:
    """Not so two times the same split, a folder that has none, or one of Natural Questions, which have
    none."""
    folder, one = tmp_path / "data", tmp_path / "one"
    folder.mkdir()
    one.mkdir()
    (one / "state.json").touch()  # as `Dataset.save_to_disk` leaves it
    for task, train, judged, same in (
        ("squad", str(folder), str(folder), False),
        ("squad", "a/b", "a/b", False),
        ("squad", "a/b:train", "a/b:train", True),
        ("squad", "a/b:train", "a/b:validation", False),
        ("squad", "a/b", "a/b:train", True),
        ("squad", f"{folder}:train", str(folder), False),
        ("squad", f"{folder}:validation", str(folder), True),
        ("squad", str(one), str(one), True),
        ("natural_questions", str(folder), str(folder), True),
    ):
        argv = ["prune", "--model", "m", "--out", "o", "--macs", "0.5", "--task", task]
        argv += ["--train-file", train, "--eval-file", judged]
        if same:
            with pytest.raises(ValueError, match="the eval_file is the train_file"):
                settings_of(parse(argv))
        else:
            assert settings_of(parse(argv))


@pytest.mark.parametrize("names", [("a/b", "a/b:validation"), ("a/b:validation", "a/b")])
def test_one_split_under_two_names_is_not_for_choices_and_results(names: tuple[str, str]) -> None:
    """Where none is named, files that models are judged on are the split validation."""
    argv = ["prune", "--model", "m", "--out", "o", "--macs", "0.5", "--train-file", "t"]
    with pytest.raises(ValueError, match="the evaluation file is never for choices"):
        settings_of(parse([*argv, "--validation-file", names[0], "--eval-file", names[1]]))
    assert settings_of(parse([*argv, "--validation-file", "a/b:test", "--eval-file", "a/b"]))


def test_texts_that_models_are_judged_on_are_not_trained_on(tmp_path: Path) -> None:
    """Also without their labels: what a model was taught about them is in its scores."""
    file = tmp_path / "rows.jsonl"
    file.write_text("{}")
    argv = ["prune", "--model", "m", "--out", "o", "--macs", "0.5", "--task", "text-classification"]
    assert settings_of(parse([*argv, "--texts", str(file), "--eval-file", str(tmp_path / "other.jsonl")]))
    for name in ("eval", "validation"):
        with pytest.raises(ValueError, match=f"the {name}_file is the texts, and models know"):
            settings_of(parse([*argv, "--texts", str(file), f"--{name}-file", str(file)]))


@pytest.mark.parametrize(
    ("recipe", "more", "steps"),
    [
        ("joint", [], (demo_run.GATE_STEPS, demo_run.RETRAIN_STEPS)),
        ("fast", [], (None, None)),
        ("fast", ["--retrain-steps", "7"], (None, 7)),
        ("gain", ["--gate-steps", "5"], (5, demo_run.RETRAIN_STEPS)),
        ("leave-one-out", [], (None, demo_run.RETRAIN_STEPS)),
        ("joint", ["--retrain-epochs", "0"], (None, None)),
    ],
)
def test_the_demo_has_steps_of_its_own_for_what_the_recipe_trains(
    recipe: str, more: list[str], steps: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = dict.fromkeys(("train", "validation", "evaluation"), Path("generated.json"))
    files["train"], files["validation"] = Path("train.json"), Path("validation.json")
    monkeypatch.setattr(demo_run, "write_demo_set", lambda folder: files)
    settings = settings_of(parse(["demo", "--recipe", recipe, *more]), default=Target(macs=0.5))
    made = demo_run._with_generated_files(settings)
    assert (made.gate_steps, made.retrain_steps) == steps


# The installed script's way in, with modules that cannot be imported.
START = """
import sys
sys.modules.update(dict.fromkeys(("torch", "transformers", "numpy")))
import pruned_cli
sys.argv = ["pruned-trainer", *{argv!r}]
sys.exit(pruned_cli.trainer())
"""


COMMANDS = ("prune", "evaluate", "report", "demo", "finetune", "sweep", "compact")


@pytest.mark.parametrize(
    "argv", [("--help",), ("--version",), *((command, "--help") for command in COMMANDS)], ids=" ".join
)
def test_help_needs_no_torch(argv: tuple[str, ...]) -> None:
    script = START.format(argv=argv)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=with_sources())
    assert (done.returncode, done.stderr) == (0, "")
    begin = f"pruned-trainer {__version__}\n" if argv == ("--version",) else "usage: pruned-trainer "
    assert done.stdout.startswith(begin)


def parsers() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (action.choices for action in build_parser()._actions if action.dest == "command")
    assert isinstance(choices, dict)
    return choices


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_sentence_and_its_default_once(command: str) -> None:
    assert tuple(parsers()) == COMMANDS
    parser = parsers()[command]
    assert parser.description
    for action in parser._actions:
        assert action.help, action.dest
        text = str(parser._get_formatter()._expand_help(action))
        is_target = action.dest in UNITS
        # A switch is off, and a target that is not given is none; every other option says its default.
        if action.required or isinstance(action.default, bool) or is_target or action.dest == "help":
            assert text.count("(default: ") <= 1, text
        else:
            assert text.count("(default: ") == 1, text
        assert "None" not in text and "[" not in text


def test_the_demo_lists_no_option_that_it_refuses() -> None:
    refused = {"task", "resume", "null_rate", "num_proc", "skip_bad"}
    assert not refused & {action.dest for action in parsers()["demo"]._actions}
    assert refused <= {action.dest for action in parsers()["prune"]._actions}
    settings = settings_of(parse(["demo"]), default=Target(macs=0.5))
    plain = PruneSettings("", Path(), Path("build/demo"), (Target(macs=0.5),), command=settings.command)
    assert settings == plain


def test_the_help_of_prune_comes_in_groups() -> None:
    groups = [group for group in parsers()["prune"]._action_groups[2:] if group._group_actions]
    assert [group.title for group in groups] == [
        "what most runs need",
        "target",
        "how the pruned model will be served",
        "data",
        "how long it trains",
        "how parts are chosen and cut out",
        "how the weights are trained",
        "distillation",
        "running",
    ]
    first = [action.option_strings[0] for action in groups[0]._group_actions]
    assert first[:2] == ["--model", "--train-file"] and {"--recipe", "--max-minutes", "--out"} <= set(first)
    assert len(first) <= 8


@pytest.mark.parametrize("command", ["prune", "sweep", "demo", "finetune", "evaluate"])
def test_every_option_of_a_long_help_is_in_a_group_and_what_is_required_comes_first(command: str) -> None:
    plain, *groups = parsers()[command]._action_groups[1:]
    assert plain.title == "options" and [action.dest for action in plain._group_actions] == ["help"]
    assert all(group.title for group in groups)
    later = [action.dest for group in groups[1:] for action in group._group_actions if action.required]
    assert groups[0].title == "what most runs need" and later == []


def test_the_defaults_are_those_of_the_settings() -> None:
    argv = ["prune", "--model", "m", "--train-file", "t", "--out", "o", "--macs", "0.5"]
    settings = settings_of(parse(argv))
    plain = PruneSettings("m", Path("t"), Path("o"), (Target(macs=0.5),), command=settings.command)
    assert settings == plain
    arguments = parse(["finetune", "--model", "m", "--train-file", "t", "--out", "o"])
    for name, value in vars(FineTuneSettings("m", Path("t"), Path("o"))).items():
        assert getattr(arguments, name) == value, name
