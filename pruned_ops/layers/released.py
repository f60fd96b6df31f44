"""Parameters that a stack computes with in its own layout: they read as they were, and refuse to be written
to, which would change nothing there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# What a released parameter answers for itself; all other reading is done on its values.
_METADATA = frozenset(
    (
        "_backward_hooks _base _grad_fn _is_view _use_count _version data_ptr device dim dtype element_size "
        "get_device grad grad_dtype grad_fn has_names is_complex is_conj is_contiguous is_cpu is_cuda "
        "is_floating_point is_inference is_leaf is_meta is_mkldnn is_neg is_nested is_quantized is_sparse "
        "is_sparse_csr itemsize layout names nbytes ndim nelement numel output_nr requires_grad "
        "requires_grad_ retains_grad shape size storage_offset untyped_storage"
    ).split()
)
_WRITING = frozenset(("__setitem__", "__delitem__", "share_memory_"))


class HoldsWeights(Protocol):
    """A stack that knows the weights of its linears, wherever they lie (`PrunedEncoder`)."""

    def plain(self, part: int, linear: int, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Rows:
    """The rows of a stack's linear, of its weight or its bias, in which a released parameter's values lie.

    part, linear: the number of the part (attention or FFN) and of the linear in it. name: of the parameter,
    "weight", "bias", or "weight_scale" where the weight is stored in int8."""

    stack: HoldsWeights
    part: int
    linear: int
    name: str
    first: int
    last: int

    def values(self) -> Tensor:
        """A copy of the values."""
        with torch.no_grad():
            return self.stack.plain(self.part, self.linear, self.name)[self.first : self.last].clone()


class ReleasedParameter(nn.Parameter):
    """A parameter that a stack has taken over.

    rows: where the stack has its values; until it is given back it has a shape then and no memory, and
    reading it makes a copy of its values, which is right and slow. None where it keeps its memory, because
    the stack reads the same or has made something else of it. Errors: RuntimeError where it is written to, or
    is to get a gradient."""

    rows: Rows | None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        is_property = name in ("__get__", "__set__", "__delete__")
        if is_property:
            name, sets = getattr(func.__self__, "__name__", ""), name != "__get__"  # type: ignore[attr-defined]
        else:
            written = [kwargs.get("out")]
            if name in _WRITING or _is_in_place(name):  # the others are read
                written.append(args[0] if args else kwargs)
            sets = any(map(_holds_one, written))
        with torch._C.DisableTorchFunctionSubclass():
            if name in ("requires_grad", "requires_grad_") and _is_asked(args[1:], kwargs, sets):
                raise RuntimeError(
                    "a weight that an optimised model has laid out for its kernels would get no gradient: "
                    "call pruned_ops.restore(model) before training"
                )
            if name in _METADATA:
                return func(*args, **kwargs)
            if sets:
                raise RuntimeError(
                    f"{name} would write to a weight that an optimised model has laid out for its kernels: "
                    "call pruned_ops.restore(model) first"
                )
            if is_property and name == "data":
                # What is written to `data` would be lost: torch refuses to write to an inference tensor.
                with torch.inference_mode():
                    return func(*_with_values(args)).clone()
            return func(*_with_values(args), **_with_values(kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> ReleasedParameter:
        if id(self) not in memo:
            rows = self.rows
            memo[id(self)] = (
                _kept(_memory(self).clone(), self.requires_grad)
                if rows is None
                else _released(copy.deepcopy(rows, memo), *_state(self))
            )
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.rows is None:
            return _kept, (_memory(self), self.requires_grad)
        return _released, (self.rows, *_state(self))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ReleasedParameter(shape={tuple(self.shape)}, dtype={self.dtype})"


def _holds_one(argument: Any) -> bool:
    """Whether a released parameter is this argument of an op, or is in it."""
    if isinstance(argument, dict):
        argument = [*argument.values()]
    return isinstance(argument, ReleasedParameter) or (
        isinstance(argument, (tuple, list)) and any(map(_holds_one, argument))
    )


def _is_asked(args: tuple[Any, ...], kwargs: Mapping[str, Any], sets: bool) -> bool:
    """Whether `requires_grad` is set to True, or `requires_grad_` is called so."""
    value = args[0] if args else kwargs.get("requires_grad", True)
    return sets and bool(value)


def _is_in_place(name: str) -> bool:
    if name.startswith("__"):
        return name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return name.endswith("_")


def _with_values(argument: Any) -> Any:
    """The argument with values in place of the released parameters in it."""
    if isinstance(argument, ReleasedParameter):
        rows = argument.__dict__.get("rows")
        return argument if rows is None else rows.values()  # another thread may just have given it back
    if isinstance(argument, (tuple, list)):
        return type(argument)(map(_with_values, argument))
    if isinstance(argument, dict):
        return {name: _with_values(value) for name, value in argument.items()}
    return argument


def _state(parameter: nn.Parameter) -> tuple[Any, ...]:
    return tuple(parameter.shape), parameter.dtype, parameter.device, parameter.requires_grad


def _released(rows: Rows, shape: Any, dtype: Any, device: Any, requires_grad: bool) -> ReleasedParameter:
    """A new released parameter, for copies and pickles."""
    parameter: Any = nn.Parameter(_nothing(shape, dtype, device), requires_grad)
    seal(parameter, rows)
    return parameter


def _kept(values: Tensor, requires_grad: bool) -> ReleasedParameter:
    """A new sealed parameter with memory of its own, for copies and pickles."""
    parameter: Any = nn.Parameter(values, requires_grad)
    seal(parameter, None)
    return parameter


def _memory(parameter: nn.Parameter) -> Tensor:
    """The memory of a sealed parameter that keeps it, as a plain tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.detach()


def _nothing(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this shape that holds one number that no weight has: NaN, or the lowest integer."""
    number = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full((1,), number, dtype=dtype, device=device).expand(shape)


def placeholder(parameter: Tensor) -> Tensor | None:
    """What takes the place of a parameter's memory; None where it has none."""
    if parameter.numel() == 0:
        return None  # torch.export cannot save a tensor expanded to no element
    with torch.inference_mode(parameter.is_inference()):  # `data` must not change that
        return _nothing(parameter.shape, parameter.dtype, parameter.device)


def seal(parameter: nn.Parameter, rows: Rows | None) -> None:
    """Let the parameter refuse writes, and read as `rows` from now on, or as itself where that is None. Its
    memory stays until `free` is called."""
    parameter.rows = rows  # type: ignore[attr-defined]
    parameter.__class__ = ReleasedParameter


def free(parameter: nn.Parameter, nothing: Tensor) -> bool:
    """Give a sealed parameter's memory up for a placeholder.

    False, and nothing is done, where an op that runs in another thread or an autograd graph still reads it.
    As the parameter is sealed, no op can begin to do so."""
    with torch._C.DisableTorchFunctionSubclass():
        if parameter._use_count() > 1:  # type: ignore[attr-defined]
            return False
        parameter.data = nothing
    return True


def unseal(parameter: nn.Parameter, values: Tensor | None) -> None:
    """Give a sealed parameter its memory back. values: None where it still has it. Nothing is allocated."""
    with torch._C.DisableTorchFunctionSubclass():
        if values is not None:
            parameter.data = values
        parameter.__class__ = nn.Parameter
        parameter.__dict__.pop("rows", None)


def freed_values(parameter: ReleasedParameter) -> Tensor | None:
    """The values that a freed parameter has to be given back; None for one that keeps its memory."""
    if parameter.rows is None:
        return None
    with torch.inference_mode(parameter.is_inference()):  # `data` must not change that
        return parameter.rows.values()
