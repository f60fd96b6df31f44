"""A counter of the rows that enter linear layers, and a model of somebody's own around an encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class RowCounter(TorchDispatchMode):
    """Counts the rows that enter each linear layer, in torch's own GEMMs and in the ops that hold one."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("linear_gelu", "linear_add_layer_norm", "mm", "addmm", "linear", "bmm"):
            x = args[1] if name == "addmm" else args[0]
            self.rows.append((name, x.numel() // x.size(-1) if x.size(-1) else x.size(0)))
        if name == "encoder":  # one call: two linear layers in each of its parts
            self.rows += [(name, args[0].size(0))] * 2 * len(args[4])
        return func(*args, **(kwargs or {}))


class CustomHead(nn.Module):
    """A model of somebody's own with an encoder deep inside."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"encoder": encoder})
        self.head = nn.Linear(64, 3)

    def forward(self, **batch: Tensor) -> Tensor:
        return self.head(self.inner["encoder"](**batch).last_hidden_state[:, 0])
