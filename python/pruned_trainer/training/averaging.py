"""The mean of a model's weights over the last steps of its training, which may score better than the last
weights do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

FILE = "average.safetensors"


class WeightAverage(TrainerCallback):
    """The mean of the trained weights after each step past step `start`, on every process alike.

    A checkpoint has it in a file of its own, so that a resumed training comes to the same mean.
    """

    def __init__(self, start: int) -> None:
        self.start, self._means = start, dict[str, Tensor]()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        number = state.global_step - self.start
        if number < 1:
            return
        for name, parameter in trained(model):
            if number == 1:
                self._means[name] = parameter.detach().clone()
            else:
                self._means[name].lerp_(parameter.detach(), 1 / number)

    def save(self, checkpoint: Path) -> None:
        """Write the mean into a checkpoint; nothing where no step has counted yet."""
        if self._means:
            save_file(self._means, checkpoint / FILE)

    def load(self, checkpoint: Path, device: torch.device) -> None:
        """Take the mean up again as `save` wrote it."""
        file = checkpoint / FILE
        means = load_file(file) if file.is_file() else {}
        self._means = {name: mean.to(device) for name, mean in means.items()}

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the mean inside the block, and its own weights after it."""
        own_weights = {
            name: weight.detach().clone() for name, weight in trained(model) if name in self._means
        }
        self.keep(model)
        try:
            yield
        finally:
            _put(model, own_weights)

    def keep(self, model: nn.Module) -> None:
        """Give the model the mean for good; nothing where no step has counted."""
        _put(model, self._means)


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that train, with their names."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@torch.no_grad()
def _put(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy the weights into the model's parameters of these names. What only the training needed (a
    projection of hidden states) is gone by then."""
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        if name in parameters:
            parameters[name].copy_(weight)
