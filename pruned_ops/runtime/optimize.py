"""`optimize` makes a Hugging Face model run packed, in place; `restore` undoes it.

The model keeps its call signature and its outputs. Inside, padding is removed before the embedding and put
back after the last layer, or after the known heads' logits, so that no padded token is computed. No weight is
kept twice: what the kernels read is what `state_dict` and `restore` give back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from pruned_ops.layers.int8 import DEQUANTIZE
from pruned_ops.models.stock import is_encoder
from pruned_ops.ops.backends.cpu import slow_int8
from pruned_ops.ops.registry import BACKENDS
from pruned_ops.runtime.encoder_weights import is_stored_in_int8
from pruned_ops.runtime.engine import Engine
from pruned_ops.runtime.int8_choice import TOLERANCE, Batch, choose_int8, leave_out_outliers
from pruned_ops.runtime.known_heads import hook_head
from pruned_ops.runtime.packed_encoder import (
    CHANGING,
    OptimisedEncoder,
    PackedEncoder,
    install,
    optimised_encoders,
    packed_encoders,
    remove,
)
from pruned_ops.runtime.refusals import refuse_encoder, refuse_model
from pruned_ops.runtime.saving import hook_saving, unhook_saving
from pruned_ops.runtime.streaming import encode_many, serves
from pruned_ops.runtime.texts import hook_texts, refuse_expansion, unhook_texts

DTYPES = (None, "bfloat16", "int8")  # of the linears

_HEAD = "_pruned_ops_head"
_MODES = "_pruned_ops_modes"
_MANY = "encode_many"
_TRAIN = "train"
_MEASURED = ("int8_errors", "int8_losses")


def optimize(
    model: nn.Module,
    dtype: str | None = None,
    calibration: Iterable[Batch | str | Sequence[str]] | None = None,
    tolerance: float = TOLERANCE,
    graphs: bool = True,
    keep_fp32: bool = True,
) -> Any:
    """Let `model` run packed: a stock or pruned encoder of a family that is known, or a module that contains
    one.

    Returns the model itself, changed in place, in evaluation mode, with the same call signature. Whatever
    else holds one of its encoders runs packed too. At padded positions hidden states are 0 and
    question-answering logits the dtype's minimum. `model.encode_many(texts)` runs any number of tokenised
    texts at full rate, in order, where the model takes input_ids and attention_mask; a SentenceTransformer, a
    CrossEncoder and a SparseEncoder do so in their own `encode` and `predict`, whose `batch_size` then has
    no effect (but for a SparseEncoder, which tokenizes so many texts at once). While the weights are laid out
    the encoders' own are still there; they are released at the end. Any error leaves the model as it was.
    Threads may call this while others run the model.
    dtype: None keeps the weights' own. "bfloat16" rounds the weights and the inputs of the linears to
    bfloat16 and sums in fp32, on a CPU with AVX512_BF16 or AMX. "int8" runs the linears in int8, with a scale
    for each channel of the weights and each token of the activations, on a CPU; the fp32 weights are kept,
    and `save_pretrained` writes the int8 ones. A model that was loaded from such a checkpoint runs in int8. A
    warning tells where int8 is not faster than fp32 on this processor. All else stays in fp32.
    calibration: with int8, batches of real text; for a model of sentence-transformers, a list of texts (of
    pairs for a CrossEncoder). The outputs decide: they are measured in int8 against fp32, relative to how
    much they vary from text to text. Linears that put them off by more than `tolerance`, or alone by more
    than half of it, stay fp32, as few as it takes (see `choose_int8`), and a warning names them;
    `model.int8_errors` has each linear's error. Without calibration all linears are int8, but for those that
    lose more than a tenth of their outputs on random tokens, which a warning names; `model.int8_losses` has
    each linear's. In both cases some of the text that is run is compared with fp32, and a warning tells where
    a linear loses more than a tenth.
    keep_fp32: with bfloat16, whether the fp32 weights are kept beside the rounded ones, where these differ,
    so that `restore`, `state_dict` and `save_pretrained` give them back. False takes the rounded weights for
    the model's own for good, in half the memory of fp32.
    graphs: on a GPU, run batches by CUDA graphs. `model.engine` (see `engine.Engine`) has its `stats`, and
    `warm_up(batches)` captures the graphs beforehand. Nothing changes on a CPU.
    Errors: ValueError for a model without such an encoder, or with one that would not be computed as it is,
    for a dtype that cannot run here, and for a model that is optimised already in another dtype, or without
    what is asked for now.
    """
    if dtype not in DTYPES:
        raise ValueError(f'dtype is {dtype!r}; None, "bfloat16" or "int8" is needed')
    if calibration is not None and dtype != "int8":
        raise ValueError("calibration is for dtype='int8'")
    if calibration is None and tolerance != TOLERANCE:
        raise ValueError("tolerance is for calibration, which judges int8 by it")
    if not keep_fp32 and dtype != "bfloat16":
        raise ValueError("keep_fp32=False is for dtype='bfloat16'")
    # What is made here outlives the caller's inference mode.
    with CHANGING, torch.inference_mode(False), torch.no_grad():
        is_module = isinstance(model, nn.Module)
        is_optimised = is_module and _is_optimised(model, dtype)
        present = packed_encoders(model) if is_module else []
        for name, conflicts in (
            ("calibration", is_optimised and calibration is not None),
            ("keep_fp32=False", not keep_fp32 and any(packed.keeps_fp32 for packed in present)),
            ("graphs=False", not graphs and any(packed.engine is not None for packed in present)),
        ):
            if conflicts:
                raise ValueError(
                    f"this model is optimised already, and {name} would have no effect: "
                    "pruned_ops.restore(model) first"
                )
        if not is_optimised:
            _optimize(model, dtype, calibration, tolerance, graphs, keep_fp32)
    return model


def _optimize(
    model: nn.Module,
    dtype: str | None,
    calibration: Iterable[Any] | None,
    tolerance: float,
    graphs: bool,
    keep_fp32: bool,
) -> None:
    """Check everything, lay everything out, release the encoders' own weights, and set the hooks last."""
    encoders, int8 = _plain_encoders(model, dtype), dtype == "int8"
    if calibration is not None and any(is_stored_in_int8(encoder) for encoder in encoders):
        raise ValueError("this model's weights are stored in int8 already: calibration is for fp32 weights")
    _warn_without_backend(encoders)
    packed = {encoder: PackedEncoder(encoder, dtype, keep_fp32) for encoder in encoders}
    if any(laid_out.int8 for laid_out in packed.values()):
        warn_slow_int8(stacklevel=4)
    before = _Before.of(model)
    try:
        for encoder in encoders:
            install(encoder, packed[encoder])
        _hook_heads(model)
        model.eval()
        if calibration is not None:
            choose_int8(model, calibration, tolerance)
        elif int8:
            leave_out_outliers(model, packed.values())
        for encoder in encoders:
            packed[encoder].release(encoder)
        if graphs:
            _add_engines(model)
        if serves(model) and not hasattr(model, _MANY):  # a method of that name stays the model's own
            setattr(model, _MANY, partial(encode_many, model))
        hook_texts(model)
        hook_saving(model)
        _hook_training(model)
    except BaseException:
        for encoder in encoders:
            if isinstance(encoder, OptimisedEncoder):
                remove(encoder)
        before.give_back(model)
        raise
    before.note_modes(model)


