"""What the padded models build their modules with."""

from __future__ import annotations

from typing import Any

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


def dropout_of(config: Any, name: str | None) -> nn.Module:
    """The dropout of which a config's field, by BERT's name for it, says how much; nothing where the family
    has no such field."""
    return nn.Identity() if name is None else nn.Dropout(config.family.dropout(config, name))
