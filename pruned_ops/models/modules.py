"""What the padded models build their modules with."""

from __future__ import annotations

from torch import nn


def put(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Add a module under a dotted name, in ModuleDicts that are made where they are not there; returns it."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.ModuleDict())
        root = root.get_submodule(part)
    root.add_module(last, module)
    return module
