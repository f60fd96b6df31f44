"""A stand-in for CUDA graphs on the CPU, and models that run by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import pruned_ops
from pruned_ops.runtime.engine import Engine
from pruned_ops.runtime.packed_heads import Outputs


class StandIn:
    """Records work as a graph does: it runs on the same inputs, into the same output, once more a replay.

    Between replays the output holds NaN, as memory that other graphs of the pool may write."""

    def __init__(self, fail_after: int | None = None, error: Exception | None = None) -> None:
        self.recorded, self.fail_after, self.inside, self.waited = 0, fail_after, 0, 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")

    def record(self, work: Callable[[], Outputs]) -> Callable[[], Outputs]:
        if self.recorded == self.fail_after:
            raise self.error
        self.recorded += 1
        outputs = Outputs(*(None if one is None else torch.full_like(one, torch.nan) for one in work()))

        def replay() -> Outputs:
            for output, found in zip(outputs, work(), strict=True):
                if output is not None:
                    output.copy_(found)
            self.outputs = outputs
            return outputs

        return replay

    @contextmanager
    def ordered(self) -> Iterator[None]:
        self.inside += 1
        assert self.inside == 1, "two graphs of one pool run at once"
        yield
        for output in self.outputs:
            if output is not None:
                output.fill_(torch.nan)
        self.inside -= 1

    def wait(self) -> None:
        self.waited += 1


def with_engine(model: Any, **settings: Any) -> tuple[Any, Engine]:
    """The optimised model with an engine that runs on the CPU."""
    fast = pruned_ops.optimize(model)
    settings.setdefault("recorder", StandIn())
    engine = Engine(fast.base_model.packed, **settings)
    fast.base_model.packed.engine = fast.engine = engine
    return fast, engine


def ids_of(lengths: Sequence[int], seed: int = 0) -> dict[str, Tensor]:
    """A padded batch of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    mask = (torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 90, mask.shape, generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask}
