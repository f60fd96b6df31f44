"""The modules inside an optimised encoder. The encoder computes in their place, so a change of one of them
would have no effect, and is refused.

A replaced module stays the object that it is and can be read and called. `replace` changes its class to one
that looks at what is set in it, and `give_back` changes it back, so that no forward has to look for changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import nn

from pruned_ops.models.stock import projection_of
from pruned_ops.runtime.refusals import WITHOUT_EFFECT, is_harmless, is_method

_MISSING = object()
_DICTIONARIES = ("_parameters", "_modules")


def raise_on_change(kind: type[nn.Module], change: str) -> NoReturn:
    """Raise RuntimeError for a change of a replaced module of this class."""
    raise RuntimeError(
        f"{change} of this {kind.__name__} would change nothing in an optimised model, which computes for "
        "it: call pruned_ops.restore(model) first, and pruned_ops.optimize(model) after the change"
    )


class ReplacedModule(nn.Module):
    """The part of a replaced module's class that comes before its own class.

    Errors: RuntimeError for a hook, a submodule, a parameter, a method or a setting that is set in it."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_used = name == "__class__" or is_method(type(self), name) or isinstance(value, nn.Module)
        if is_used or not _is_read(self) and (isinstance(value, nn.Parameter) or _is_setting(self, name)):
            if getattr(self, name, _MISSING) is not value:
                raise_on_change(type(self), f"another {name}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if (
            name in self._modules
            or not _is_read(self)
            and (name in self._parameters or _is_setting(self, name))
        ):
            raise_on_change(type(self), f"a missing {name}")
        super().__delattr__(name)

    def register_forward_hook(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not is_harmless(hook):
            raise_on_change(type(self), "a forward hook")
        return super().register_forward_hook(hook, *args, **kwargs)

    def register_forward_pre_hook(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not is_harmless(hook):
            raise_on_change(type(self), "a forward hook")
        return super().register_forward_pre_hook(hook, *args, **kwargs)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if self._modules.get(name, _MISSING) is not module:
            raise_on_change(type(self), f"another {name}")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if not _is_read(self):
            if self._parameters.get(name, _MISSING) is not param:
                raise_on_change(type(self), f"another {name}")
            return
        super().register_parameter(name, param)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _copied, (_plain(type(self)),), self.__dict__


def _is_read(module: nn.Module) -> bool:
    """Whether this is one of `_read_modules`, whose settings are read at every forward, too."""
    return not isinstance(module._parameters, _Entries)


def _is_setting(module: nn.Module, name: str) -> bool:
    """Whether this is an attribute that the module computes with."""
    return name in module.__dict__ and not name.startswith("_") and name not in WITHOUT_EFFECT


def _is_traced(*values: Any) -> bool:
    """Whether tracing puts a tensor without values in, or takes it out again."""
    from torch._subclasses.fake_tensor import is_fake  # slow to import, and seldom needed

    return any(map(is_fake, values))


class _Entries(dict[str, Any]):
    """A replaced module's parameters or submodules: others are refused, also from code that goes past the
    module's own methods, as `torch.func.functional_call` does."""

    def __init__(self, entries: dict[str, Any], owner: type[nn.Module]) -> None:
        super().__init__(entries)
        self.owner = owner

    def __setitem__(self, name: str, value: Any) -> None:
        present = self.get(name, _MISSING)
        if value is not present and not _is_traced(value, present):
            raise_on_change(self.owner, f"another {name}")
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        raise_on_change(self.owner, f"a missing {name}")

    def pop(self, name: str, *default: Any) -> Any:
        raise_on_change(self.owner, f"a missing {name}")

    def clear(self) -> None:
        raise_on_change(self.owner, "an end")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Entries, (dict(self), self.owner)


_REPLACED: dict[type[nn.Module], type[nn.Module]] = {}


def _replaced(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of the replaced modules of a class. It bears that class's own name."""
    if kind not in _REPLACED:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        _REPLACED[kind] = type(kind.__name__, (ReplacedModule, kind), names)
    return _REPLACED[kind]


def _plain(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a replaced module had."""
    return next(base for base in kind.__mro__[1:] if base is not ReplacedModule)


def _copied(kind: type[nn.Module]) -> nn.Module:
    """A replaced module without its state, for copies and pickles."""
    replaced = _replaced(kind)
    return replaced.__new__(replaced)


def replaced_modules(encoder: nn.Module) -> Iterator[nn.Module]:
    """The modules of an encoder that do not run while it is optimised: all but itself and its pooler."""
    for name, module in encoder.named_modules():
        if name and name.partition(".")[0] != "pooler":
            yield module


def _read_modules(encoder: Any) -> set[nn.Module]:
    """The modules of an encoder whose parameters are read at every forward while it is optimised."""
    roots = (encoder.embeddings, projection_of(encoder), getattr(encoder, "pooler", None))
    return {module for root in roots if root is not None for module in root.modules()}


def replaced_parameters(encoder: nn.Module) -> list[nn.Parameter]:
    """The parameters of an encoder that are not read while it is optimised, each once: its stack has their
    values, or what it has made of them."""
    read = _read_modules(encoder)
    alive = {parameter for module in read for parameter in module._parameters.values()}
    computed = (module for module in replaced_modules(encoder) if module not in read)
    parameters = (parameter for module in computed for parameter in module._parameters.values())
    return list(dict.fromkeys(p for p in parameters if p is not None and p not in alive))


def replace(encoder: nn.Module) -> None:
    """Refuse changes of the encoder's modules from now on."""
    read = _read_modules(encoder)
    for module in replaced_modules(encoder):
        if not isinstance(module, ReplacedModule):
            if module not in read:
                for name in _DICTIONARIES:
                    module.__dict__[name] = _Entries(module.__dict__[name], type(module))
            module.__class__ = _replaced(type(module))


def give_back(encoder: nn.Module) -> None:
    """Undo `replace`."""
    for module in replaced_modules(encoder):
        if isinstance(module, ReplacedModule):
            object.__setattr__(module, "__class__", _plain(type(module)))
            for name in _DICTIONARIES:
                if isinstance(module.__dict__[name], _Entries):
                    module.__dict__[name] = dict(module.__dict__[name])


def forwards_of(encoder: nn.Module) -> list[tuple[type[nn.Module], Any]]:
    """The classes of an encoder's modules, each with its forward."""
    kinds = dict.fromkeys(type(module) for module in replaced_modules(encoder))
    return [(kind, kind.forward) for kind in kinds]
