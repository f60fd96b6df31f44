"""What is done once and what is shared where a run has several processes (torchrun, accelerate launch).

With one process all of this is a plain call. The processes meet in Accelerate's PartialState.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce

T = TypeVar("T")


def state() -> PartialState:
    """This process among the others; joins them at the first call."""
    # Without `cpu` it would see one process only where there is no accelerator.
    return PartialState(cpu=not torch.cuda.is_available())


def leave() -> None:
    """Part from the others once all are here. A process that simply ends while another still works may abort
    in its communication's threads, and torchrun then ends the other, too."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        state().wait_for_everyone()
        torch.distributed.destroy_process_group()


def is_main() -> bool:
    """Whether this process writes files and speaks to the user."""
    return state().is_main_process


def world_size() -> int:
    return state().num_processes


def per_process(batch_size: int) -> int:
    """This process's share of a batch; ValueError where the processes cannot share it evenly."""
    if batch_size % world_size():
        raise ValueError(f"a batch of {batch_size} cannot be shared by {world_size()} processes evenly")
    return batch_size // world_size()


def once(work: Callable[[], T]) -> T:
    """Do this on the main process alone, and give its result, or its error, to all."""
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome = [work(), None]
        except Exception as error:
            outcome = [None, error]
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_any(flag: bool) -> bool:
    """Whether the flag is set on any process; every process calls this at the same point."""
    if world_size() == 1:
        return flag
    return bool(reduce(torch.tensor(float(flag), device=state().device), "sum") > 0)


def shared(work: Callable[[Sequence[T]], Sequence[Any]], items: Sequence[T]) -> list[Any]:
    """work(items), an item's result each, with the items dealt out to the processes; all get all results."""
    number, processes = state().process_index, world_size()
    if processes == 1:
        return list(work(items))
    mine = range(number, len(items), processes)
    found = gather_object(list(zip(mine, work([items[i] for i in mine]), strict=True)))
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]


def say(text: str) -> None:
    """A line on what begins now."""
    if is_main():
        print(f"-- {text}", flush=True)
