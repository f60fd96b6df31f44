"""An op has one schema, one reference and several backends; this module picks the backend and says which ran.

With no preference the first willing backend runs, else the reference. Inside `use_backend(name)` that
backend runs, or raises an error with its reason. `record()` tells which backend ran each op, so that no
fallback is silent.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

REFERENCE = "reference"

_library = torch.library.Library("pruned_ops", "DEF")
_preferred: ContextVar[str | None] = ContextVar("pruned_ops_preferred", default=None)
_debugging: ContextVar[bool] = ContextVar("pruned_ops_debugging", default=False)
_given_up: ContextVar[Tensor | None] = ContextVar("pruned_ops_given_up", default=None)
_recorded: ContextVar[dict[str, Counter[str]] | None] = ContextVar("pruned_ops_recorded", default=None)


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run; the message says why and what would help."""


class KernelError(Exception):
    """A launcher's kernel cannot be compiled or loaded. Nothing was written, so another backend may run."""


@dataclass(frozen=True)
class Backend:
    """A way to run ops.

    missing: None if it can run here, else the reason why it cannot and the command that would help.
    on_demand: it runs only where it is asked for by name (an interpreter, say).
    tune: times its kernels on a GPU for the shapes of a model and remembers the fastest; (ModelShape, batches
    of lengths, dtype, device, gated=, norm_first=) -> the number of shapes that it timed. gated, norm_first:
    whether the model's FFNs are gated, and whether its LayerNorms come first.
    """

    name: str
    missing: str | None
    description: str
    on_demand: bool = False
    tune: Callable[..., int] | None = None


@dataclass(frozen=True)
class Kernel:
    """How one backend runs one op.

    launch and refuse take the op's arguments. refuse returns None if the kernel takes them, else a sentence
    that says why it does not.
    """

    backend: Backend
    launch: Callable[..., Tensor]
    refuse: Callable[..., str | None]


BACKENDS: dict[str, Backend] = {}
OPS: dict[str, Op] = {}


