"""Output folders and checkpoints, written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from pruned_ops.checkpoints.loading import ENCODER_SETTINGS, TOKENIZER_FILES, file_beside
from pruned_ops.checkpoints.sentence_folder import MODULES, SETTINGS, modules_of
from pruned_ops.files import check_name, check_place, open_to_others
from pruned_ops.models.model_card import WEIGHTS
from pruned_ops.models.stock import is_encoder

# sentence-transformers' own files beside an encoder, and those of a module that follows it.
_SENTENCE_FILES = (MODULES, SETTINGS, *ENCODER_SETTINGS)
_MODULE_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")
# What a run that can be resumed keeps in its partial folder: its settings and its plan.
RUN = "run.json"
# What libraries that give no number say where they cannot write on: the system, NumPy, torch's writer, and
# tokenizers, which raises a plain Exception with Rust's words.
_FULL: tuple[tuple[Any, re.Pattern[str]], ...] = (
    ((OSError, RuntimeError, SafetensorError), re.compile("No space left on device|Disk quota exceeded")),
    (OSError, re.compile(r"^\d+ requested and \d+ written$")),
    (
        RuntimeError,
        re.compile(r"inline_container\.cc:\d+\] \. (unexpected pos \d|PytorchStreamWriter failed writing)"),
    ),
    (RuntimeError, re.compile("^basic_ios::clear: iostream error$")),
    (Exception, re.compile(rf"\(os error ({errno.ENOSPC}|{errno.EDQUOT})\)$")),
)
# What a run holds a lock on, in its partial folder: by a name that no other program gives a file of its own.
LOCK = ".pruned-trainer.lock"


def save_checkpoint(
    model: Any,
    folder: Path,
    source: str,
    tokenizer: PreTrainedTokenizerFast | None,
    is_the_sources: bool = True,
) -> None:
    """Write weights and config, and the tokenizer. A model of sentence-transformers is saved by its own
    `save`, another module as weights alone.

    source: the folder, or the name on the hub, that the model came from. is_the_sources: whether the
    tokenizer is that of `source`, whose files are then copied as they are, if it is a folder."""
    logging.disable_progress_bar()
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
    elif any(kind.__module__.startswith("sentence_transformers.") for kind in type(model).__mro__):
        model.save(str(folder))
    else:
        save_model(model, str(folder / WEIGHTS))
    logging.enable_progress_bar()
    is_copied = is_the_sources or tokenizer is None
    files = [Path(source) / name for name in TOKENIZER_FILES if is_copied and (Path(source) / name).is_file()]
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if not files and tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if is_encoder(model):
        _copy_modules(source, folder)


def _copy_modules(source: str, folder: Path) -> None:
    """Copy what sentence-transformers keeps beside an encoder, which says how its states become embeddings:
    its own files, and the small folders of the modules that follow. source: a folder or a hub name; nothing
    where it is neither, as of a model that was made from a config."""
    try:
        modules = modules_of(source)
    except OSError:
        return
    if not modules:
        return
    to_copy = [*_SENTENCE_FILES]
    for path in (str(PurePosixPath(module.path)) for module in modules):
        if path == ".":  # the encoder itself
            continue
        if (Path(source) / path).is_dir():
            shutil.copytree(Path(source) / path, folder / path, dirs_exist_ok=True)
        else:
            to_copy += [f"{path}/{name}" for name in _MODULE_FILES]
    for name in to_copy:
        file = file_beside(source, name)
        if file is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)


class DiskFull(OSError):
    """Nothing more can be written; the text says where, and what to do."""


@contextmanager
def explained_when_full(out: Path, cache: Path | None = None) -> Iterator[None]:
    """Turn whatever a library raises inside the block on a full disk into one sentence.

    It names the disk of the file that could not be written; where the library names no file, each disk that
    the run writes to: that of `out`, of temporary files, and of the teacher's `cache`, where there is one. It
    says how the run with this --out goes on. Errors: DiskFull; all others as they are."""
    try:
        yield
    except Exception as error:
        full = _full(error)
        if full is None:
            raise
        partial = OutputFolder.partial_of(out)
        if (partial / RUN).is_file() or (out / RUN).is_file():
            remedy = "the same command with --resume goes on"
        elif partial.is_dir() and _content(partial):
            remedy = "the same command with --overwrite starts again"
        else:
            remedy = "start again"
        places = {str(out): partial}
        if tempfile.tempdir is not None:  # this process has asked where temporary files go
            places[f"temporary files in {tempfile.tempdir}"] = Path(tempfile.tempdir)
        if cache is not None:
            places[str(cache)] = cache
        named = " or ".join(_room(full, places))
        raise DiskFull(f"there is no room left to write {named}: make room, then {remedy}") from error


def _full(error: BaseException | None) -> BaseException | None:
    """This error, or the one that it came from, whichever says that there was no room to write a file; None
    where none does.

    Python gives a number; other writers give a text alone."""
    while error is not None:
        numbered = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if numbered or any(isinstance(error, kind) and text.search(str(error)) for kind, text in _FULL):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _room(error: BaseException, places: Mapping[str, Path]) -> list[str]:
    """What lies on the full disk and what is free there: of the place on the disk of the file that the error
    names, or of that file; where it names none, of a place on each disk, the one with the least room first.

    places: by the names that a user knows them by."""
    by_disk: dict[int, tuple[str, Path]] = {}
    for name, path in places.items():
        folder = _existing(path)
        by_disk.setdefault(folder.stat().st_dev, (name, folder))
    file = getattr(error, "filename", None)
    if isinstance(file, (str, bytes, os.PathLike)):
        folder = _existing(Path(os.fsdecode(file)))
        disk = folder.stat().st_dev
        by_disk = {disk: by_disk.get(disk, (os.fsdecode(file), folder))}
    free = sorted((shutil.disk_usage(folder).free / 2**20, name) for name, folder in by_disk.values())
    return [f"{name} ({mib:.0f} MiB are free on its disk)" for mib, name in free]


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(candidate for candidate in (path.absolute(), *path.absolute().parents) if candidate.exists())


class OutputFolder:
    """A folder that appears under its name only when it is whole: work in `partial`, then `publish`.

    It is locked until the end of a `with` block, or of this process, also by a kill. resume: go on in the
    partial folder that is there.
    Errors: FileExistsError where the folder, or an earlier run's partial one, holds files and `overwrite` is
    False; and always where it holds one of the run's own `inputs`, or the current folder, or where another
    run works in it. PermissionError where nothing may be made beside it. FileNotFoundError where there is
    nothing to resume. ValueError for a name that is not in UTF-8.
    """

    def __init__(
        self, path: Path, overwrite: bool, inputs: Sequence[Path | str | None] = (), resume: bool = False
    ) -> None:
        self.check(path, overwrite, inputs, resume)
        self.path, self.is_published = _real(path), False
        self.partial = self.partial_of(path)
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = _take_lock(self.partial)
        # What a killed process was writing; nobody else writes here now.
        leftovers = self.partial.rglob("*.partial") if resume else _content(self.partial)
        for entry in [*leftovers]:
            _remove(entry)

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            _unlock(self.path if self.is_published else self.partial, self._lock)
            self._lock = None

    def __getstate__(self) -> dict[str, Any]:
        """What other processes get: the lock is the main process's."""
        return {**self.__dict__, "_lock": None}

    @staticmethod
    def partial_of(path: Path) -> Path:
        """The folder that a run works in until its output is whole."""
        return _beside(path, "{}.partial")

    @staticmethod
    def _replaced(path: Path) -> Path:
        """Where the folder that a new one replaces stands while that one gets its name."""
        return _beside(path, ".{}.replaced")

    @classmethod
    def check(
        cls, path: Path, overwrite: bool, inputs: Sequence[Path | str | None] = (), resume: bool = False
    ) -> None:
        """Raise as the constructor does, without making anything, after `end_publishing`."""
        check_name(path)
        partial = cls.partial_of(path)
        cls.end_publishing(path)
        if resume and not partial.is_dir():
            finished = f"; the run into {path} came to its end" if path.is_dir() else ""
            raise FileNotFoundError(f"nothing to resume: there is no {partial}{finished}")
        for place in (partial, path, *path.parents):
            if place.is_file():
                raise FileExistsError(f"{place} is a file; --out names a folder")
        check_place(partial)
        for folder in (path, partial):
            for needed in (Path.cwd(), *(Path(i).resolve() for i in inputs if i is not None and i != "")):
                if needed.exists() and needed.is_relative_to(folder.resolve()):
                    raise FileExistsError(
                        f"{folder} is or holds {needed}, which is needed; give another --out"
                    )
        if (partial / LOCK).exists():
            os.close(_take_lock(partial))
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise FileExistsError(f"{path} is not empty; --overwrite replaces it")
        if partial.is_dir() and any(_content(partial)) and not overwrite and not resume:
            resumable = "--resume goes on with it, " if (partial / RUN).is_file() else ""
            raise FileExistsError(
                f"{partial} is not empty: an earlier run was interrupted; {resumable}--overwrite replaces it"
            )

    @classmethod
    def end_publishing(cls, path: Path) -> None:
        """End what a process that was killed while it published has left undone.

        Where the folder that was to be replaced stands aside, the partial one was whole.
        """
        path = _real(path)
        partial, replaced = cls.partial_of(path), cls._replaced(path)
        _remove_left_lock(path)
        if not os.path.lexists(replaced):
            return
        if not os.path.lexists(path) and partial.is_dir():
            lock = _take_lock(partial)
            partial.rename(path)
            _unlock(path, lock)
        elif not os.path.lexists(path):
            replaced.rename(path)
            return
        _remove(replaced)

    def publish(self) -> None:
        """Give the finished folder its name. What stood there before goes only after that."""
        open_to_others(self.partial)
        replaced = self._replaced(self.path)
        if self.path.exists():
            self.path.rename(replaced)
        self.partial.rename(self.path)
        self.is_published = True
        if os.path.lexists(replaced):
            _remove(replaced)


