"""Which linears of an optimised model run in int8.

With real text the model's outputs decide: they are computed with all linears in int8, and held against those
of fp32. Without, each linear is judged by what it would lose on random tokens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pruned_ops.runtime.int8_losses import FLOOR, above_limit, told
from pruned_ops.runtime.packed_encoder import OptimisedEncoder, PackedEncoder, packed_encoders
from pruned_ops.runtime.streaming import is_per_text, is_per_token
from pruned_ops.runtime.texts import text_batches, text_model, text_outputs

Batch = Mapping[str, Any]  # a model's arguments, or the features of a model of sentence-transformers

# How far off int8 may be (see `relative_error`), and which part of that a linear may take alone. With all
# linears in int8 all-MiniLM-L6-v2 is off by 0.078, by 0.035 at most because of a single one, and loses 0.2
# points of its Spearman on STS-B. An outlier planted in a layer made that 0.11 to 0.52, of which 0.08 to 0.52
# were a single linear's, and cost up to 1.3 points; with that linear in fp32 again it was 0.2 to 0.3 points.
TOLERANCE = 0.15
_ALONE = 0.5


def leave_out_outliers(model: nn.Module, new: Collection[PackedEncoder]) -> dict[str, float]:
    """Leave in fp32 the linears of an optimised model that would lose too much in int8 (see `int8_losses`),
    because some of their inputs or weights are many times as large as the rest.

    new: the encoders whose linears are chosen; what was chosen of others, maybe by a calibration, stays.
    Returns every linear's loss on random tokens by its name, which `model.int8_losses` holds too. Warns where
    a linear is left out.
    """
    losses: dict[str, float] = {}
    left_out: dict[str, float] = {}
    for prefix, packed in _packed_by_name(model).items():
        if packed.stored_int8:  # there is nothing else to run
            continue
        own_losses = packed.losses_on_random_tokens()
        high = above_limit(own_losses) if packed in new else {}
        if high:
            packed.encoder.pack(False, packed.encoder.int8_linears - set(high))
        losses.update({f"{prefix}.{name}": loss for name, loss in own_losses.items()})
        left_out.update({f"{prefix}.{name}": loss for name, loss in high.items()})
    model.__dict__["int8_losses"] = losses
    if high := above_limit(left_out):
        warnings.warn(
            f"{len(high)} of {len(losses)} linears stay in float32, because int8 would lose {told(high)}: "
            "some of their inputs or weights are many times as large as the rest; with calibration=batches "
            "of real text, int8 is judged by the model's outputs instead",
            RuntimeWarning,
            stacklevel=4,
        )
    return losses


def _packed_by_name(model: nn.Module) -> dict[str, PackedEncoder]:
    """What computes the model's encoders, by the names of their stacks of layers."""
    return {
        f"{name}.encoder".removeprefix("."): module.packed
        for name, module in model.named_modules()
        if isinstance(module, OptimisedEncoder)
    }


def choose_int8(model: nn.Module, calibration: Iterable[Any], tolerance: float) -> dict[str, float]:
    """Run in int8 as many linears of an optimised model as its outputs tolerate.

    calibration: batches of the model's arguments, from real text, or texts (see `optimize`). A linear's error
    is that of the model's outputs (see `relative_error`) with this linear alone in int8. One that takes more
    than half of the tolerance stays fp32, and of the others those with the largest errors, as few as it
    takes: the outputs with the rest in int8 are computed, and are off by at most `tolerance`. Nothing is
    assumed of how errors add up. Returns every linear's error by its name, which `model.int8_errors` holds
    too. Warns where a linear stays fp32.
    Errors: ValueError for no batch, or a tolerance below 0.
    """
    batches = batches_of(model, calibration)
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; 0 or more is needed")
    encoders = {prefix: packed.encoder for prefix, packed in _packed_by_name(model).items()}
    linears = [
        (prefix, name) for prefix, encoder in encoders.items() for name in sorted(encoder.int8_linears)
    ]

    def run_in_int8(chosen: Sequence[tuple[str, str]], keep_weights: bool = True) -> None:
        for prefix, encoder in encoders.items():
            encoder.pack(keep_weights, [name for owner, name in chosen if owner == prefix])

    run_in_int8([])
    exact = outputs_of(model, batches)

    def error_of(chosen: Sequence[tuple[str, str]]) -> float:
        run_in_int8(chosen)
        return relative_error(outputs_of(model, batches), exact)

    errors = {linear: error_of([linear]) for linear in linears}
    by_error = sorted(linears, key=errors.__getitem__)
    most = sum(error <= _ALONE * tolerance for error in errors.values())
    reached = error_of(by_error[:most])
    number = most
    if not reached <= tolerance:
        number = 0  # so many are tolerated; `most` are not
        while most - number > 1:
            half = (number + most) // 2
            error = error_of(by_error[:half])
            if error <= tolerance:
                number, reached = half, error
            else:
                most = half
    run_in_int8(by_error[:number], keep_weights=False)
    if number < len(linears):
        _warn_left_out(errors, by_error[number:], reached if number else 0.0, tolerance)
    by_name = {".".join(linear): error for linear, error in errors.items()}
    model.__dict__["int8_errors"] = by_name
    return by_name


