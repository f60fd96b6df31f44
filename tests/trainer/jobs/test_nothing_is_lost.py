"""Nothing that was trained is lost: kills while a run publishes, two runs on one folder, full disks."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from jobs import Killed, command, job_settings, killed, same_end, variant
from matching import save_checkpoint, squad_file, trained_model
from pruned_trainer import Target
from pruned_trainer.cli import main
from pruned_trainer.jobs import choice, output
from pruned_trainer.jobs import prune as prune_module
from pruned_trainer.jobs.output import LOCK, DiskFull, OutputFolder, explained_when_full
from pruned_trainer.jobs.prune import prune, sweep
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.training.trainer import PruningTrainer, last_checkpoint


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PruneSettings:
    base = job_settings(tmp_path_factory.mktemp("lost"), trained_model())
    return replace(base, gate_steps=4, retrain_steps=4, save_steps=2)


@pytest.fixture(scope="module")
def whole(settings: PruneSettings) -> Path:
    """The output of a run that nobody interrupts."""
    job = variant(settings, "whole")
    prune(job)
    return job.out


def all_but_published(job: PruneSettings, run: Callable[[PruneSettings], Any]) -> None:
    """Run up to the moment at which the output would get its name."""

    def dies(*_: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune_module, "publish", dies)
        with pytest.raises(Killed):
            run(job)


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Do this in a process that is killed before its operation of this number that renames or removes a file;
    whether it lived to its end."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return True
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    left = step
    try:
        for name in ("rename", "replace", "unlink", "rmdir"):
            original = getattr(os, name)

            def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            setattr(os, name, counted)
        work()
        os._exit(0)
    finally:
        os._exit(1)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["new", "replacing", "sweep"])
def test_a_kill_at_any_step_of_publishing(
    kind: str, settings: PruneSettings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every rename and removal: the command with --resume comes to the same end, with nothing left."""
    monkeypatch.setattr(prune_module, "_draw", lambda folder: (folder / "report.html").touch())
    run = sweep if kind == "sweep" else prune
    job = replace(settings, out=tmp_path / "ready" / "out", overwrite=kind == "replacing")
    (tmp_path / "ready").mkdir()
    if kind == "replacing":
        job.out.mkdir()
        (job.out / "old").touch()
    all_but_published(job, run)
    step, killed = 0, True
    while killed:
        step += 1
        folder = tmp_path / f"step-{step}"
        shutil.copytree(tmp_path / "ready", folder)
        # The copy is the run of another --out.
        record = folder / "out.partial" / "run.json"
        record.write_text(record.read_text().replace(str(job.out), str(folder / "out")))
        here = replace(job, out=folder / "out", resume=True)

        def work(here: PruneSettings = here) -> None:
            with OutputFolder(here.out, here.overwrite, resume=True) as output:
                prune_module.publish(output)

        killed = not killed_at(step, work)
        if (here.out / "run.json").exists() or (folder / "out.partial").exists():
            assert killed
            run(here)
        assert names(folder) == {"out"}
        if kind == "sweep":
            same_end(here.out / "macs-0.5", whole)
            assert names(here.out) == {"macs-0.5", "sweep.json", "report.html"}
        else:
            same_end(here.out, whole)
            assert names(here.out) == {name for name in names(whole) if not name.endswith(".png")}
    assert step > 10


def test_a_killed_publishing_is_ended_by_any_command(tmp_path: Path) -> None:
    """Also of a command that has no --resume: what was whole gets its name, what it replaced goes."""
    for step in (1, 2, 3, 4, 5):
        out = tmp_path / str(step) / "out"
        out.mkdir(parents=True)
        (out / "old").touch()

        def work(out: Path = out) -> None:
            with OutputFolder(out, overwrite=True) as folder:
                (folder.partial / "new").touch()
                folder.publish()

        lived = killed_at(step, work)
        assert lived == (step > 5)
        if step <= 2:  # nothing has been renamed
            assert names(out) == {"old"} and (out.with_name("out.partial") / "new").is_file()
            continue
        with pytest.raises(FileExistsError, match="out is not empty; --overwrite replaces it"):
            OutputFolder.check(out, overwrite=False)
        assert names(out) - {LOCK} == {"new"} and names(out.parent) == {"out"}


def test_the_lock_of_another_program_stays(tmp_path: Path) -> None:
    """An --out that is refused may be a folder of anybody's."""
    (tmp_path / ".lock").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        OutputFolder.check(tmp_path, overwrite=False)
    assert names(tmp_path) == {".lock"}


def test_what_was_replaced_comes_back_where_nothing_replaces_it(tmp_path: Path) -> None:
    (tmp_path / ".out.replaced").mkdir()
    OutputFolder.end_publishing(tmp_path / "out")
    assert names(tmp_path) == {"out"}


