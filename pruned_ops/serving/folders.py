"""What the folder of a model holds, told by its own files before any library reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pruned_ops.checkpoints.loading import ENCODER_SETTINGS, check_source, explained, read_config
from pruned_ops.checkpoints.sentence_folder import (
    SETTINGS,
    Module,
    modules_of,
    object_in,
    pooling_config,
    pooling_modes,
)
from pruned_ops.files import shown
from pruned_ops.models.inputs import POOLINGS
from pruned_ops.runtime.texts import library_class

Kind = Literal["embedder", "sparse embedder", "reranker", "classifier", "question answering"]

_MEAN = "an encoder without a pooling of its own: an embedding is the mean of its tokens"
_DEFAULT = "the prompt {!r} is put before texts unless a request names another"
_NO_PROMPTS = "its prompts are not served, because its pooling leaves their tokens out"


@dataclass(frozen=True)
class Contents:
    """What is in a folder.

    library: the class of sentence-transformers that has to load it, "" where none has to. pooling: of an
    embedder that is computed without that library. max_tokens: what its publisher set, if anything. prompts:
    texts to be put before others, by name. default_prompt: the name of the one for requests that name none.
    dimension: how many numbers of an embedding its publisher keeps, if not all. notes: what a user should
    know.
    """

    kind: Kind
    library: str = ""
    pooling: str = ""
    max_tokens: int | None = None
    lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    dimension: int | None = None
    notes: tuple[str, ...] = ()


def folder_of(source: str) -> Path:
    """The folder of a model; one of a hub name is downloaded, without other frameworks' weights. Errors:
    OSError where there is none."""
    if Path(source).is_dir():
        return Path(source)
    check_source(source)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    with explained(source, source):
        return Path(
            snapshot_download(source, allow_patterns=[*patterns, *(f"*/{pattern}" for pattern in patterns)])
        )


def contents_of(folder: Path) -> Contents:
    """What a folder holds. Errors: OSError where files are missing; ValueError for what cannot be served."""
    config = read_config(folder)
    architecture = str((config.get("architectures") or ["a model without a class"])[0])
    modules = modules_of(str(folder))
    if modules:
        contents = _of_library(folder, modules, architecture)
        if contents is not None:
            return contents
    if architecture.endswith("ForSequenceClassification"):
        return Contents("reranker" if _labels(config) == 1 else "classifier")
    if architecture.endswith(("ForQuestionAnswering", "ForNaturalQuestions")):
        return Contents("question answering")
    if architecture.endswith("Model"):
        return Contents("embedder", pooling="mean", notes=(_MEAN,))
    raise ValueError(
        f"{folder} holds {shown(architecture)}, which does nothing that is served: embeddings, reranking, "
        "classification and question answering are"
    )


def _labels(config: dict[str, Any]) -> int:
    """The number of labels of a classifier, which its config tells as names or as a number; 2 by default."""
    names = config.get("id2label")
    return len(names) if isinstance(names, dict) else int(config.get("num_labels", 2))


def _of_library(folder: Path, modules: list[Module], architecture: str) -> Contents | None:
    """What sentence-transformers saved there; None for a CrossEncoder, which is a classifier with its
    tokenizer."""
    saved = (folder / name for name in ENCODER_SETTINGS if (folder / name).is_file())
    encoder = object_in(next(saved, folder / ENCODER_SETTINGS[0]))
    if {"common", "text"} & set(encoder.get("processing_kwargs") or ()):
        raise ValueError(f"{folder}: its processing_kwargs, by which texts are tokenised, are not served")
    path = folder / SETTINGS
    settings = object_in(path)
    saved_as = library_class(settings, path)
    if saved_as == "CrossEncoder" or any("cross_encoder" in module.type for module in modules):
        if settings.get("default_prompt_name") is not None:
            raise ValueError(f"{folder} is a CrossEncoder with a default prompt, which is not served")
        if not architecture.endswith("ForSequenceClassification"):
            raise ValueError(f"{folder} is a CrossEncoder of {shown(architecture)}, which gives no scores")
        return None
    prompts, default = _prompts(folder, settings)
    notes = () if default is None else (_DEFAULT.format(default),)
    if saved_as == "SparseEncoder" or any("sparse_encoder" in module.type for module in modules):
        return Contents(
            "sparse embedder", "SparseEncoder", "splade", prompts=prompts, default_prompt=default, notes=notes
        )
    config = pooling_config(str(folder))
    if prompts and config.get("include_prompt", True) is not True:
        if default is not None:
            raise ValueError(f"{folder}: its default prompt {default!r} cannot be served: {_NO_PROMPTS}")
        prompts, notes = {}, (_NO_PROMPTS,)
    longest, dimension = encoder.get("max_seq_length"), settings.get("truncate_dim")
    computed_here = _pooling(modules, config)
    return Contents(
        "embedder",
        library="" if computed_here else "SentenceTransformer",
        pooling=computed_here,
        max_tokens=longest if isinstance(longest, int) else None,
        lower_case=bool(encoder.get("do_lower_case")),
        prompts=prompts,
        default_prompt=default,
        dimension=dimension if isinstance(dimension, int) and dimension > 0 else None,
        notes=notes,
    )


def _prompts(folder: Path, settings: dict[str, Any]) -> tuple[dict[str, str], str | None]:
    """The prompts by name, and the name of the one that sentence-transformers uses where none is named."""
    saved, default = settings.get("prompts"), settings.get("default_prompt_name")
    saved = saved if isinstance(saved, dict) else {}
    prompts = {str(name): text for name, text in saved.items() if isinstance(text, str)}
    if default is not None and default not in prompts:
        known = ", ".join(prompts) or "none"
        raise ValueError(f"{folder} has no prompt {shown(default)}, which is its default; it has {known}")
    return prompts, default


def _pooling(modules: list[Module], config: dict[str, Any]) -> str:
    """The pooling of a model that is an encoder, a pooling that is computed here (of this config) and, it may
    be, a normalisation; "" for any other, which is left to sentence-transformers."""
    names = [module.name for module in modules]
    if names[:2] != ["Transformer", "Pooling"] or names[2:] not in ([], ["Normalize"]):
        return ""
    if modules[0].path:  # its files lie elsewhere
        return ""
    modes = pooling_modes(config)
    return modes[0] if len(modes) == 1 and modes[0] in POOLINGS else ""
