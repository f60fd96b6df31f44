"""`optimize` swaps the packed encoder into an existing Hugging Face model; `restore` undoes it.

The model keeps its call signature and its outputs. Inside, padding is removed before the embedding and put
back after the last layer, or after the known heads' logits, so that no padded token is computed. No weight is
kept twice: until `restore` gives them back, the model's own weights read as NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from pruned_ops.models.stock import ENCODERS
from pruned_ops.ops.registry import BACKENDS, BackendError
from pruned_ops.runtime.engine import Engine
from pruned_ops.runtime.packed_encoder import PackedEncoder, refuse_encoder
from pruned_ops.runtime.packed_heads import hook_head
from pruned_ops.runtime.streaming import encode_many

Batch = Mapping[str, Tensor]  # a model's arguments

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
    """Put the packed encoder into `model`: a stock or pruned BERT or RoBERTa, or a module that contains one.

    Returns the model itself (the packed encoder, where `model` is a bare encoder), in evaluation mode, with
    the same call signature. At padded positions hidden states are 0 and question-answering logits the
    dtype's minimum. `model.encode_many(texts)` runs any number of texts at full rate, in order.
    dtype: None keeps the weights' own. "int8" runs the linears in int8, with a scale for each channel of the
    weights and each token of the activations, on a CPU with AVX-512 VNNI; the fp32 weights are kept.
    calibration: with int8, batches of real text. The linears that hurt the outputs most stay fp32, until the
    relative error is expected to be within `tolerance` (see `choose_int8`). Without it all linears are int8.
    graphs: on a GPU, run batches by CUDA graphs. `model.engine` (see `engine.Engine`) has its `stats`, and
    `warm_up(batches)` captures the graphs beforehand. Nothing changes on a CPU.
    Errors: ValueError for a model without such an encoder, or with one that would not be computed as it is,
    for int8 where it cannot run, and for a model that is optimised already in another dtype.
    """
    if dtype not in (None, "int8"):
        raise ValueError(f'dtype is {dtype!r}; None or "int8" is needed')
    int8 = dtype == "int8"
    if calibration is not None and not int8:
        raise ValueError("calibration is for dtype='int8'")
    if _is_optimised(model, int8):
        return model
    model = _swapped(model, int8)
    if calibration is not None:
        try:
            choose_int8(model, calibration, tolerance)
        except BaseException:  # no half-chosen model is left behind
            restore(model)
            raise
    if graphs:
        _add_engines(model)
    if not hasattr(model, _MANY):  # a method of that name stays the model's own
        setattr(model, _MANY, partial(encode_many, model))
    return model


def _is_optimised(model: nn.Module, int8: bool) -> bool:
    """Whether the model is optimised already. Errors: ValueError where it is, in another dtype."""
    encoders = _packed_encoders(model)
    if any(encoder.int8 != int8 for encoder in encoders):
        raise ValueError("this model is optimised already, in another dtype: pruned_ops.restore(model) first")
    return bool(encoders)


def _packed_encoders(model: nn.Module) -> list[PackedEncoder]:
    return [module for module in model.modules() if isinstance(module, PackedEncoder)]


def _swapped(model: nn.Module, int8: bool) -> Any:
    """The model with packed encoders in place of its own; a bare encoder becomes a packed one."""
    if type(model) in ENCODERS:
        return PackedEncoder(model, int8)
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) in ENCODERS
    ]
    _refuse_places(model, places, int8)
    modes = [(module, module.training) for module in model.modules()]
    packed: dict[nn.Module, PackedEncoder] = {}  # an encoder may be in several places
    for _, _, child in places:
        if child not in packed:
            packed[child] = PackedEncoder(child, int8)
    for parent, name, child in places:
        encoder = packed[child]
        setattr(parent, name, encoder)
        head, handles = hook_head(parent)
        if handles:
            setattr(parent, _HOOKS, handles)
        encoder.around.append(type(parent if handles else model).__name__)
        if head is not None:
            encoder.heads.append(head)
    setattr(model, _MODES, modes)
    return model.eval()


def _refuse_places(model: nn.Module, places: Sequence[tuple[nn.Module, str, nn.Module]], int8: bool) -> None:
    """Refuse a model without encoders, or with one that cannot be replaced, before any of them is touched."""
    if not places:
        raise ValueError(
            f"no BERT or RoBERTa encoder found in {type(model).__name__}; optimize takes models "
            f"that contain one of {', '.join(encoder.__name__ for encoder in ENCODERS)}"
        )
    for _, name, child in places:
        refusal = refuse_encoder(child, int8)
        if refusal is not None:
            raise ValueError(f"optimize cannot take {name}, a {type(child).__name__}: {refusal}")


def _add_engines(model: Any) -> None:
    """Give every packed encoder an engine. The first engine is also the model's. They are made on a CPU too,
    where they do nothing, for a model that moves to a GPU later."""
    for encoder in _packed_encoders(model):
        encoder.engine = Engine(encoder)
        if "engine" not in model.__dict__:
            model.engine = encoder.engine


def restore(model: nn.Module) -> Any:
    """Undo `optimize`: put the original encoders back, with their own parameters and in their earlier mode.

    Returns the model, or the original encoder where `model` is a packed one."""
    many = model.__dict__.get(_MANY)
    if isinstance(many, partial) and many.func is encode_many:
        delattr(model, _MANY)
    if isinstance(model, PackedEncoder):
        return model.undo()
    originals: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PackedEncoder):
                if child not in originals:
                    originals[child] = child.undo()
                setattr(parent, name, originals[child])
        if isinstance(parent.__dict__.get("engine"), Engine):
            del parent.engine
        for hook in parent.__dict__.pop(_HOOKS, ()):
            hook.remove()
    for module, training in model.__dict__.pop(_MODES, ()):
        module.training = training
    return model


@contextmanager
def optimized(model: nn.Module) -> Iterator[Any]:
    """`with optimized(model) as fast:` runs packed inside the block. After it the model is as before."""
    if _packed_encoders(model):
        yield model  # whoever optimised it will restore it
        return
    fast = optimize(model)
    try:
        yield fast
    finally:
        restore(fast)


def tune(model: nn.Module, batches: Iterable[Sequence[int]]) -> int:
    """Time the GPU kernels' configurations on this optimised model's shapes and these batches.

    The fastest configurations are kept, on disk too, and later runs with batches of about these sizes use
    them. Without it a model of the kernels' time chooses.
    batches: the lengths, in tokens, of the sequences of each batch. Returns how many shapes were timed; known
    shapes are not timed again.
    Errors: ValueError where `model` is not optimised or not on a GPU, or a batch is empty; BackendError where
    no backend can be tuned.
    """
    batches = [tuple(lengths) for lengths in batches]
    if any(not lengths or min(lengths) < 1 for lengths in batches):
        raise ValueError("a batch of no sequences, or with one of no tokens, cannot be tuned for")
    encoders = _packed_encoders(model)
    if not encoders:
        raise ValueError("tune takes an optimised model: call pruned_ops.optimize(model) first")
    if any(encoder.device.type != "cuda" for encoder in encoders):
        raise ValueError("tune times GPU kernels, and this model is on the CPU: call model.to('cuda') first")
    tuners = {backend: backend.tune for backend in BACKENDS.values() if backend.tune is not None}
    available = [tune_backend for backend, tune_backend in tuners.items() if backend.missing is None]
    if not available:
        reasons = "; ".join(f"{backend.name}: {backend.missing}" for backend in tuners)
        raise BackendError(f"no backend can be tuned here: {reasons}")
    return sum(
        tune_backend(encoder.encoder.running_shape, batches, encoder.dtype, encoder.device)
        for tune_backend in available
        for encoder in encoders
    )


def choose_int8(model: nn.Module, calibration: Iterable[Batch], tolerance: float) -> dict[str, float]:
    """Leave in fp32 the linears of an optimised model that hurt its outputs most.

    calibration: batches of the model's arguments, from real text. A linear's error is that of the model's
    outputs at real tokens, relative in the L2 norm, with this linear alone in int8. As squared errors nearly
    add up, the linears with the largest errors go back to fp32 until the others' squared errors sum to at
    most tolerance squared. Returns every linear's error by its name.
    Errors: ValueError for no batch, or a tolerance below 0.
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
    linears = [
        (prefix, name) for prefix, encoder in encoders.items() for name in sorted(encoder.int8_linears)
    ]

    def run_in_int8(chosen: Sequence[tuple[str, str]]) -> None:
        for prefix, encoder in encoders.items():
            encoder.pack(False, [name for owner, name in chosen if owner == prefix])

    run_in_int8([])
    exact = _outputs(model, batches)
    errors: dict[tuple[str, str], float] = {}
    for linear in linears:
        run_in_int8([linear])
        difference = _outputs(model, batches) - exact
        errors[linear] = float(difference.norm() / exact.norm().clamp_min(1e-30))
    by_error = sorted(linears, key=errors.__getitem__)
    totals = accumulate(errors[linear] ** 2 for linear in by_error)
    run_in_int8([linear for linear, total in zip(by_error, totals, strict=True) if total <= tolerance**2])
    return {".".join(linear): error for linear, error in errors.items()}


def _outputs(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """The model's outputs at the real tokens of all batches, as one vector."""
    vectors = []
    with torch.no_grad():
        for batch in batches:
            output: Any = model(**batch)
            mask = batch.get("attention_mask")
            for tensor in output if isinstance(output, tuple) else output.to_tuple():
                if isinstance(tensor, Tensor):
                    if mask is not None and tensor.shape[:2] == mask.shape:  # one row for each token
                        tensor = tensor[mask.bool()]
                    vectors.append(tensor.flatten())
    return torch.cat(vectors)
