"""An op has one schema, one reference and several backends; this module picks the backend and says which ran.

With no preference the first willing backend runs, else the reference. Inside `use_backend(name)` that
backend runs or raises with its reason. `record()` tells which backend ran each op, so no fallback is silent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

REFERENCE = "reference"

_library = torch.library.Library("pruned_ops", "DEF")
_preferred: ContextVar[str | None] = ContextVar("pruned_ops_preferred", default=None)
_debugging: ContextVar[bool] = ContextVar("pruned_ops_debugging", default=False)
_recorded: ContextVar[dict[str, Counter[str]] | None] = ContextVar("pruned_ops_recorded", default=None)


class BackendError(RuntimeError):
    """A backend that was asked for cannot run; the text says why and what would help."""


@dataclass(frozen=True)
class Backend:
    """A way to run ops. `missing` is None where it can run here, else why not and the command that would
    help. on_demand: it runs only where it is asked for (an interpreter, say). tune: times its kernels on a
    GPU for a model's shapes, once: (ModelShape, batches of lengths, dtype, device) -> how many it timed."""

    name: str
    missing: str | None
    description: str
    on_demand: bool = False
    tune: Callable[..., int] | None = None


@dataclass(frozen=True)
class Kernel:
    """One backend's way to run one op. `refuse` gets the op's arguments: None, or a sentence that says why
    not."""

    backend: Backend
    launch: Callable[..., Tensor]
    refuse: Callable[..., str | None]


BACKENDS: dict[str, Backend] = {}
OPS: dict[str, Op] = {}


