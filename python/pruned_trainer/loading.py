"""Models and tokenizers in, checkpoints out: refused by name where they cannot be pruned, written whole or
not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

import pruned_ops
from pruned_ops.importing import TOKENIZER_FILES
from pruned_ops.natural_questions import is_natural_questions, natural_questions_classes

MODEL_TYPES = (
    "bert",
    "roberta",
    *(c.model_type for c in (pruned_ops.PrunedBertConfig, pruned_ops.PrunedRobertaConfig)),
)


def load_model(name_or_path: str) -> PreTrainedModel:
    """A BERT or RoBERTa question-answering model, stock or pruned, in evaluation mode; one with answer types
    where Natural Questions is what it was saved for.

    Errors: OSError where there is none; ValueError for another model, for tensors that are not what the
    config describes, and for whatever else keeps it from loading.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        if config.model_type not in MODEL_TYPES:
            raise ValueError(
                f"it is a {config.model_type!r} model; only {', '.join(MODEL_TYPES)} can be pruned"
            )
        # Auto classes know no Natural Questions models: the config names the class that was saved.
        model_class: Any = AutoModelForQuestionAnswering
        if is_natural_questions(config):
            model_class = natural_questions_classes(config.model_type)[1]
        model, info = model_class.from_pretrained(name_or_path, output_loading_info=True)
        missing = sorted(info["missing_keys"])
        unexpected = sorted(
            k for k in info["unexpected_keys"] if "pooler." not in k and "position_ids" not in k
        )
        if missing:
            raise ValueError(
                f"it is no fine-tuned question-answering checkpoint: it lacks {', '.join(missing[:4])}"
            )
        if unexpected:
            raise ValueError(
                f"it holds tensors that its config does not describe: {', '.join(unexpected[:4])}"
            )
    except OSError:
        raise
    except Exception as error:  # each library on the way raises its own kind for a broken file or config
        raise ValueError(f"{name_or_path} cannot be loaded: {error}") from error
    return model.float().eval()


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer beside a model; ValueError where it has none (answers need character offsets)."""
    tokenizer: Any = AutoTokenizer.from_pretrained(name_or_path)
    if not tokenizer.is_fast:
        raise ValueError(f"{name_or_path} has no fast tokenizer, and answers need its character offsets")
    return tokenizer


def save_checkpoint(
    model: PreTrainedModel, folder: Path, source: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Weights and config, and the tokenizer files of `source` as they are (saved anew where `source` is no
    folder)."""
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

    Errors: FileExistsError where the folder, or an earlier run's partial one, holds files and `overwrite` is
    False; and always where it holds one of the run's own `inputs`, or the current folder. resume: go on in
    the partial folder that is there; FileNotFoundError where there is none.
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