def _warn_left_out(
    errors: Mapping[tuple[str, str], float],
    left_out: Sequence[tuple[str, str]],
    reached: float,
    tolerance: float,
) -> None:
    worst = ", ".join(f"{'.'.join(linear)} ({errors[linear]:.3g} alone)" for linear in left_out[:-5:-1])
    more = f" and {len(left_out) - 4} others" if len(left_out) > 4 else ""
    warnings.warn(
        f"{len(left_out)} of {len(errors)} linears stay in float32, because int8 would put the outputs off "
        f"by more than the tolerance of {tolerance:g}, or a linear alone by more than half of it: "
        f"{worst}{more}; with the others in int8 they are off by {reached:.3g}; see model.int8_errors",
        RuntimeWarning,
        stacklevel=5,
    )


def batches_of(model: nn.Module, calibration: Iterable[Any]) -> list[Batch]:
    """The batches of a calibration. Errors: ValueError for no batch, and for texts to a model without a
    tokenizer."""
    if isinstance(calibration, (str, Mapping)):
        raise ValueError(
            f"calibration is a {type(calibration).__name__}; a list of batches or texts is needed"
        )
    batches_or_texts = list(calibration)
    if not batches_or_texts:
        raise ValueError("calibration has no batch")
    if isinstance(batches_or_texts[0], Mapping):
        return batches_or_texts
    return list(text_batches(model, batches_or_texts))


@contextmanager
def _unwatched(model: nn.Module) -> Iterator[None]:
    """Runs that measure int8 themselves are not looked at by `Int8Watch`."""
    watches = [(packed, packed.watch) for packed in packed_encoders(model)]
    for packed, _ in watches:
        packed.watch = None
    try:
        yield
    finally:
        for packed, watch in watches:
            packed.watch = watch


def outputs_of(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """Each of the model's outputs over all batches, as (rows, numbers): a row for each real token, or for
    each text. Of a model of sentence-transformers it is what its `encode` or `predict` reads."""
    with torch.no_grad(), _unwatched(model):
        of_batches = real_rows(_outputs_of(model, batch) for batch in batches)
    return [
        torch.cat([rows.reshape(len(rows), -1) for rows in output])
        for output in zip(*of_batches, strict=True)
    ]


def _outputs_of(model: Any, batch: Batch) -> tuple[list[tuple[str, Tensor]], Tensor | None]:
    """What a model gives for a batch, by name, and the batch's mask; None for rows that are texts' alone."""
    if text_model(model) is not None:
        return [("", text_outputs(model, batch))], None
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if mask is None and ids is not None:
        mask = torch.ones_like(ids)
    return named_outputs(model(**batch)), mask


def named_outputs(output: Any) -> list[tuple[str, Tensor]]:
    """The tensors of what a model returned for texts, with their names; "" where they have none. One tensor
    alone is named as `encode_many` takes it."""
    if isinstance(output, Tensor):
        output = {"logits": output}
    named = list(output.items()) if isinstance(output, Mapping) else [("", value) for value in output]
    return [(name, value) for name, value in named if isinstance(value, Tensor) and value.dim()]


def real_rows(batches: Iterable[tuple[list[tuple[str, Tensor]], Tensor | None]]) -> list[list[Tensor]]:
    """The rows of each batch's outputs: those of the real tokens (tokens, ...) of an output for tokens, and
    one for texts as it is.

    batches: each with its outputs by name and the mask (batch, seqlen), or no mask where all rows are texts'.
    Names tell what rows are, and so does a third dimension. Two dimensions under another name are tokens only
    where every batch has as many numbers as tokens."""
    in_batches = [[_without_padding(*output, mask) for output in named] for named, mask in batches]
    of_tokens = [all(mask is not None for _, mask in output) for output in zip(*in_batches, strict=True)]
    return [
        [
            value[mask.bool()] if is_of_tokens and mask is not None else value
            for is_of_tokens, (value, mask) in zip(of_tokens, outputs, strict=True)
        ]
        for outputs in in_batches
    ]


def _without_padding(name: str, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The rows of an output of a batch; with the mask where it cannot be told by this batch alone whether
    padding has to be taken out of them."""
    if mask is None or value.shape[:2] != mask.shape or is_per_text(name, value):
        return value, None
    if value.dim() > 2 or is_per_token(name):
        return value[mask.bool()], None
    return value, mask


def relative_error(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """How far outputs (rows, numbers) are off, relative to how much the exact ones vary from row to row, in
    the L2 norm; of several outputs, the worst. Infinite where one is not a number.

    What is the same in all rows tells nothing of the text, however large it is. Of outputs that vary by less
    than a quarter of their size, as for a single text, that quarter is taken.
    """
    errors = []
    for output, right in zip(outputs, exact, strict=True):
        varies, size = (right - right.mean(0)).norm(), right.norm()
        errors.append((output - right).norm() / torch.maximum(varies, FLOOR * size).clamp_min(1e-30))
    return float(torch.stack(errors).max().nan_to_num(nan=math.inf, posinf=math.inf))
