"""Models, configs and tokenizers out of checkpoints, refused by name where they are something else."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file, logging

from pruned_ops.files import read_json, shown
from pruned_ops.models.configuration import PRUNED_CONFIGS, check_labels
from pruned_ops.models.encoder import NewHeadWarning
from pruned_ops.models.families.known import family_of
from pruned_ops.models.natural_questions import is_natural_questions, natural_questions_class

# The end of the name of a class -> what loads a model with that head. A bare encoder's name ends in Model.
AUTO_CLASSES: dict[str, Any] = {
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "Model": AutoModel,
}
# Embedders are often saved without a head under the name of the language model that they were made of, as
# all-mpnet-base-v2 and all-distilroberta-v1 are.
LANGUAGE_MODELS = ("ForMaskedLM", "ForPreTraining")
# The files that a tokenizer may consist of. A checkpoint rarely has them all.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spm.model",
)
# A tokenizer can be made of any one of these.
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
# The file in which sentence-transformers keeps its encoder's settings, how long texts may be for example: it
# reads the first of these that is there. It wrote the others in its first years.
ENCODER_SETTINGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# The square of a larger number is beyond fp32, and so is what a model computes of it.
MAX_WEIGHT = 1e18
# The dtypes that a GPU computes a whole model in.
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# NAME or OWNER/NAME. Whatever else is no folder is a mistyped path.
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
# The name of a tensor of one of an encoder's layers, in whatever family.
_OF_A_LAYER = re.compile(r"(^|\.)layers?\.\d+\.")


def checkpoint_folder(path: Path) -> Path:
    """The folder itself; FileNotFoundError where it holds no config.json."""
    if not (path / "config.json").is_file():
        reason = "" if path.is_dir() else ": it is a file" if path.exists() else ": there is no such folder"
        raise FileNotFoundError(f"{path} holds no config.json{reason}; the folder of a checkpoint is needed")
    return path


def load_config(folder: Path) -> PretrainedConfig:
    """The config in a checkpoint's folder. Errors: `checkpoint_folder`'s; ValueError for a broken config."""
    checkpoint_folder(folder)
    try:
        read_config(folder)
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each library on the way raises its own kind for a broken file
        raise ValueError(f"the config in {folder} cannot be loaded: {first_line(error)}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The object in a checkpoint's config.json, before any library reads it. Errors: `read_json`'s;
    ValueError for anything else than an object, and for more labels than a head can have."""
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; a JSON object is needed")
    try:
        check_labels(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def shard_names(index: Path) -> list[str]:
    """The names of the files that an index of shards lists, which lie beside it; ValueError for an index of
    another form, or that leads out of its folder."""
    listed = read_json(index)
    names = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} has no weight_map of tensors to files")
    shards = sorted(set(names.values()))
    outside = [
        name for name in shards if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name
    ]
    if outside:
        raise ValueError(f"{index} leads out of its folder: {shown(outside[0])}")
    return shards


