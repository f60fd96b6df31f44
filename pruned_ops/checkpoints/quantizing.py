"""Make an int8 checkpoint of an fp32 one, if texts that it was not chosen by show that it stays near."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM

from pruned_ops.checkpoints.loading import (
    check_source,
    explained,
    file_beside,
    load_any_head,
    load_tokenizer,
    supported_config,
)
from pruned_ops.checkpoints.sentence_folder import MODULES, SETTINGS
from pruned_ops.files import check_new_folder, new_folder, read_json
from pruned_ops.models.families.known import family_of
from pruned_ops.models.inputs import longest_sequence
from pruned_ops.models.stock import find_encoder
from pruned_ops.runtime.encoder_weights import int8_sources, is_stored_in_int8
from pruned_ops.runtime.int8_choice import named_outputs, outputs_of, real_rows, relative_error
from pruned_ops.runtime.optimize import optimize, warn_slow_int8
from pruned_ops.runtime.packed_encoder import optimised_encoders
from pruned_ops.runtime.texts import library_class, text_batches, text_model, text_outputs, tokenized_batches

# A text, or a pair of texts.
Text = str | tuple[str, str]
# The linears are chosen for these fractions of the tolerance, one after the other, until texts that they were
# not chosen by are within it.
_FRACTIONS = (0.8, 0.4, 0.2)
_TEXTS_AT_ONCE = 16


@dataclass(frozen=True)
class Measured:
    """What int8 changed on the texts that the linears were not chosen by.

    error: of the outputs, relative to how much they vary from text to text (see `relative_error`). cosine:
    the lowest of a text's outputs to fp32.
    linears: how many of the encoder's run in int8, of `of_linears`; fp32_linears: the others' names.
    megabytes, fp32_megabytes: the bytes of the weights in the file, and of the model's in fp32, / 10^6."""

    texts: int
    calibration_texts: int
    tolerance: float
    error: float
    cosine: float
    linears: int
    of_linears: int
    fp32_linears: tuple[str, ...]
    megabytes: float
    fp32_megabytes: float


class GateNotMet(ValueError):
    """int8 changes the outputs more than is tolerated; nothing was written."""


def quantize(
    name: str, out: Path, texts: Sequence[Text], tolerance: float, round_tables: bool = True
) -> Measured:
    """Write the model of a folder or a hub name to `out` with int8 weights.

    texts: at least 8, of the kind that the model will read. Every second one is for choosing the linears that
    stay fp32, and the others decide. tolerance: the largest error of the outputs there (see `Measured`).
    round_tables: keep the embeddings in fp16; the error includes that.
    The folder loads as the model that it was made of did, after `import pruned_ops`; its config.json has what
    is returned. Errors: GateNotMet; ValueError for too few texts, for a model that `optimize` does not take,
    and where int8 cannot run here; OSError where `out` is there, or cannot be made."""
    check_new_folder(out)
    if len(texts) < 8:
        raise ValueError(f"there are {len(texts)} texts; at least 8 are needed, and some hundreds are better")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; a number between 0 and 1 is needed")
    calibration, held_out = texts[::2], texts[1::2]
    warn_slow_int8(stacklevel=3)
    for fraction in _FRACTIONS:
        model, tokenizer = load(name)
        if is_stored_in_int8(model):
            raise ValueError(f"{name} is stored in int8 already")
        batches = _batches(model, tokenizer, held_out)
        exact, exact_outputs = _by_text(model, batches), outputs_of(model, batches)
        fp32_bytes = _bytes(model.state_dict())
        if round_tables:
            _round_tables(model)
        chosen_by = _batches(model, tokenizer, calibration)
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # the report says it
            optimize(model, dtype="int8", calibration=chosen_by, tolerance=fraction * tolerance)
        rounded, error = _by_text(model, batches), relative_error(outputs_of(model, batches), exact_outputs)
        if error <= tolerance:
            break
    else:
        raise GateNotMet(
            f"on {len(held_out)} texts int8 changes the outputs by {error:.4f}, more than the tolerance of "
            f"{tolerance}, whatever stays in fp32: nothing was written; a larger --tolerance allows it"
        )
    cosine = min(float(torch.cosine_similarity(*pair, dim=0)) for pair in zip(rounded, exact, strict=True))
    names, running = _linears(model)
    report = Measured(
        len(held_out), len(calibration), tolerance, error, cosine, len(running), len(names),
        tuple(name for name in names if name not in running), 0.0, fp32_bytes / 1e6,
    )  # fmt: skip
    with new_folder(out) as stage:
        return _write(model, tokenizer, stage, report, batches, rounded)


