"""Models and tokenizers in: question-answering checkpoints, refused by name where they are something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from pruned_ops.models.configuration import PRUNED_CONFIGS
from pruned_ops.models.heads import is_natural_questions, natural_questions_class

# What a tokenizer may consist of; a checkpoint without one of these files simply has none to copy.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


# Any one of them makes a tokenizer.
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")


def load_model(name_or_path: str) -> PreTrainedModel:
    """A BERT or RoBERTa question-answering model, stock or pruned, in evaluation mode; one with answer types
    where Natural Questions is what it was saved for.

    Errors: OSError where there is none; ValueError for another model, for tensors that are not what the
    config describes, and for whatever else keeps it from loading.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        if config.model_type not in PRUNED_CONFIGS:
            raise ValueError(
                f"it is a {config.model_type!r} model; only {', '.join(PRUNED_CONFIGS)} are supported"
            )
        # Auto classes know no Natural Questions models: the config names the class that was saved.
        model_class: Any = AutoModelForQuestionAnswering
        if is_natural_questions(config):
            model_class = natural_questions_class(config.model_type)
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
    """The fast tokenizer beside a model; OSError or ValueError where it has none (answers need character
    offsets)."""
    folder = Path(name_or_path)
    if folder.is_dir() and not any((folder / name).is_file() for name in VOCABULARY_FILES):
        # Without any of them an empty tokenizer would be made.
        raise FileNotFoundError(f"{folder} holds no tokenizer: {' or '.join(VOCABULARY_FILES)} is needed")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name_or_path)
    except OSError:
        raise
    except Exception as error:  # as above
        raise ValueError(f"the tokenizer of {name_or_path} cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{name_or_path} has no fast tokenizer, and answers need its character offsets")
    return tokenizer


def load_folder(folder: Path, device: torch.device | str) -> PreTrainedModel:
    """The model in a checkpoint's folder, in fp32, on this device; from here on transformers only shows
    errors.

    Errors: as `load_model`'s and `checked_device`'s; OSError where the folder is none.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; a checkpoint's folder is needed")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place = checked_device(device)
    return load_model(str(folder)).to(place)  # type: ignore[arg-type]


def checked_device(device: torch.device | str) -> torch.device:
    """ValueError, with torch's reason, for a device that cannot be used here."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch's own, for no such kind and for none here
        raise ValueError(f"device {device!s} cannot be used here: {str(error).splitlines()[0]}") from error