def test_a_published_run_is_not_resumed_with_other_settings(settings: PruneSettings) -> None:
    job = variant(settings, "published")
    all_but_published(job, prune)
    job.out.with_name("published.partial").rename(job.out)
    with pytest.raises(ValueError, match="started with other settings: targets"):
        prune(replace(job, resume=True, targets=(Target(macs=0.6),)))
    assert prune(replace(job, resume=True))["task"] == "squad"
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        prune(replace(job, resume=True))


@pytest.mark.parametrize("command", ["prune", "finetune"])
def test_a_folder_of_which_a_split_is_read_is_not_replaced(
    command: str, settings: PruneSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("{}")
    argv = [command, "--model", settings.model, "--train-file", f"{data}:train", "--out", str(data)]
    more = ["--macs", "0.5"] if command == "prune" else []
    assert main([*argv, "--overwrite", *more]) == 2
    assert "data, which is needed; give another --out" in capsys.readouterr().err
    assert (data / "train.jsonl").is_file()


def hold(out: Path, held: Any) -> None:
    """Work in the folder of this output until the process is killed."""
    with OutputFolder(out, True, resume=True):
        held.set()
        time.sleep(600)


def test_an_output_is_not_its_makers_alone(whole: Path) -> None:
    assert len({path.stat().st_mode for path in whole.iterdir()}) == 1


def test_a_second_run_on_one_folder_is_refused(
    settings: PruneSettings, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the first is gone, however it went."""
    job = variant(settings, "shared")
    killed(job, "gates", 3, monkeypatch)
    before = names(job.out.with_name("shared.partial"))
    processes = multiprocessing.get_context("fork")
    held = processes.Event()
    first = processes.Process(target=hold, args=(job.out, held))
    first.start()
    (job.out.with_name("shared.partial") / "choice.json.4-0.partial").touch()  # the first was writing it
    try:
        assert held.wait(60)
        for more in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(FileExistsError, match="shared.partial is in use: another run works in it"):
                prune(replace(job, **more))
        with pytest.raises(FileExistsError, match="in use"):
            OutputFolder(job.out, overwrite=True)
        assert names(job.out.with_name("shared.partial")) >= before
    finally:
        first.kill()
        first.join()
    prune(replace(job, resume=True))
    same_end(job.out, whole)
    assert names(job.out) == names(whole)


def test_a_checkpoint_that_lacks_a_part_is_refused(
    settings: PruneSettings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(settings, out=tmp_path / "out")
    killed(job, "gates", 3, monkeypatch)
    checkpoint = last_checkpoint(tmp_path / "out.partial" / "gates")
    assert checkpoint is not None
    parts = ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
    contents = {name: (checkpoint / name).read_bytes() for name in parts}

    def refused(*spoilt: str) -> None:
        message = f"checkpoint-2 cannot be resumed: {', '.join(spoilt)} is missing or broken"
        with pytest.raises(ValueError, match=message):
            prune(replace(job, resume=True))

    for name, content in contents.items():
        (checkpoint / name).write_bytes(content[: len(content) // 2])
    refused(*parts)
    for name in parts:
        (checkpoint / name).unlink()
    refused(*parts)
    for name in set(parts) - {"optimizer.pt"}:
        (checkpoint / name).write_bytes(contents[name])
    refused("optimizer.pt")
    shutil.rmtree(checkpoint)
    prune(replace(job, resume=True))
    same_end(job.out, whole)


@pytest.mark.parametrize("phase", ["gates", "retrain"])
def test_no_step_beyond_the_plan(
    phase: str, settings: PruneSettings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed after its last step goes on with what follows it."""
    job = replace(settings, out=tmp_path / "out")
    after = (choice, "decide_for") if phase == "gates" else (prune_module, "save_checkpoint")

    def dies(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(*after, dies)
        with pytest.raises(Killed):
            prune(job)
    checkpoint = last_checkpoint(tmp_path / "out.partial" / phase)
    assert checkpoint is not None and checkpoint.name == "checkpoint-4"
    steps: list[int] = []
    original = PruningTrainer.training_step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (self.gate_phase is not None) == (phase == "gates"):
            steps.append(self.state.global_step)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PruningTrainer, "training_step", counted)
        report = prune(replace(job, resume=True))
    assert steps == [] and report["training"][phase]
    same_end(job.out, whole)


def test_paths_are_compared_and_not_their_texts(
    settings: PruneSettings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder, by a link, with dots."""
    monkeypatch.chdir(settings.train_file.parent)
    (tmp_path / "link").symlink_to(settings.train_file.parent)
    job = replace(settings, model="model", train_file=Path("train.json"), out=Path("by-path"))
    killed(job, "gates", 3, monkeypatch)
    monkeypatch.chdir(tmp_path)
    other = replace(
        settings,
        model=f"{settings.train_file.parent}/./model",
        train_file=tmp_path / "link" / "train.json",
        out=Path("link") / "by-path",
        resume=True,
    )
    copy = tmp_path / "copy.json"
    shutil.copy(settings.train_file, copy)
    with pytest.raises(ValueError, match="started with other settings: train_file"):
        prune(replace(other, train_file=copy))
    prune(other)
    same_end(settings.train_file.parent / "by-path", whole)


def no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_for_tensors(*_: Any, **__: Any) -> Any:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def no_space_for_optimizer(*_: Any, **__: Any) -> Any:
    raise RuntimeError(
        "[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file data/0"
    )


# Where a disk becomes full, and what then fails there.
WRITES: dict[str, tuple[Any, str, Any]] = {
    "a checkpoint's optimiser": (torch, "save", no_space_for_optimizer),
    "a model": (PreTrainedModel, "save_pretrained", no_space_for_tensors),
    "the finished model": (prune_module, "save_checkpoint", no_space),
    "a report": (prune_module, "write_model_card", no_space),
    "the page": (prune_module, "_draw", no_space),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_full_disk(
    write: str, settings: PruneSettings, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says what to do, and the run then comes to the same end."""
    job = replace(settings, out=tmp_path / "out")
    arguments = command(job)[2:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*WRITES[write])
        assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "pruned-trainer prune: there is no room left to write " in error  # beside a progress bar
    assert error.endswith("MiB are free on its disk): make room, then the same command with --resume goes on")
    assert not list(tmp_path.glob("out.partial/*/saving/*"))
    assert main([*arguments, "--resume"]) == 0
    same_end(job.out, whole)
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        OSError("4096 requested and 512 written"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 556352 vs 556244"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("write(): fd 3 failed with No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
    ],
    ids=str,
)
def test_what_libraries_raise_on_a_full_disk(error: Exception, tmp_path: Path) -> None:
    """NumPy, torch, safetensors and tokenizers on a tmpfs of some kilobytes."""
    with pytest.raises(DiskFull, match="no room .*, then start again"), explained_when_full(tmp_path / "out"):
        raise ValueError("in between") from error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("you requested and cannot have"),
        ValueError("No space left on device"),
        OSError("4096 bytes requested and none there"),
        RuntimeError("a shader's iostream error"),
        RuntimeError("PytorchStreamReader failed reading file data/0: unexpected pos 3"),
    ],
    ids=str,
)
def test_what_says_something_else_is_no_full_disk(error: Exception, tmp_path: Path) -> None:
    """Nor is an error that came after a full disk was dealt with (from None)."""
    with pytest.raises(type(error), match=re.escape(str(error))), explained_when_full(tmp_path / "out"):
        try:
            no_space()
        except OSError:
            raise error from None