def load(name: str) -> tuple[Any, Any]:
    """The model of a folder or a hub name, with the head that it was saved with, and its tokenizer; None for
    the tokenizer of a model of sentence-transformers, which has its own.

    Errors: ImportError where sentence-transformers is needed and not there; else as `load_model`'s."""
    check_source(name)
    with explained(name, name):
        if file_beside(name, MODULES) is not None:
            return _load_text_model(name), None
    tokenizer = load_tokenizer(name)
    with explained(name, name):
        config = supported_config(name)
    if not (config.architectures or [""])[0].endswith("ForMaskedLM"):
        return load_any_head(name, takes_int8=True), tokenizer
    with explained(name, name):
        model: Any
        model, info = AutoModelForMaskedLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    if info["missing_keys"]:  # an embedder that was saved without the head that its config names
        return load_any_head(name, takes_int8=True), tokenizer
    return model.eval(), tokenizer


def _load_text_model(name: str) -> Any:
    """A model of sentence-transformers, of the class that its own files name."""
    try:
        import sentence_transformers
    except ImportError:
        raise ImportError(
            f"{name} is a model of sentence-transformers: pip install sentence-transformers"
        ) from None
    saved = file_beside(name, SETTINGS)
    kind = "SentenceTransformer" if saved is None else library_class(read_json(saved), saved)
    return getattr(sentence_transformers, kind)(name, device="cpu").eval()


def _batches(model: Any, tokenizer: Any, texts: Sequence[Text]) -> list[dict[str, Any]]:
    """What the model's forward takes, of texts of like lengths together."""
    if text_model(model) is not None:
        return text_batches(model, [text if isinstance(text, str) else list(text) for text in texts])
    longest = min(longest_sequence(find_encoder(model).config), 512)
    ordered = sorted(texts, key=lambda text: -len(" ".join((text,) if isinstance(text, str) else text)))
    return tokenized_batches(tokenizer, ordered, longest, _TEXTS_AT_ONCE)


def _by_text(model: Any, batches: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """A vector for every text: the model's outputs for it, at its real tokens."""
    with torch.inference_mode():
        if text_model(model) is not None:
            return [row.flatten().clone() for batch in batches for row in text_outputs(model, batch)]
        of_texts = real_rows(output for batch in batches for output in _texts_of(model, batch))
        return [torch.cat([rows.flatten() for rows in outputs]) for outputs in of_texts]


def _texts_of(model: Any, batch: Mapping[str, Any]) -> Iterator[tuple[list[tuple[str, Tensor]], Tensor]]:
    """The outputs by name and the mask of each text of a batch, as batches of one."""
    mask, named = batch["attention_mask"], named_outputs(model(**batch))
    for row in map(slice, range(len(mask)), range(1, len(mask) + 1)):
        yield [(name, value[row]) for name, value in named], mask[row]


def _round_tables(model: nn.Module) -> None:
    """Round the embeddings to fp16, where they are within its range."""
    for module in find_encoder(model).embeddings.modules():
        if isinstance(module, nn.Embedding):
            half = module.weight.detach().half()
            if bool(half.isfinite().all()):
                module.weight.data = half.float()


def _linears(model: nn.Module) -> tuple[list[str], set[str]]:
    """The names of all linears in the layers of the model's encoder, and of those that run in int8."""
    (encoder,) = optimised_encoders(model)
    layers = f"{family_of(encoder.config).layers}."
    names = [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(layers)
    ]
    return names, {name for name, _, _ in int8_sources(encoder)}


def _bytes(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _weight_files(folder: Path) -> Iterator[Path]:
    yield from folder.rglob("*.safetensors")


def _write(
    model: Any,
    tokenizer: Any,
    folder: Path,
    report: Measured,
    batches: Sequence[Mapping[str, Any]],
    outputs: Sequence[Tensor],
) -> Measured:
    """Save the model with what was measured, load it again, and hold its outputs against those measured."""
    model.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    megabytes = sum(path.stat().st_size for path in _weight_files(folder)) / 1e6
    report = Measured(**{**asdict(report), "megabytes": megabytes})
    _note(folder, asdict(report))
    again, _ = load(str(folder))
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        optimize(again)
    if not all(torch.equal(*pair) for pair in zip(_by_text(again, batches), outputs, strict=True)):
        raise RuntimeError("the int8 model gives other outputs when it is loaded again: nothing was written")
    return report


def _note(out: Path, facts: Mapping[str, Any]) -> None:
    """Write what was measured into the config.json that has the names of the linears."""
    for path in out.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if "quantization_config" in config:
            config["quantization_config"]["measured"] = dict(facts)
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
