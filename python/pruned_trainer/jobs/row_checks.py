"""What is wrong with the rows of a caller's own, with batches of them and with their labels: found before any
training, and said with the row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pruned_ops.models.inputs import check_inputs, longest_sequence
from pruned_trainer.jobs.rows import Rows, label_of
from pruned_trainer.tasks.output_kinds import IGNORED, OutputKind
from pruned_trainer.training.batches import Collate, entries

# Rows of which a batch is made to look at them.
_AT_ONCE = 64
# Columns that have an entry for each token.
_OF_TOKENS = ("attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class Expected:
    """What rows are held against.

    configs: of the encoders that will read the rows, by what a message calls their models. specials: the ids
    of tokens that are no text. kind, width: of the model's outputs, and how many logits each has.
    label_names: the columns that only the loss reads. is_strict: whether the loss is the model's own, so that
    the form that labels have to have is known.
    """

    configs: Mapping[str, Any]
    specials: Collection[int]
    kind: OutputKind
    width: int
    label_names: Sequence[str]
    is_strict: bool


@contextmanager
def said(what: str) -> Iterator[None]:
    """Turn whatever the caller's own code raises inside the block into a ValueError of one sentence."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{what} ({type(error).__name__}{f': {reason}' if reason else ''})") from error


def first_batch(
    rows: Rows, collate: Collate, own_collator: bool, configs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The first two rows as a batch.

    own_collator: whether the caller gave the collator, which may make ids of other columns. configs: as for
    `Expected`. Errors: ValueError for a missing column, for a collator that fails, or gives no ids or no
    mask for each, and for ids that the models do not have.
    """
    if not own_collator:
        if "input_ids" not in rows[0]:
            has = ", ".join(map(str, rows.data[0]))
            raise ValueError(
                f"the {rows.name} has no column input_ids (it has {has or 'none'}): tokenise it first, or "
                "give a data_collator that does"
            )
        for number in range(min(2, len(rows))):
            _check_numbers(rows, number, rows[number])
    batch = _batch(rows, 0, min(2, len(rows)), collate)
    lengths = [int(mask.sum()) for mask in batch["attention_mask"]]
    for whose, config in configs.items():
        _check_length(rows, 0, batch, lengths, whose, config)
        _check_ids(rows, 0, batch, whose, config)
    return batch


def check_rows(rows: Rows, collate: Collate, own_collator: bool, expected: Expected) -> None:
    """Read all rows once, and note how many tokens each has.

    Errors: ValueError with the row for a column that it lacks, for ids, a text or a label that the models
    cannot take, and for a text that is empty.
    """
    if not own_collator:
        _check_columns(rows, expected)
    _check_labelled(rows, expected.label_names)
    lengths, has_labels, is_labelled = list[int](), False, False
    for start in range(0, len(rows), _AT_ONCE):
        batch = _batch(rows, start, min(_AT_ONCE, len(rows) - start), collate)
        lengths += _lengths(rows, start, batch, expected.specials)
        for whose, config in expected.configs.items():
            _check_length(rows, start, batch, lengths, whose, config)
            _check_ids(rows, start, batch, whose, config)
        if "labels" in batch:
            is_labelled, has_labels = True, _check_labels(rows, start, batch, expected) or has_labels
    if is_labelled and not has_labels and expected.is_strict:
        raise ValueError(f"the {rows.name} labels no token at all: every label of it is {IGNORED}")
    rows.lengths = lengths


# -- columns -----------------------------------------------------------------------------------------------


def _check_columns(rows: Rows, expected: Expected) -> None:
    """Errors: ValueError unless all rows have the first one's columns (but for masks), of numbers, each with
    an entry for each token or equally many in all rows."""
    first = rows[0]
    sizes = {name: torch.as_tensor(value).shape for name, value in first.items()}
    not_of_tokens, not_fixed = dict[str, int](), dict[str, int]()
    for number, row in enumerate(rows):
        _check_same_columns(rows, number, row, first)
        for name, value in _check_numbers(rows, number, row).items():
            of_tokens = value.dim() == 1 and len(value) == len(row["input_ids"])
            if not of_tokens or (name == "labels" and value.is_floating_point()):
                not_of_tokens.setdefault(name, number)
            if value.shape != sizes.get(name, value.shape):
                not_fixed.setdefault(name, number)
    needed = (*_OF_TOKENS, *(["labels"] if expected.kind is OutputKind.TOKENS and expected.is_strict else []))
    for name, number in not_of_tokens.items():
        if name in needed or name in not_fixed:
            if name not in needed:
                number = max(number, not_fixed[name])
            size = entries(rows[number][name])
            raise ValueError(
                f"row {number} of the {rows.name} has {len(rows[number]['input_ids'])} input_ids and "
                f"{'one number' if size is None else size} as {name}: an entry for each token is needed"
                + ("" if name in needed else ", or equally many in all rows")
            )


def _check_same_columns(rows: Rows, number: int, row: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    present, needed = ({n for n, v in r.items() if v is not None} - {"attention_mask"} for r in (row, first))
    for name in sorted(needed - present):
        raise ValueError(f"row {number} of the {rows.name} has no {name}, which row 0 has")
    for name in sorted(present - needed):
        raise ValueError(f"row {number} of the {rows.name} has {name}, which row 0 has not")


def _check_numbers(rows: Rows, number: int, row: Mapping[str, Any]) -> dict[str, Tensor]:
    """The columns of a row as tensors; ValueError where one holds no numbers, or ids are not in one line."""
    if row.get("input_ids") is None:
        raise ValueError(f"row {number} of the {rows.name} has no input_ids")
    tensors = {}
    for name, value in row.items():
        what = "label" if name == "labels" else name
        with said(
            f"row {number} of the {rows.name} has the {what} {_short(value)}: numbers are needed; without "
            "remove_unused_columns=False only the columns that the model reads are kept"
        ):
            tensors[name] = torch.as_tensor(value)
    ids = tensors["input_ids"]
    if ids.dim() != 1 or (ids.numel() and ids.is_floating_point()):
        raise ValueError(
            f"row {number} of the {rows.name} has input_ids of shape {tuple(ids.shape)} and {ids.dtype}: the "
            "ids of one text, whole numbers in one list, are needed (tokenise without return_tensors)"
        )
    return tensors


def _check_labelled(rows: Rows, names: Sequence[str]) -> None:
    """Errors: ValueError where some rows have labels and some have none."""
    label_names = [name for name in names if label_of(rows[0], name) is not None]
    for number, row in enumerate(rows):
        for name in label_names:
            if label_of(row, name) is None:
                raise ValueError(f"row {number} of the {rows.name} has no {name}, which row 0 has")


# -- batches -----------------------------------------------------------------------------------------------


def _batch(rows: Rows, start: int, number: int, collate: Collate) -> dict[str, Tensor]:
    """A batch of so many rows; ValueError where the collator fails or gives something else."""
    place = f"rows {start} to {start + number - 1} of the {rows.name}"
    without = f", without the columns {', '.join(rows.left_out)}, which" if rows.left_out else ""
    remedy = f"{without} remove_unused_columns=False keeps" if without else ""
    with said(f"the data collator fails on {place}{remedy}"):
        batch = collate(rows[start : start + number])
    for name in ("input_ids", "attention_mask"):
        if name not in batch:
            raise ValueError(
                f"the data collator gives no {name} (it gives {', '.join(batch) or 'no tensor'}): without it "
                "padding cannot be told from text"
            )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if ids.dim() != 2 or len(ids) != number or mask.shape != ids.shape:
        raise ValueError(
            f"the data collator makes input_ids of shape {tuple(ids.shape)} and an attention_mask of shape "
            f"{tuple(mask.shape)} of {number} rows: ({number}, seqlen) is needed of both"
        )
    return batch


def _lengths(rows: Rows, start: int, batch: Mapping[str, Tensor], specials: Collection[int]) -> list[int]:
    """The real tokens of each row; ValueError for a text without any."""
    lengths = []
    for place, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        real = ids[mask.bool()].tolist()
        if all(token in specials for token in real):
            raise ValueError(f"row {start + place} of the {rows.name} is an empty text: leave it out")
        lengths.append(len(real))
    return lengths


def _check_length(
    rows: Rows, start: int, batch: Mapping[str, Tensor], lengths: Sequence[int], whose: str, config: Any
) -> None:
    limit, padded = longest_sequence(config), batch["input_ids"].size(1)
    if padded <= limit:
        return
    longest = max(lengths[start:])
    what = f"row {lengths.index(longest, start)} of the {rows.name} has {longest} tokens"
    if longest <= limit:
        what = f"the batches of the {rows.name} are padded to {padded} tokens"
    raise ValueError(f"{what}; the {whose}'s position table allows {limit}")


def _check_ids(rows: Rows, start: int, batch: Mapping[str, Tensor], whose: str, config: Any) -> None:
    """Errors: ValueError, with the row, for an id that would be read outside its table."""
    names = ("input_ids", "position_ids", "token_type_ids")

    def check(chosen: slice) -> None:
        ids, positions, types = (None if name not in batch else batch[name][chosen] for name in names)
        check_inputs(config, ids, None, positions, types)

    try:
        check(slice(None))
    except IndexError:
        for place in range(len(batch["input_ids"])):
            try:
                check(slice(place, place + 1))
            except IndexError as error:
                raise ValueError(
                    f"row {start + place} of the {rows.name} does not fit the {whose}: {error}; was it made "
                    "with another tokenizer?"
                ) from None


# -- labels ------------------------------------------------------------------------------------------------


def _check_labels(rows: Rows, start: int, batch: Mapping[str, Tensor], expected: Expected) -> bool:
    """Whether any of these labels counts. Errors: ValueError with the row for one that does not fit the
    model's outputs."""
    labels, kind, width = batch["labels"], expected.kind, expected.width
    if kind is OutputKind.CLASSES and labels.is_floating_point() and labels.shape == (len(labels), width):
        kind = OutputKind.LABELS  # as transformers takes them
    if kind in _FORMS and (expected.is_strict or kind in (OutputKind.CLASSES, OutputKind.TOKENS)):
        form = _FORMS[kind](labels, batch["input_ids"].shape, width)
        if not form.has_form and expected.is_strict:
            _refuse_label(rows, start, labels[0].tolist(), f": {form.needed}")
        if form.has_form and bool(form.wrong.any()):
            place = int(form.wrong.reshape(len(labels), -1).any(1).nonzero()[0])
            label = labels[place][form.wrong[place]].flatten()[0].item()
            _refuse_label(rows, start + place, label, form.why_wrong or f": {form.needed}")
    return kind is not OutputKind.TOKENS or bool((labels != IGNORED).any())


def _refuse_label(rows: Rows, number: int, label: Any, why: str) -> None:
    raise ValueError(f"row {number} of the {rows.name} has the label {_short(label)}{why}")


class _Found(NamedTuple):
    """Whether labels have the form of their kind, and if so, which of them are wrong; what is needed, and
    what else can be said of a wrong one."""

    has_form: bool
    wrong: Tensor
    needed: str
    why_wrong: str = ""


def _classes(labels: Tensor, ids: torch.Size, width: int) -> _Found:
    needed = f"a whole number from 0 to {width - 1} is needed"
    has_form = _is_whole(labels) and labels.numel() == len(labels)
    return _Found(has_form, (labels < 0) | (labels >= width), needed, _range(width))


def _of_tokens(labels: Tensor, ids: torch.Size, width: int) -> _Found:
    needed = f"a whole number from 0 to {width - 1}, or {IGNORED} for none, is needed for each token"
    outside = ((labels < 0) | (labels >= width)) & (labels != IGNORED)
    return _Found(_is_whole(labels) and labels.shape == ids, outside, needed, _range(width))


def _yes_and_no(labels: Tensor, ids: torch.Size, width: int) -> _Found:
    has_form = labels.shape == (len(labels), width) and labels.is_floating_point()
    needed = f"{width} floats from 0.0 to 1.0 are needed"
    return _Found(has_form, ~((labels >= 0) & (labels <= 1)), needed)


def _numbers(labels: Tensor, ids: torch.Size, width: int) -> _Found:
    needed = f"{'one finite number is' if width == 1 else f'{width} finite numbers are'} needed"
    return _Found(labels.numel() == len(labels) * width, ~torch.isfinite(labels), needed)


_FORMS: dict[OutputKind, Callable[[Tensor, torch.Size, int], _Found]] = {
    OutputKind.CLASSES: _classes,
    OutputKind.TOKENS: _of_tokens,
    OutputKind.LABELS: _yes_and_no,
    OutputKind.SCORES: _numbers,
}


def _range(width: int) -> str:
    return f", and the model's config has {width} labels (0 to {width - 1})"


def _is_whole(labels: Tensor) -> bool:
    return not labels.is_floating_point() and labels.dtype != torch.bool


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
