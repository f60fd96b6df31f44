"""The nodes of an ONNX graph in the making, and the activations in ONNX's plain operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor


class Nodes:
    """The nodes and constants of a graph in the making. Every value has a name, which methods take and
    return."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def add(self, operator: str, *inputs: str, called: str | None = None, **attributes: Any) -> str:
        """Add a node with one output; returns the output's name."""
        name = called or f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def halves(self, x: str) -> tuple[str, str]:
        """Add a Split of the last axis into two halves."""
        name = f"Split_{len(self.nodes)}"
        outputs = f"{name}_first", f"{name}_second"
        self.nodes.append(helper.make_node("Split", [x], outputs, name=name, axis=-1))
        return outputs

    def _keep(self, name: str, array: Any) -> str:
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def constant(self, value: float) -> str:
        """Add one number, as int64 or fp32."""
        dtype = np.int64 if isinstance(value, int) else np.float32
        return self._keep(f"constant_{value}", np.array(value, dtype))

    def vector(self, *values: int) -> str:
        """Add axes or sizes, as int64."""
        return self._keep(f"vector_{'_'.join(map(str, values))}", np.array(values, np.int64))

    def weight(self, name: str, tensor: Tensor) -> str:
        """Add a tensor, under its own name."""
        return self._keep(name, np.ascontiguousarray(tensor.detach().cpu().numpy()))

    def product(
        self, x: str, name: str, weight: Tensor, bias: Tensor | None, called: str | None = None
    ) -> str:
        """Add the product of x and weight (out, in), and the bias (out,) where there is one."""
        transposed = self.weight(f"{name}.weight", weight.T)
        if bias is None:
            return self.add("MatMul", x, transposed, called=called)
        return self.add(
            "Add", self.add("MatMul", x, transposed), self.weight(f"{name}.bias", bias), called=called
        )

    def linear(self, x: str, name: str, module: Any, called: str | None = None) -> str:
        """Add a Linear with its weights."""
        return self.product(x, name, module.weight, module.bias, called)

    def norm(self, x: str, name: str, module: Any) -> str:
        """Add a LayerNorm with its weights. A bias that it lacks is 0, because ONNX Runtime's optimizer reads
        one."""
        bias = torch.zeros_like(module.weight) if module.bias is None else module.bias
        weights = self.weight(f"{name}.weight", module.weight), self.weight(f"{name}.bias", bias)
        return self.add("LayerNormalization", x, *weights, axis=-1, epsilon=module.eps)

    def activation(self, name: str, x: str) -> str:
        """Add an activation by the name that configs have for it. Errors: ValueError for one that is not
        known."""
        if name not in _ACTIVATIONS:
            raise ValueError(f"the activation {name!r} cannot be exported: {', '.join(_ACTIVATIONS)} can")
        return _ACTIVATIONS[name](self, x)

    def real(self, x: str) -> str:
        """Add a Cast to fp32."""
        return self.add("Cast", x, to=TensorProto.FLOAT)

    def whole(self, x: str) -> str:
        """Add a Cast to int64."""
        return self.add("Cast", x, to=TensorProto.INT64)


def _gelu(nodes: Nodes, x: str) -> str:
    erf = nodes.add("Erf", nodes.add("Div", x, nodes.constant(math.sqrt(2.0))))
    return nodes.add(
        "Mul", nodes.add("Mul", x, nodes.add("Add", erf, nodes.constant(1.0))), nodes.constant(0.5)
    )


def _gelu_new(nodes: Nodes, x: str) -> str:
    cubed = nodes.add("Mul", nodes.add("Pow", x, nodes.constant(3.0)), nodes.constant(0.044715))
    inner = nodes.add("Mul", nodes.add("Add", x, cubed), nodes.constant(math.sqrt(2.0 / math.pi)))
    tanh = nodes.add("Add", nodes.add("Tanh", inner), nodes.constant(1.0))
    return nodes.add("Mul", nodes.add("Mul", x, nodes.constant(0.5)), tanh)


# The activations that `optimize` takes, and those of heads, by the config's names.
_ACTIVATIONS: dict[str, Callable[[Nodes, str], str]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_new,
    "relu": lambda nodes, x: nodes.add("Relu", x),
    "silu": lambda nodes, x: nodes.add("Mul", x, nodes.add("Sigmoid", x)),
    "tanh": lambda nodes, x: nodes.add("Tanh", x),
}