def check_weights(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """ValueError that names the first tensor with a number that is not finite or beyond MAX_WEIGHT."""
    for name, tensor in tensors:
        if not tensor.numel() or not tensor.is_floating_point():
            continue
        low, high = (float(bound) for bound in torch.aminmax(tensor.detach()))
        if not -MAX_WEIGHT <= low <= high <= MAX_WEIGHT:
            raise ValueError(
                f"{name} holds numbers from {low:g} to {high:g}: weights are finite, and at most "
                f"{MAX_WEIGHT:g}"
            )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def load_model(name_or_path: str, takes_int8: bool = False) -> PreTrainedModel:
    """The question-answering model, stock or pruned, of a folder or a hub name, in evaluation
    mode; with answer types where it was saved for Natural Questions.

    takes_int8: int8 weights are for running alone, and are refused unless the caller does only that.
    Errors: OSError where there is none; ValueError for another model, for tensors that are not what the
    config describes, and for whatever else keeps it from loading.
    """
    check_source(name_or_path)
    with explained(name_or_path, name_or_path), warnings.catch_warnings():
        warnings.simplefilter("ignore", NewHeadWarning)  # refused below
        config = supported_config(name_or_path)
        if not takes_int8:
            _check_not_quantised(config)
        # Auto classes know no Natural Questions models: the config names the class that was saved.
        model_class: Any = AutoModelForQuestionAnswering
        if is_natural_questions(config):
            model_class = natural_questions_class(config.model_type)
        model, info = model_class.from_pretrained(
            name_or_path, output_loading_info=True, trust_remote_code=False, ignore_mismatched_sizes=True
        )
        _check_shapes(info)
        _check_tensors(info["missing_keys"], info["unexpected_keys"])
        # A classifier of ModernBERT has tensors of the same names: only the config tells what they are for.
        saved = next(iter(config.architectures or ()), "")
        if saved.endswith(("ForSequenceClassification", "ForTokenClassification")):
            raise ValueError(f"it is a {shown(saved)}, and no fine-tuned question-answering checkpoint")
        check_weights(model.named_parameters())
    return _in_fp32(model).eval()


def head_of(config: PretrainedConfig) -> str:
    """The key of AUTO_CLASSES for the model that was saved with this config, "ForNaturalQuestions" for one of
    those; "Model" for a language model, of which the encoder is taken. Errors: ValueError where it names no
    class, or one whose head is not known."""
    name = next(iter(config.architectures or ()), "")
    for ending in (*AUTO_CLASSES, "ForNaturalQuestions"):
        if name.endswith(ending):
            return ending
    if name.endswith(LANGUAGE_MODELS):
        return "Model"
    heads = ", ".join(ending.removeprefix("For") for ending in AUTO_CLASSES)
    raise ValueError(f"its config says that it is {shown(name) if name else 'no class'}; known are {heads}")


def load_any_head(
    name_or_path: str, takes_int8: bool = False, encoder_alone: bool = False
) -> PreTrainedModel:
    """The model, stock or pruned, of a folder or a hub name, with the head that it was saved with,
    in evaluation mode. An encoder without a head has a pooler where the checkpoint has one.

    encoder_alone: leave out whatever head or pooler there is. takes_int8, errors: as `load_model`'s, and
    ValueError for a head that is not known."""
    check_source(name_or_path)
    with explained(name_or_path, name_or_path), warnings.catch_warnings():
        warnings.simplefilter("ignore", NewHeadWarning)  # refused below
        config = supported_config(name_or_path)
        if not takes_int8:
            _check_not_quantised(config)
        head = "Model" if encoder_alone else head_of(config)
        model_class = AUTO_CLASSES.get(head) or natural_questions_class(config.model_type)
        settings: Any = dict(output_loading_info=True, trust_remote_code=False, ignore_mismatched_sizes=True)
        # Embedders may be saved without the pooler, which they do not use: then none is made up.
        pooler = {"add_pooling_layer": False} if head == "Model" and family_of(config).has_pooler else {}
        model, info = model_class.from_pretrained(name_or_path, **settings, **pooler)
        unexpected = info["unexpected_keys"]
        if encoder_alone:
            unexpected = [name for name in unexpected if _OF_A_LAYER.search(name)]
        elif pooler and any("pooler." in name for name in unexpected):
            model, info = model_class.from_pretrained(name_or_path, **settings, add_pooling_layer=True)
        _check_shapes(info)
        if not encoder_alone:
            _refuse_language_head(config, unexpected)
        _check_tensors(info["missing_keys"], unexpected, "checkpoint of its class")
        check_weights(model.named_parameters())
    return _in_fp32(model).eval()


def _in_fp32(model: Any) -> Any:
    """The model with fp32 weights; one of int8 weights, whose others are fp32 already, as it is: transformers
    refuses `float` there."""
    return model if getattr(model, "is_quantized", False) else model.float()


def load_to_fine_tune(
    name_or_path: str, head: str = "ForQuestionAnswering", **of_the_config: Any
) -> PreTrainedModel:
    """The model, stock or pruned, of a folder or a hub name, with this head (a key of AUTO_CLASSES): a new
    one where the checkpoint has none or one for other labels.

    of_the_config: fields of the config that are set, such as num_labels; 2 labels for question answering.
    The weights are fp32, whatever they are stored in. Errors: as `load_model`'s.
    """
    check_source(name_or_path)
    if head == "ForQuestionAnswering":
        of_the_config = {"num_labels": 2, **of_the_config}
    with explained(name_or_path, name_or_path):
        config = supported_config(name_or_path)
        _check_not_quantised(config)
        # A head for other labels has tensors of other shapes; an encoder's shapes are its own config's.
        others = {"ignore_mismatched_sizes": True} if of_the_config.get("num_labels") else {}
        model, info = AUTO_CLASSES[head].from_pretrained(
            name_or_path, output_loading_info=True, trust_remote_code=False, **of_the_config, **others
        )
        # A bare encoder's tensors have no prefix. A pooler is a head's, or is not read.
        encoder = "" if model.base_model is model else f"{model.base_model_prefix}."
        faults = [str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]]
        faults += sorted(f"{name} is missing" for name in info["missing_keys"] if "pooler." not in name)
        faults = [fault for fault in faults if fault.startswith(encoder)]
        # A head that is not taken is no fault. A layer that is not would silently make another model.
        surplus = sorted(name for name in info["unexpected_keys"] if _OF_A_LAYER.search(name))
        faults += [f"it has no place for {name}" for name in surplus]
        if faults:
            raise ValueError(
                f"the tensors of its {config.model_type} encoder are not what its config says: {faults[0]}"
            )
        check_weights(model.named_parameters())
    return _in_fp32(model)  # halves would lose most of each step


