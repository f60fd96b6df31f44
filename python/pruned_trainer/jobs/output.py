"""Output folders and checkpoints, written whole or not at all; `load_model` and `load_tokenizer` are the
runtime's."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from pruned_ops.checkpoints.loading import TOKENIZER_FILES
from pruned_ops.checkpoints.loading import load_model as load_model
from pruned_ops.checkpoints.loading import load_tokenizer as load_tokenizer


def save_checkpoint(
    model: PreTrainedModel, folder: Path, source: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Write weights and config, and the tokenizer files of `source` as they are (saved anew where `source` is
    no folder)."""
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    logging.enable_progress_bar()
    files = [Path(source) / name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if not files:
        tokenizer.save_pretrained(folder)


class OutputFolder:
    """A folder that appears under its name only when it is whole: work in `partial`, then `publish`.

    resume: go on in the partial folder that is there.
    Errors: FileExistsError where the folder, or an earlier run's partial one, holds files and `overwrite` is
    False; and always where it holds one of the run's own `inputs`, or the current folder. FileNotFoundError
    where there is nothing to resume.
    """

    def __init__(
        self, path: Path, overwrite: bool, inputs: Sequence[Path | str | None] = (), resume: bool = False
    ) -> None:
        self.check(path, overwrite, inputs, resume)
        self.path = path
        self.partial = self.partial_of(path)
        if self.partial.exists() and not resume:
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True, exist_ok=resume)

    @staticmethod
    def partial_of(path: Path) -> Path:
        """The folder that a run works in until its output is whole."""
        return path.with_name(path.name + ".partial")

    @classmethod
    def check(
        cls, path: Path, overwrite: bool, inputs: Sequence[Path | str | None] = (), resume: bool = False
    ) -> None:
        """Raise as the constructor does, without making anything."""
        if resume and not cls.partial_of(path).is_dir():
            raise FileNotFoundError(f"nothing to resume: there is no {cls.partial_of(path)}")
        for folder in (path, cls.partial_of(path)):
            for needed in (Path.cwd(), *(Path(i).resolve() for i in inputs if i is not None and i != "")):
                if needed.exists() and needed.is_relative_to(folder.resolve()):
                    raise FileExistsError(
                        f"{folder} is or holds {needed}, which is needed; give another --out"
                    )
            if folder.is_file():
                raise FileExistsError(f"{folder} is a file; --out names a folder")
            if folder.is_dir() and any(folder.iterdir()) and not overwrite:
                if folder == path:
                    raise FileExistsError(f"{folder} is not empty; --overwrite replaces it")
                if not resume:
                    raise FileExistsError(
                        f"{folder} is not empty: an earlier run was interrupted; --resume goes on with it, "
                        "--overwrite replaces it"
                    )

    def publish(self) -> None:
        """Give the finished folder its name. What stood there before goes only after that."""
        aside = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        if self.path.exists():
            self.path.rename(aside / "replaced")
        self.partial.rename(self.path)
        shutil.rmtree(aside)