@dataclass(frozen=True)
class _Before:
    """What a model was before `optimize`, but for the encoders that this one optimises.

    stacks: those of encoders that were optimised earlier, with their layouts and what of them runs in int8.
    measured: what `_MEASURED` names. modes: of the modules outside of those encoders, which know theirs."""

    stacks: list[tuple[Any, Any, frozenset[str]]]
    measured: dict[str, Any]
    modes: list[tuple[nn.Module, bool]]

    @classmethod
    def of(cls, model: nn.Module) -> _Before:
        stacks = [packed.encoder for packed in packed_encoders(model)]
        inside = {module for encoder in optimised_encoders(model) for module in encoder.modules()}
        return cls(
            [(stack, stack.laid_out, stack.int8_linears) for stack in stacks],
            {name: vars(model)[name] for name in _MEASURED if name in vars(model)},
            [(module, module.training) for module in model.modules() if module not in inside],
        )

    def give_back(self, model: nn.Module) -> None:
        """Undo the rest, once the encoders are what they were."""
        if not self.stacks:  # else whatever holds those encoders goes on with them
            _unhook(model)
        for name in _MEASURED:
            vars(model).pop(name, None)
        vars(model).update(self.measured)
        for module, training in self.modes:
            module.training = training
        for stack, laid_out, linears in self.stacks:
            if stack.laid_out is not laid_out:
                stack.pack(False, linears)

    def note_modes(self, model: nn.Module) -> None:
        """Note the modes for `restore`. Those that are noted already are still to be restored if an encoder
        was optimised; else they are old."""
        noted = vars(model).get(_MODES, []) if self.stacks else []
        known = {module for module, _ in noted}
        model.__dict__[_MODES] = noted + [pair for pair in self.modes if pair[0] not in known]


