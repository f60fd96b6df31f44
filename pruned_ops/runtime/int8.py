"""Which linears of an optimised model run in int8: all, or those that calibration batches allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pruned_ops.runtime.packed_encoder import PackedEncoder

Batch = Mapping[str, Tensor]


def choose_int8(model: nn.Module, calibration: Iterable[Batch], tolerance: float) -> dict[str, float]:
    """Leave in fp32 the linears of an optimised model that hurt its output most.

    calibration: batches of the model's arguments, real text. A linear's error is that of the model's outputs
    at real tokens, relative in the L2 norm, with this linear alone in int8. Squared errors add up nearly; the
    largest ones go back to fp32 until the sum of the rest is within tolerance squared. Returns every linear's
    error by its name. Errors: ValueError for no batch, or a tolerance below 0.
    """
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration has no batch")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; 0 or more is needed")
    encoders = {
        f"{name}.encoder": module.encoder
        for name, module in model.named_modules()
        if isinstance(module, PackedEncoder)
    }
    candidates = [(prefix, name) for prefix, one in encoders.items() for name in sorted(one.int8_linears)]

    def pack(chosen: Sequence[tuple[str, str]]) -> None:
        for prefix, encoder in encoders.items():
            encoder.pack(False, [name for owner, name in chosen if owner == prefix])

    pack([])
    exact = _outputs(model, batches)
    errors: dict[tuple[str, str], float] = {}
    for candidate in candidates:
        pack([candidate])
        found = _outputs(model, batches)
        errors[candidate] = float((found - exact).norm() / exact.norm().clamp_min(1e-30))
    chosen, total = [], 0.0
    for candidate in sorted(candidates, key=errors.__getitem__):
        total += errors[candidate] ** 2
        if total <= tolerance**2:
            chosen.append(candidate)
    pack(chosen)
    return {".".join(candidate): error for candidate, error in errors.items()}


def _outputs(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """What the model puts out at real tokens, of all batches, as one vector."""
    found = []
    with torch.no_grad():
        for batch in batches:
            output: Any = model(**batch)
            tensors = output if isinstance(output, tuple) else output.to_tuple()
            mask = batch.get("attention_mask")
            for tensor in tensors:
                if isinstance(tensor, Tensor):
                    per_token = mask is not None and tensor.shape[:2] == mask.shape
                    found.append(
                        (tensor[mask.bool()] if per_token and mask is not None else tensor).flatten()
                    )
    return torch.cat(found)