def test_the_disk_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the file that could not be written; where no file is named, each that the run writes to, with
    the fullest first."""
    out, cache, other = (tmp_path / name for name in ("own/out", "cache", "other/file"))
    free = {"own": 300, "cache": 4000, "other": 1, "temporary": 20}

    def disk_of(path: Path) -> Any:
        name = path.relative_to(tmp_path).parts[0]
        return SimpleNamespace(name=name, stat=lambda: SimpleNamespace(st_dev=list(free).index(name)))

    monkeypatch.setattr(output, "_existing", disk_of)
    monkeypatch.setattr(shutil, "disk_usage", lambda disk: SimpleNamespace(free=free[disk.name] * 2**20))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def named(*file: str) -> str:
        with pytest.raises(DiskFull) as raised, explained_when_full(out, cache):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *file)
        return str(raised.value).removeprefix("there is no room left to write ").partition(": make room")[0]

    temporary = f"temporary files in {tmp_path / 'temporary'} (20 MiB are free on its disk)"
    mine, kept = (f"{path} ({mib} MiB are free on its disk)" for path, mib in ((out, 300), (cache, 4000)))
    assert named(str(tmp_path / "temporary/windows/0.arrow")) == temporary
    assert named(str(cache / "logits.f32")) == kept
    assert named(str(tmp_path / "own/out.partial/model.safetensors")) == mine
    assert named(str(other)) == f"{other} (1 MiB are free on its disk)"
    assert named() == f"{temporary} or {mine} or {kept}"


def test_a_disk_that_is_full_from_the_start(settings: PruneSettings, tmp_path: Path) -> None:
    job = replace(settings, out=tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune_module, "write_json", no_space)
        with pytest.raises(DiskFull, match="then start again"):
            prune(job)
    prune(job)


def test_a_full_disk_at_the_end_of_a_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_checkpoint(trained_model(steps=1), tmp_path / "model")
    train, out = str(squad_file(tmp_path / "train.json", 40, 1)), str(tmp_path / "out")
    argv = ["finetune", "--model", str(model), "--train-file", train, "--out", out]
    argv += ["--max-length", "24", "--stride", "4", "--epochs", "0.1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", no_space_for_tensors)
        assert main(argv) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("make room, then start again")
    assert main(argv) == 0