class Op:
    """An op in the namespace `pruned_ops` of torch.ops, defined by its reference.

    tightened takes the op's arguments, on CPU tensors whose values are good, and returns them with sizes that
    are no larger than the values need.
    check_values takes the op's arguments and raises an error for bad values (an id outside its table, say).
    It is apart from the reference, which must stay traceable, and runs before it on CPU tensors; backends
    check values themselves.
    """

    def __init__(
        self,
        reference: Callable[..., Tensor],
        check_values: Callable[..., None] | None = None,
        tightened: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.check_values = check_values
        self.tightened = tightened
        self.kernels: dict[str, Kernel] = {}
        self._warned: set[tuple[str, str]] = set()
        self.__doc__ = reference.__doc__
        schema = torch.library.infer_schema(reference, mutates_args=())
        _library.define(f"{self.name}{schema}")
        self.overload = getattr(torch.ops.pruned_ops, self.name).default
        _library.impl(self.name, self._dispatch, "CompositeExplicitAutograd")
        _library.impl(self.name, self._run_without_gradient, "Autograd")
        torch.library.register_fake(f"pruned_ops::{self.name}", reference, lib=_library)
        OPS[self.name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.overload(*args, **kwargs)

    def _run_without_gradient(self, *args: Any) -> Tensor:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_of(args)):
            raise RuntimeError(
                f"pruned_ops.{self.name} is inference-only and was asked for a gradient: call it under "
                "torch.no_grad(), or train with the padded model (pruned_ops.restore undoes optimize)"
            )
        if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors_of(args))):
            raise RuntimeError(
                f"pruned_ops.{self.name} is inference-only and was asked for a forward-mode derivative: "
                "compute it with the padded model (pruned_ops.restore undoes optimize)"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    def _dispatch(self, *args: Any) -> Tensor:
        failed: list[str] = []
        while True:
            kernel = self.select(*args, without=failed)
            name = kernel.backend.name if kernel else REFERENCE
            try:
                output = self._run(kernel, *args)
            except KernelError as error:
                if _preferred.get() is not None:
                    raise BackendError(f"backend {name!r} cannot run {self.name}: {error}") from error
                self._warn_once(name, str(error))
                failed.append(name)
                continue
            recorded = _recorded.get()
            if recorded is not None:
                recorded.setdefault(self.name, Counter())[name] += 1
            return output

    def _warn_once(self, backend: str, error: str) -> None:
        if (backend, error) not in self._warned:
            self._warned.add((backend, error))
            warnings.warn(
                f"backend {backend!r} failed to run {self.name}, and the next one does: {error}",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip

    def _run(self, kernel: Kernel | None, *args: Any) -> Tensor:
        if _debugging.get():
            return self._debugged(kernel, *args)
        if kernel is not None:
            return kernel.launch(*args)
        if self.check_values is not None and args[0].device.type == "cpu":
            self.check_values(*args)
            if self.tightened is not None:
                args = self.tightened(*args)
        return self.reference(*args)

    def _debugged(self, kernel: Kernel | None, *args: Any) -> Tensor:
        """Run the op with its values checked, and wait for the device before and after it, so that an error
        that is raised here is this op's."""
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

    def select(self, *args: Any, without: Collection[str] = ()) -> Kernel | None:
        """The kernel that is to run these arguments; None means the reference. BackendError if a backend was
        asked for by name that cannot run them. without: backends that have failed to."""
        preferred = _preferred.get()
        if preferred == REFERENCE:
            return None
        if preferred is not None:
            return self._demand(preferred, args)
        for kernel in self.kernels.values():
            backend = kernel.backend
            if backend.name in without:
                continue
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
        """One line that says of every backend of this op whether it would run these arguments."""
        parts = [
            f"{name}: {kernel.backend.missing or kernel.refuse(*args) or 'willing'}"
            for name, kernel in self.kernels.items()
        ]
        return "; ".join([*parts, f"{REFERENCE}: willing"])


def add_backend(backend: Backend) -> Backend:
    """Make a backend known by its name, even if it cannot run here."""
    BACKENDS[backend.name] = backend
    return backend


def register(
    op: Op, backend: Backend, launch: Callable[..., Tensor], refuse: Callable[..., str | None]
) -> None:
    """Let `backend` run `op`. Backends are asked in the order in which they were registered."""
    op.kernels[backend.name] = Kernel(backend, launch, refuse)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op of this thread on this backend ("reference", "cpu", ...) inside the block, or raise
    BackendError where it cannot."""
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
    """Check ids and cu_seqlens on every backend and wait for each op inside the block, in this thread, so
    that errors name the op. This is slow. Without it GPU backends clamp values, and never read outside."""
    token = _debugging.set(True)
    try:
        yield
    finally:
        _debugging.reset(token)


@contextmanager
def given_up(tensor: Tensor) -> Iterator[None]:
    """Let the ops write into this tensor inside the block, in this thread: the caller does not read it again.
    What they leave in it means nothing."""
    token = _given_up.set(tensor)
    try:
        yield
    finally:
        _given_up.reset(token)


def is_given_up(tensor: Tensor) -> bool:
    """Whether the caller has given this very tensor up."""
    return tensor is _given_up.get()


@contextmanager
def record() -> Iterator[dict[str, Counter[str]]]:
    """Count which backends ran each op of this thread inside the block: op name -> Counter of backend
    names."""
    ran: dict[str, Counter[str]] = {}
    token = _recorded.set(ran)
    try:
        yield ran
    finally:
        _recorded.reset(token)


def is_watched() -> bool:
    """Whether this thread asks for a backend or debugs, so that every op must be dispatched by itself."""
    return _preferred.get() is not None or _debugging.get()


def replayed(ran: dict[str, Counter[str]]) -> None:
    """Count the ops of a recorded run (op name -> backend counts) that is launched again as a whole."""
    recorded = _recorded.get()
    if recorded is not None:
        for op, counts in ran.items():
            recorded.setdefault(op, Counter()).update(counts)


def backends_of(run: Callable[[], Any]) -> dict[str, str]:
    """Call `run` and tell which backend ran each op: op name -> backend name, or several with commas."""
    with torch.inference_mode(), record() as ran:
        run()
    return {op: ", ".join(sorted(counts)) for op, counts in ran.items()}


def _has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation carries a derivative along with this tensor."""
    return forward_ad.unpack_dual(tensor).tangent is not None


def tensors_of(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an op's arguments, including those in lists."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from tensors_of(arg)


def _wait(*tensors: Tensor) -> None:
    """Wait until the GPUs of these tensors are idle; errors of earlier work are raised here."""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)
