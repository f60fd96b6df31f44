"""optimize(model): swap the packed encoder into an existing Hugging Face model; restore(model) undoes it.

The model keeps its call signature and its outputs. Inside, padding is removed before the embedding and put
back after the last layer (after the logits in question answering), so no padded token is computed. No weight
is kept twice: the model's own read as NaN until `restore` gives them back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pruned_ops.models.stock import ENCODERS
from pruned_ops.ops.registry import BACKENDS, BackendError
from pruned_ops.runtime.engine import Engine
from pruned_ops.runtime.packed_encoder import PackedEncoder, refuse
from pruned_ops.runtime.packed_heads import hook_head
from pruned_ops.runtime.streaming import encode_many

_HOOKS = "_pruned_ops_hooks"
_MODES = "_pruned_ops_modes"
_MANY = "encode_many"


def optimize(
    model: nn.Module,
    dtype: str | None = None,
    calibration: Iterable[Batch] | None = None,
    tolerance: float = 0.02,
    graphs: bool = True,
) -> Any:
    """Put the packed encoder into `model`, a stock or pruned BERT or RoBERTa, or any module that contains
    one.

    Returns the model itself (the packed encoder, where `model` is a bare encoder), in evaluation mode, with
    the same call signature. At padded positions hidden states are 0 and question-answering logits the
    dtype's minimum.
    dtype: None, the weights' own; "int8" runs the linears in int8, weights with a scale a channel and
    activations with a scale a token, on a CPU with AVX-512 VNNI. The fp32 weights are kept for `restore`.
    calibration: with int8, batches of real text; the linears that hurt the outputs most stay fp32, until the
    relative error is expected within `tolerance` (see `choose_int8`). Without it all linears are int8.
    graphs: on a GPU, run batches by CUDA graphs: `model.engine` (see `engine.Engine`) has its `stats`, and
    `warm_up(batches)` captures them beforehand. Nothing changes on a CPU.
    `model.encode_many(texts)` runs any number of texts at full rate, in order (see `encode_many`).
    Errors: ValueError for a model without such an encoder, or with one that would not be computed as it is,
    for int8 where it cannot run, and for a model that is optimised already in another dtype.
    """
    if dtype not in (None, "int8"):
        raise ValueError(f'dtype is {dtype!r}; None or "int8" is needed')
    int8 = dtype == "int8"
    if calibration is not None and not int8:
        raise ValueError("calibration is for dtype='int8'")
    done = [module for module in model.modules() if isinstance(module, PackedEncoder)]
    if not done:
        model = _swapped(model, int8)
        if calibration is not None:
            try:
                choose_int8(model, calibration, tolerance)
            except BaseException:  # no half-chosen model is left behind
                restore(model)
                raise
        if graphs:
            _add_engines(model)
        _add_encode_many(model)
    elif any(one.int8 != int8 for one in done):
        raise ValueError("this model is optimised already, in another dtype: pruned_ops.restore(model) first")
    return model


def _add_engines(model: Any) -> None:
    """An engine for every packed encoder; the first is the model's."""
    for module in model.modules():
        if isinstance(module, PackedEncoder):
            module.engine = Engine(module)
            if "engine" not in model.__dict__:
                model.engine = module.engine


def _add_encode_many(model: Any) -> None:
    if not hasattr(model, _MANY):  # a method of that name stays the model's own
        setattr(model, _MANY, partial(encode_many, model))


def _swapped(model: nn.Module, int8: bool) -> Any:
    """The model with packed encoders; a bare encoder becomes one."""
    if type(model) in ENCODERS:
        return PackedEncoder(model, int8)
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    found = [(parent, name, child) for parent, name, child in found if type(child) in ENCODERS]
    if not found:
        raise ValueError(
            f"no BERT or RoBERTa encoder found in {type(model).__name__}; optimize takes models "
            f"that contain one of "
            f"{', '.join(encoder.__name__ for encoder in ENCODERS)}"
        )
    for _, name, child in found:  # all of them before any is touched
        refusal = refuse(child, int8)
        if refusal is not None:
            raise ValueError(f"optimize cannot take {name}, a {type(child).__name__}: {refusal}")
    modes = [(module, module.training) for module in model.modules()]
    packed = {
        id(child): PackedEncoder(child, int8)
        for child in {id(child): child for _, _, child in found}.values()
    }
    for parent, name, child in found:
        encoder = packed[id(child)]
        setattr(parent, name, encoder)
        head, handles = hook_head(parent)
        if handles:
            setattr(parent, _HOOKS, handles)
        encoder.around.append(type(parent if handles else model).__name__)
        if head is not None:
            encoder.heads.append(head)
    setattr(model, _MODES, modes)
    return model.eval()


def restore(model: nn.Module) -> Any:
    """Undo `optimize`: the original encoders are back, with their own parameters and in the mode they were
    in.

    Returns the model."""
    many = model.__dict__.get(_MANY)
    if isinstance(many, partial) and many.func is encode_many:
        delattr(model, _MANY)
    if isinstance(model, PackedEncoder):
        return model.undo()
    originals: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PackedEncoder):
                if id(child) not in originals:
                    originals[id(child)] = child.undo()
                setattr(parent, name, originals[id(child)])
        if isinstance(parent.__dict__.get("engine"), Engine):
            del parent.engine
        for hook in parent.__dict__.pop(_HOOKS, ()):
            hook.remove()
    for module, training in model.__dict__.pop(_MODES, ()):
        module.training = training
    return model


def tune(model: nn.Module, batches: Iterable[Sequence[int]]) -> int:
    """Time the GPU kernels' configurations at this optimised model's shapes and at these batches, and keep
    the fastest, on disk too: later runs with batches of about these sizes use them. Without it a model of
    the kernels' time chooses.

    batches: the lengths, in tokens, of the sequences of each batch. Returns how many shapes were timed; what
    was known already is not timed again. Errors: ValueError where `model` is not optimised or not on a GPU,
    or a batch is empty; BackendError where no backend can be tuned.
    """
    batches = [tuple(lengths) for lengths in batches]
    if any(not lengths or min(lengths) < 1 for lengths in batches):
        raise ValueError("a batch of no sequences, or with one of no tokens, cannot be tuned for")
    encoders = [module for module in model.modules() if isinstance(module, PackedEncoder)]
    if not encoders:
        raise ValueError("tune takes an optimised model: call pruned_ops.optimize(model) first")
    if any(encoder.device.type != "cuda" for encoder in encoders):
        raise ValueError("tune times GPU kernels, and this model is on the CPU: call model.to('cuda') first")
    able = [backend for backend in BACKENDS.values() if backend.tune is not None]
    ready = [backend.tune for backend in able if backend.tune is not None and backend.missing is None]
    if not ready:
        reasons = "; ".join(f"{backend.name}: {backend.missing}" for backend in able)
        raise BackendError(f"no backend can be tuned here: {reasons}")
    return sum(
        one(encoder.encoder.running_shape, batches, encoder.dtype, encoder.device)
        for one in ready
        for encoder in encoders
    )


@contextmanager
def optimized(model: nn.Module) -> Iterator[Any]:
    """`with optimized(model) as fast:` runs packed inside the block; the model is as before after it."""
    if any(isinstance(module, PackedEncoder) for module in model.modules()):
        yield model  # whoever optimised it restores it
        return
    fast = optimize(model)
    try:
        yield fast
    finally:
        restore(fast)


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