def _real(path: Path) -> Path:
    """The path itself, or what it leads to where it is a symlink: the folder there is made and replaced."""
    return path.resolve() if path.is_symlink() else path


def _beside(path: Path, name: str) -> Path:
    """The folder beside this one that is called so, after it. ValueError for the root of all folders."""
    named = _real(path) if path.name not in ("", "..") else path.resolve()
    if not named.name:
        raise ValueError(f"{path} cannot be replaced; give another --out")
    return named.with_name(name.format(named.name))


def _remove_left_lock(path: Path) -> None:
    """Remove the lock of a process that was killed just after its output had got its name, unless the output
    has to be finished under it."""
    if (path / LOCK).is_file() and not (path / RUN).exists():
        try:
            _unlock(path, _take_lock(path))
        except OSError:  # it is held, or what is published may not be written to
            pass


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a published folder inside the block; FileExistsError where another run has it."""
    descriptor = _take_lock(folder)
    try:
        yield
    finally:
        _unlock(folder, descriptor)


def _content(folder: Path) -> list[Path]:
    """What is in a partial folder, but for the lock."""
    return [entry for entry in folder.iterdir() if entry.name != LOCK]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _take_lock(folder: Path) -> int:
    """Lock a partial folder; the descriptor, whose closing ends the lock, as does the end of the process.

    Errors: FileExistsError where another run has it.
    """
    file = folder / LOCK
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = file.exists() and os.path.samestat(os.fstat(descriptor), file.stat())
    except BlockingIOError:
        is_there = False
    if not is_there:  # held, or published between our opening and our locking
        os.close(descriptor)
        raise FileExistsError(
            f"{folder} is in use: another run works in it; wait for its end, or give another --out"
        )
    return descriptor


def _unlock(folder: Path, descriptor: int) -> None:
    """Remove the file of the lock, and end the lock."""
    (folder / LOCK).unlink(missing_ok=True)
    os.close(descriptor)
