"""Work that is done once, and work that is shared, where a run has several processes (torchrun, accelerate
launch).

With one process all of it is a plain call. The processes meet in Accelerate's PartialState.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce

T = TypeVar("T")
R = TypeVar("R")


def state() -> PartialState:
    """The state of this process among the others; the first call joins them."""
    # Without `cpu`, where there is no accelerator, it would see a single process.
    return PartialState(cpu=not torch.cuda.is_available())


def leave() -> None:
    """Wait for the other processes, and part from them.

    A process that simply ends while another still works may abort in its communication's threads, and
    torchrun then ends the other one, too.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        state().wait_for_everyone()
        torch.distributed.destroy_process_group()


def is_main() -> bool:
    """Whether this process writes files and speaks to the user."""
    return state().is_main_process


def world_size() -> int:
    """The number of processes."""
    return state().num_processes


def per_process(batch_size: int) -> int:
    """This process's share of a batch; ValueError where the processes cannot share it evenly."""
    if batch_size % world_size():
        raise ValueError(f"a batch of {batch_size} cannot be shared by {world_size()} processes evenly")
    return batch_size // world_size()


def once(work: Callable[[], T]) -> T:
    """Do this on the main process alone, and give its result, or raise its error, on all."""
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


def shared(work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R]:
    """The results of work(items), one for each item, with the items dealt out to the processes; all get all
    results."""
    rank, processes = state().process_index, world_size()
    if processes == 1:
        return list(work(items))
    numbers = range(rank, len(items), processes)
    results = gather_object(list(zip(numbers, work([items[i] for i in numbers]), strict=True)))
    return [result for _, result in sorted(results, key=lambda pair: pair[0])]


def say(text: str) -> None:
    """Print a line about the work that begins now."""
    if is_main():
        print(f"-- {text}", flush=True)