def file_beside(name_or_path: str, file: str) -> Path | None:
    """A file of the model of a folder or a hub name, by its path there; None where it has no such file."""
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / file
        return path if path.is_file() else None
    unless = ("missing_entries", "connection_errors")  # without a connection what is cached is all there is
    silent = {f"_raise_exceptions_for_{reason}": False for reason in unless}
    cached = cached_file(name_or_path, file, **silent)
    return None if cached is None else Path(cached)


def supported_config(name_or_path: str) -> PretrainedConfig:
    """The config of a model that can be pruned. What the small files in a folder show is refused before any
    library reads them."""
    folder = Path(name_or_path)
    if folder.is_dir():
        _check_type(read_config(folder).get("model_type"))
        for index in folder.glob("*.index.json"):
            shard_names(index)
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    _check_type(config.model_type)
    return config


def is_quantised(folder: Path) -> bool:
    """Whether the config in a checkpoint's folder says that its weights are quantised. Errors:
    `checkpoint_folder`'s and `read_config`'s."""
    return bool(read_config(checkpoint_folder(folder)).get("quantization_config"))


def _check_not_quantised(config: Any) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("its weights are quantised, and can only be run: give the fp32 checkpoint")


def _check_type(model_type: object) -> None:
    if not isinstance(model_type, str) or model_type not in PRUNED_CONFIGS:
        raise ValueError(f"it is a {shown(model_type)} model; only {', '.join(PRUNED_CONFIGS)} are supported")


def _check_shapes(info: Any) -> None:
    """ValueError for tensors that have other shapes in the checkpoint than its config says; transformers' own
    error names none of them."""
    names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    if names:
        raise ValueError(f"its tensors have other shapes than its config says: {', '.join(names[:4])}")


def _check_tensors(
    missing: Iterable[str],
    unexpected: Iterable[str],
    what: str = "fine-tuned question-answering checkpoint",
) -> None:
    """ValueError where the tensors in a checkpoint are not those of the model. what: the checkpoint that is
    needed."""
    lacking = sorted(missing)
    if lacking:
        raise ValueError(f"it is no {what}: it lacks {', '.join(lacking[:4])}")
    extra = _not_described(unexpected)
    if extra:
        raise ValueError(f"it holds tensors that its config does not describe: {', '.join(extra[:4])}")


def _not_described(unexpected: Iterable[str]) -> list[str]:
    """The tensors of a checkpoint that its model does not have, but for those that old versions wrote."""
    return sorted(name for name in unexpected if "pooler." not in name and "position_ids" not in name)


