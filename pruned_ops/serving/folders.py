"""What the folder of a model holds, told by its own files before any library reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pruned_ops.checkpoints.loading import check_source, explained, read_config
from pruned_ops.files import read_json, shown

Kind = Literal["embedder", "sparse embedder", "reranker", "classifier", "question answering"]

_MEAN = "an encoder without a pooling of its own: an embedding is the mean of its tokens"
# The poolings that are computed here. Whatever else a folder asks for is left to sentence-transformers.
_POOLINGS = {"mean": "mean", "cls": "cls"}
_OLD_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True)
class Contents:
    """What is in a folder.

    library: the class of sentence-transformers that has to load it, "" where none has to. pooling: of an
    embedder that is computed without that library. max_tokens: what its publisher set, if anything. prompts:
    texts to be put before others, by name. notes: what a user should know.
    """

    kind: Kind
    library: str = ""
    pooling: str = ""
    max_tokens: int | None = None
    lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
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
            snapshot_download(source, allow_patterns=[*patterns, *(f"*/{each}" for each in patterns)])
        )


def contents_of(folder: Path) -> Contents:
    """What a folder holds. Errors: OSError where files are missing; ValueError for what cannot be served."""
    config = read_config(folder)
    if (folder / "modules.json").is_file():
        contents = _of_library(folder)
        if contents is not None:
            return contents
    architecture = str((config.get("architectures") or ["a model without a class"])[0])
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


def _of_library(folder: Path) -> Contents | None:
    """What sentence-transformers saved there; None for a CrossEncoder, which is a classifier with its
    tokenizer."""
    listed = read_json(folder / "modules.json")
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise ValueError(f"{folder / 'modules.json'} has to hold a list of modules")
    settings = _settings(folder / "config_sentence_transformers.json")
    kinds = [str(module.get("type", "")) for module in listed]
    if settings.get("model_type") == "CrossEncoder" or any("cross_encoder" in kind for kind in kinds):
        return None
    prompts = settings.get("prompts")
    prompts = prompts if isinstance(prompts, dict) else {}
    named = {str(name): text for name, text in prompts.items() if isinstance(text, str)}
    if settings.get("model_type") == "SparseEncoder" or any("sparse_encoder" in kind for kind in kinds):
        return Contents("sparse embedder", library="SparseEncoder", pooling="splade", prompts=named)
    pooling = _pooling(folder, listed)
    if pooling is None:
        return Contents("embedder", library="SentenceTransformer", prompts=named)
    encoder = _settings(folder / "sentence_bert_config.json")
    longest = encoder.get("max_seq_length")
    return Contents(
        "embedder",
        pooling=pooling,
        max_tokens=longest if isinstance(longest, int) else None,
        lower_case=bool(encoder.get("do_lower_case")),
        prompts=named,
    )


def _pooling(folder: Path, listed: list[dict[str, Any]]) -> str | None:
    """The pooling of a model that is an encoder, a pooling that is computed here and, it may be, a
    normalisation; None for any other."""
    names = [str(module.get("type", "")).rpartition(".")[2] for module in listed]
    if names[:2] != ["Transformer", "Pooling"] or names[2:] not in ([], ["Normalize"]):
        return None
    if listed[0].get("path"):  # its files lie elsewhere
        return None
    config = _settings(folder / str(listed[1].get("path", "")) / "config.json")
    if config.get("include_prompt", True) is not True:
        return None
    mode = config.get("pooling_mode")
    modes = [mode] if mode is not None else [
        _OLD_POOLINGS.get(name) for name, is_on in config.items()
        if name.startswith("pooling_mode_") and is_on
    ]  # fmt: skip
    return _POOLINGS.get(modes[0]) if len(modes) == 1 and isinstance(modes[0], str) else None


def _settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file or another value."""
    value = read_json(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}