def _is_optimised(model: nn.Module, dtype: str | None) -> bool:
    """Whether the model is optimised already, itself and not only a part of it. Errors: ValueError where it
    is, in another dtype. What was stored in int8 runs in int8 when nothing is asked for, too."""
    if any(
        packed.linear_dtype != dtype and not (packed.stored_int8 and dtype is None)
        for packed in packed_encoders(model)
    ):
        raise ValueError("this model is optimised already, in another dtype: pruned_ops.restore(model) first")
    if any(map(is_encoder, model.modules())):
        return False
    is_hooked = _MODES in vars(model) and all(_HEAD in vars(parent) for parent, _ in _parents(model))
    return is_hooked and bool(packed_encoders(model))


def own_dtype(model: nn.Module) -> str | None:
    """The dtype that `optimize` would have to be asked for to leave a model as it is: that of its encoders,
    which are optimised already. None where one of them is not, or they run in several."""
    dtypes = {packed.linear_dtype for packed in packed_encoders(model)}
    is_whole = len(dtypes) == 1 and not any(map(is_encoder, model.modules()))
    return dtypes.pop() if is_whole else None


def _parents(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """The modules that have an optimised encoder as their child, each with that encoder."""
    return [
        (parent, child)
        for parent in model.modules()
        for child in parent.children()
        if isinstance(child, OptimisedEncoder)
    ]


def _plain_encoders(model: nn.Module, dtype: str | None) -> list[Any]:
    """The encoders to optimise. Errors: ValueError for a model without any, or with one that cannot be."""
    if not isinstance(model, nn.Module) or not optimised_encoders(model):
        refusal = refuse_model(model)
        if refusal is not None:
            raise ValueError(refusal)
    refusal = next(filter(None, map(refuse_expansion, model.modules())), None)
    if refusal is not None:
        raise ValueError(f"optimize cannot take this {type(model).__name__}: {refusal}")
    encoders = []
    for name, module in model.named_modules():
        if is_encoder(module):
            int8 = dtype == "int8" or (dtype is None and is_stored_in_int8(module))
            refusal = refuse_encoder(module, int8, dtype == "bfloat16", in_place=True)
            if refusal is not None:
                label = f"{name}, a" if name else "this"
                raise ValueError(f"optimize cannot take {label} {type(module).__name__}: {refusal}")
            encoders.append(module)
    return encoders


def _warn_without_backend(encoders: Sequence[Any]) -> None:
    """Say once that an optimised model will not be faster where none of our kernels can run."""
    global _warned
    reasons = [backend.missing for backend in BACKENDS.values() if not backend.on_demand]
    if encoders and all(reasons) and not _warned:
        _warned = True
        text = "; ".join(reason for reason in reasons if reason)
        warnings.warn(
            f"none of pruned_ops' kernels can run here, so that an optimised model will not be faster than "
            f"it was: {text}",
            RuntimeWarning,
            stacklevel=4,
        )


_warned = False


def warn_slow_int8(stacklevel: int) -> None:
    """Warn where int8 is not expected to be faster than float32 on this processor."""
    reason = slow_int8()
    if reason is not None:
        text = f"int8 will not be faster than float32 here: {reason}"
        warnings.warn(text, RuntimeWarning, stacklevel)


def _hook_heads(model: nn.Module) -> None:
    """Hook the heads around the model's encoders, and tell the encoders about them."""
    for parent, encoder in _parents(model):
        if _HEAD not in parent.__dict__:
            parent.__dict__[_HEAD] = hook_head(parent)
        head, hooked = parent.__dict__[_HEAD]
        name = type(parent if hooked else model).__name__
        if name not in encoder.packed.around:
            encoder.packed.around.append(name)
        if head is not None and head not in encoder.packed.heads:
            encoder.packed.heads.append(head)
    for encoder in optimised_encoders(model):
        encoder.packed.around = encoder.packed.around or [type(model).__name__]


def _add_engines(model: Any) -> None:
    """Give every packed encoder an engine. The first engine is also the model's, unless it has an attribute
    of that name. They are made on a CPU too, where they do nothing, for a model that moves to a GPU later."""
    for packed in packed_encoders(model):
        if packed.engine is None:
            packed.engine = Engine(packed)
        if not hasattr(model, "engine"):
            model.engine = packed.engine


def _hook_training(model: nn.Module) -> None:
    """Let whatever holds an optimised encoder leave its modules in their modes where that refuses training:
    torch visits some of them before it."""
    for module in model.modules():
        is_around = not isinstance(module, OptimisedEncoder) and bool(optimised_encoders(module))
        if is_around and _TRAIN not in vars(module):
            module.__dict__[_TRAIN] = partial(_train, module)


def _train(model: nn.Module, mode: bool = True) -> Any:
    """The model's own `train`. Where it fails, every module is in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        return type(model).train(model, mode)
    except BaseException:
        for module, training in modes:
            module.training = training
        raise


def restore(model: nn.Module) -> Any:
    """Undo `optimize`: give the encoders their own parameters back, with their values, and the mode in which
    they were. Returns the model.

    Errors: ValueError for a model that was loaded from int8 weights: it never had others."""
    if any(packed.stored_int8 for packed in packed_encoders(model)):
        raise ValueError(
            f"this model was loaded from int8 weights, and there are no fp32 weights to restore: {DEQUANTIZE}"
        )
    return _restore(model)


def _restore(model: nn.Module) -> Any:
    """`restore`, which also gives int8 weights back as they were loaded."""
    with CHANGING, torch.inference_mode(False), torch.no_grad():
        for encoder in optimised_encoders(model):
            remove(encoder)
        _unhook(model)
        for root in model.modules():  # of two that noted a module's mode, the inner one did so first
            for module, training in root.__dict__.pop(_MODES, ()):
                module.training = training
    return model


def _unhook(model: nn.Module) -> None:
    """Take away all that `optimize` put on the modules around the encoders, but for the hooks of heads."""
    for module in list(model.modules()):
        if isinstance(module.__dict__.get("engine"), Engine):
            del module.engine
        for name in (_MANY, _TRAIN):
            method = module.__dict__.get(name)
            if isinstance(method, partial) and method.func in (encode_many, _train):
                del module.__dict__[name]
    unhook_texts(model)
    unhook_saving(model)
    for measured in _MEASURED:
        model.__dict__.pop(measured, None)


@contextmanager
def optimized(model: nn.Module, dtype: str | None = None) -> Iterator[Any]:
    """`with optimized(model) as fast:` runs packed inside the block. After it the model is as before.

    dtype, and errors: as for `optimize`. A model whose encoders are all optimised already stays as it is, in
    its own dtype where None is asked for. One of which only a part is optimised is refused: what is around
    that part would be taken for restored after the block, or for optimised inside it."""
    if packed_encoders(model):
        if any(map(is_encoder, model.modules())):
            raise ValueError(
                f"a part of this {type(model).__name__} is optimised already, and a part is not: "
                "pruned_ops.optimize or pruned_ops.restore the whole model first"
            )
        if dtype is not None:
            _is_optimised(model, dtype)  # refuses another dtype
        yield model  # whoever optimised it will restore it
        return
    fast = optimize(model, dtype)
    try:
        yield fast
    finally:
        _restore(fast)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Undo `optimize` inside the block. After it the model runs as before, the linears in int8 that had been
    chosen, too. Errors: as `restore`'s."""
    encoders = packed_encoders(model)
    chosen = [(packed.encoder.int8_linears, packed.watch) for packed in encoders]
    first = encoders[0]  # they are all of one dtype
    options = (first.linear_dtype, None, TOLERANCE, first.engine is not None, first.keeps_fp32)
    measured = {name: vars(model)[name] for name in _MEASURED if name in vars(model)}
    del encoders, first  # and the memory of what they have laid out
    restore(model)
    try:
        yield
    finally:
        with warnings.catch_warnings(action="ignore"):  # it was said when they were chosen
            optimize(model, *options)
        with CHANGING, torch.inference_mode(False):
            for packed, (linears, watch) in zip(packed_encoders(model), chosen, strict=True):
                if packed.int8:
                    packed.encoder.pack(False, linears)
                packed.watch = watch
        for name in _MEASURED:
            vars(model).pop(name, None)
        vars(model).update(measured)