def _refuse_language_head(config: Any, unexpected: Iterable[str]) -> None:
    """ValueError for a language model that has its head: only its encoder is run here, and would silently be
    another model."""
    name = next(iter(config.architectures or ()), "")
    head = _not_described(unexpected)
    if name.endswith(LANGUAGE_MODELS) and head:
        raise ValueError(
            f"it is a {shown(name)} with its head ({head[0]}), which does not run here: AutoModel loads and "
            "saves its encoder alone"
        )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer beside a model, of a folder or a hub name; OSError or ValueError where there is none
    (answers need its character offsets). Beside a model with one type of tokens it gives no types: BERT's
    tokenizer is found beside a RoBERTa."""
    folder = Path(name_or_path)
    if folder.is_dir() and not any((folder / name).is_file() for name in VOCABULARY_FILES):
        # Without any of them an empty tokenizer would be made.
        pieces = sorted(path.name for path in folder.iterdir() if path.suffix in (".model", ".spm"))
        if pieces:
            raise FileNotFoundError(
                f"{folder} holds {pieces[0]} without tokenizer.json, which is read here: write the fast "
                "tokenizer beside it first (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
        raise FileNotFoundError(f"{folder} holds no tokenizer: {' or '.join(VOCABULARY_FILES)} is needed")
    with explained(f"the tokenizer of {name_or_path}", name_or_path):
        tokenizer: Any = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ValueError(f"{name_or_path} has no fast tokenizer, and answers need its character offsets")
    if "token_type_ids" in tokenizer.model_input_names and _has_one_type(name_or_path):
        tokenizer.model_input_names = [n for n in tokenizer.model_input_names if n != "token_type_ids"]
    return tokenizer


def _has_one_type(name_or_path: str) -> bool:
    """Whether there is a config of a known model that has one type of tokens."""
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        types: Any = family_of(config).value(config, "type_vocab_size")
    except Exception:  # whoever loads the model says what is wrong with its config
        return False
    return types == 1


def check_source(name_or_path: str) -> None:
    """OSError where `name_or_path` is neither the folder of a checkpoint nor a name that the hub may know. It
    loads nothing, so that it can be asked before other work."""
    if Path(name_or_path).is_dir():
        checkpoint_folder(Path(name_or_path))
    _check_place(name_or_path)


def _check_place(name_or_path: str) -> None:
    """OSError for what is neither a folder nor a hub name. A path into a folder that is there is no hub name,
    whatever it looks like."""
    path = Path(name_or_path)
    may_be_of_the_hub = _HUB_NAME.fullmatch(name_or_path) is not None and not (
        path.parent.name and path.parent.is_dir()
    )
    if not path.is_dir() and (path.exists() or not may_be_of_the_hub):
        raise FileNotFoundError(f"there is no folder {name_or_path}; the folder of a checkpoint is needed")


@contextmanager
def explained(what: str, name_or_path: str) -> Iterator[None]:
    """Load from a folder or a hub name inside the block. Each library on the way raises errors of its own
    kind, which become ValueErrors that name `what`. Errors: `_check_place`'s, before the hub is asked."""
    _check_place(name_or_path)
    try:
        yield
    except OSError as error:
        if Path(name_or_path).is_dir():
            raise
        raise FileNotFoundError(
            f"there is no folder {name_or_path}, and the hub gave no such model: {first_line(error)}"
        ) from error
    except Exception as error:
        raise ValueError(f"{what} cannot be loaded: {first_line(error)}") from error


def load_folder(folder: Path, device: torch.device | str | None, takes_int8: bool = False) -> PreTrainedModel:
    """The model in a checkpoint's folder, in fp32, on this device (default: `default_device`).

    takes_int8: as for `load_any_head`. From here on transformers prints nothing but errors. Errors:
    `checkpoint_folder`'s, `checked_device`'s and `load_any_head`'s.
    """
    checkpoint_folder(folder)
    only_errors()
    asked = None if device is None else checked_device(device)
    model = load_any_head(str(folder), takes_int8)
    return model.to(default_device(model) if asked is None else asked)  # type: ignore[arg-type]


def only_errors() -> None:
    """Let transformers print nothing but errors from here on: no progress bars, no warnings."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def default_device(model: Any = None) -> str:
    """Where a model runs unless something else is asked for: on the GPU where there is one, and on the CPU
    where its weights are quantised."""
    is_quantised = getattr(model, "is_quantized", False)
    return "cuda" if torch.cuda.is_available() and not is_quantised else "cpu"


def cast_and_dtype(dtype: str | None, place: torch.device) -> tuple[torch.dtype | None, str | None]:
    """How a model runs in this dtype on this device: what its weights are cast to, None for nothing, and the
    dtype of `optimize`. On a GPU all of a model runs in float16 or bfloat16. ValueError for float16 on a
    CPU."""
    if dtype in HALVES and place.type != "cpu":
        return HALVES[dtype], None
    if dtype == "float16":
        raise ValueError("float16 is for a GPU; on a CPU there are bfloat16 and int8")
    return None, dtype


def checked_device(device: torch.device | str) -> torch.device:
    """The device; ValueError, with torch's reason, for one that cannot be used here."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch's own, for no such kind and for none here
        raise ValueError(f"device {device!s} cannot be used here: {str(error).splitlines()[0]}") from error