class Op:
    """An op of the `pruned_ops` namespace of torch.ops, defined by its reference.

    `check_values` gets the op's arguments where the reference runs on CPU tensors and raises on bad values
    (ids out of their table, say): the reference itself must stay traceable. Backends check for themselves.
    """

    def __init__(
        self, reference: Callable[..., Tensor], check_values: Callable[..., None] | None = None
    ) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.check_values = check_values
        self.kernels: dict[str, Kernel] = {}
        self.__doc__ = reference.__doc__
        schema = torch.library.infer_schema(reference, mutates_args=())
        _library.define(f"{self.name}{schema}")
        self.overload = getattr(torch.ops.pruned_ops, self.name).default
        _library.impl(self.name, self._dispatch, "CompositeExplicitAutograd")
        _library.impl(self.name, self._refuse_gradient, "Autograd")
        torch.library.register_fake(f"pruned_ops::{self.name}", reference, lib=_library)
        OPS[self.name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.overload(*args, **kwargs)

    def _refuse_gradient(self, *args: Any) -> Tensor:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_of(args)):
            raise RuntimeError(
                f"pruned_ops.{self.name} is inference-only and was asked for a gradient: call it under "
                "torch.no_grad(), or train with the padded model (pruned_ops.restore undoes optimize)"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    def _dispatch(self, *args: Any) -> Tensor:
        kernel = self.select(*args)
        recorded = _recorded.get()
        if recorded is not None:
            recorded.setdefault(self.name, Counter())[kernel.backend.name if kernel else REFERENCE] += 1
        if _debugging.get():
            return self._debugged(kernel, *args)
        if kernel is not None:
            return kernel.launch(*args)
        if self.check_values is not None and args[0].device.type == "cpu":
            self.check_values(*args)
        return self.reference(*args)

    def _debugged(self, kernel: Kernel | None, *args: Any) -> Tensor:
        """With values checked first, and the device waited for before and after, so that an error is this
        op's."""
        name = f"{self.name} on {kernel.backend.name if kernel else REFERENCE}"
        try:
            _wait(*tensors_of(args))
        except RuntimeError as error:
            raise RuntimeError(f"before {name} began: {error}") from error
        if self.check_values is not None:
            self.check_values(*args)
        try:
            output = kernel.launch(*args) if kernel else self.reference(*args)
            _wait(output)
        except RuntimeError as error:
            raise RuntimeError(f"{name}: {error}") from error
        return output

    def can_run_preferred(self) -> bool:
        """True unless a backend was asked for by name that lacks this op.

        Code that is being traced answers True: which backend is asked for is known only when it runs, and the
        op then refuses by itself."""
        if torch.compiler.is_compiling():
            return True
        return _preferred.get() in (None, REFERENCE, *self.kernels)

    def select(self, *args: Any) -> Kernel | None:
        """The kernel that runs these arguments, None for the reference. BackendError if one asked for
        cannot."""
        preferred = _preferred.get()
        if preferred == REFERENCE:
            return None
        if preferred is not None:
            return self._demand(preferred, args)
        for kernel in self.kernels.values():
            backend = kernel.backend
            if backend.missing is None and not backend.on_demand and kernel.refuse(*args) is None:
                return kernel
        return None

    def _demand(self, name: str, args: tuple[Any, ...]) -> Kernel:
        kernel = self.kernels.get(name)
        if kernel is None:
            raise BackendError(f"backend {name!r} has no {self.name}. {self.reasons(*args)}")
        reason = kernel.backend.missing or kernel.refuse(*args)
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot run {self.name}: {reason}")
        return kernel

    def reasons(self, *args: Any) -> str:
        """Every backend of this op with its readiness for these arguments, in one line."""
        parts = [
            f"{name}: {kernel.backend.missing or kernel.refuse(*args) or 'willing'}"
            for name, kernel in self.kernels.items()
        ]
        return "; ".join([*parts, f"{REFERENCE}: willing"])


def is_watched() -> bool:
    """Whether this thread asks for a backend, or debugs: then every op is to be dispatched by itself."""
    return _preferred.get() is not None or _debugging.get()


def replayed(ran: dict[str, Counter[str]]) -> None:
    """Count ops that ran before and are launched again as a whole."""
    recorded = _recorded.get()
    if recorded is not None:
        for op, counts in ran.items():
            recorded.setdefault(op, Counter()).update(counts)


def tensors_of(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an op's arguments, those in lists included."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from tensors_of(arg)


def _wait(*tensors: Tensor) -> None:
    """Until the GPU that they are on has done what it was given; errors of that are raised here."""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)


def register(
    op: Op, backend: Backend, launch: Callable[..., Tensor], refuse: Callable[..., str | None]
) -> None:
    """Give `op` another way to run. Backends are asked in the order in which they were registered."""
    op.kernels[backend.name] = Kernel(backend, launch, refuse)


def add_backend(backend: Backend) -> Backend:
    """Make a backend known by its name, whether it can run here or not."""
    BACKENDS[backend.name] = backend
    return backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on this backend ("reference", "cpu", ...) inside the block, in this thread; BackendError
    where it cannot."""
    if name != REFERENCE and name not in BACKENDS:
        raise BackendError(
            f"there is no backend {name!r}; this version has {', '.join([REFERENCE, *BACKENDS])}"
        )
    missing = BACKENDS[name].missing if name in BACKENDS else None
    if missing is not None:
        raise BackendError(f"backend {name!r} is not available: {missing}")
    token = _preferred.set(name)
    try:
        yield
    finally:
        _preferred.reset(token)


@contextmanager
def debug() -> Iterator[None]:
    """Check the values of ids and cu_seqlens on every backend inside the block, in this thread, and wait for
    each op: errors name the op. Slow; without it GPU backends clamp values, and never read outside."""
    token = _debugging.set(True)
    try:
        yield
    finally:
        _debugging.reset(token)


@contextmanager
def record() -> Iterator[dict[str, Counter[str]]]:
    """Count which backend ran each op inside the block, in this thread: op name -> Counter of backend
    names."""
    ran: dict[str, Counter[str]] = {}
    token = _recorded.set(ran)
    try:
        yield ran
    finally:
        _recorded.reset(token)


def backends_of(run: Callable[[], Any]) -> dict[str, str]:
    """op -> the backend that ran it in `run`; several, with commas, where it was not one."""
    with torch.inference_mode(), record() as ran:
        run()
    return {op: ", ".join(sorted(counts)) for op, counts in ran.items()}
