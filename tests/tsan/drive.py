"""Runs the extension's operations on several threads, and from several threads at once, for `make tsan`.

The extension is a build of its own, whose every access to memory is watched (`setup.py`, std_threads.h).
torch and Python are not watched: what is looked for are races in our C++. A race ends the process.
Results must be those of one thread, bit for bit. First a process with a planted race has to be found out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from torch import Tensor

from inputs import arguments_for, attention_arguments, encoder_arguments
from pruned_ops.ops.registry import OPS, use_backend

PLANT = "PRUNED_OPS_PLANT_RACE"
FOUND = 66  # the status of a process that ThreadSanitizer ended
THREADS, CALLERS, ROUNDS = 4, 3, 2


def work() -> dict[str, Callable[[], Tensor]]:
    """A call of each operation that has threads, large enough to be shared among them. Lengths are mixed, and
    of blocks of keys there are several."""
    calls: dict[str, tuple[str, list[object]]] = {
        "attention": ("attention", attention_arguments((600, 1, 0, 77, 250), 2, 32)),
        "encoder": ("encoder", encoder_arguments(700, 64, 96, seed=0)),
        "encoder of one token": ("encoder", encoder_arguments(1, 64, 96, seed=0)),
        **{op: (op, arguments_for(op, tokens=900)) for op in ("add_layer_norm", "embed_layer_norm")},
    }
    return {name: lambda op=op, given=given: OPS[op](*given) for name, (op, given) in calls.items()}  # type: ignore[misc]


def run_all(calls: dict[str, Callable[[], Tensor]], expected: dict[str, Tensor]) -> None:
    with torch.inference_mode(), use_backend("cpu"):
        for name, call in calls.items():
            found = call()
            assert torch.equal(found, expected[name]), f"{name} depends on its threads"


def main() -> None:
    if PLANT not in os.environ:
        control = subprocess.run(
            [sys.executable, *sys.argv], env={**os.environ, PLANT: "1"}, capture_output=True
        )
        if control.returncode != FOUND or b"data race" not in control.stderr:
            sys.exit(
                f"the planted race was not found: {control.returncode} {control.stderr[-2000:].decode()}"
            )
        print("a planted race is found")
    calls = work()
    torch.set_num_threads(1)
    with torch.inference_mode(), use_backend("cpu"):
        expected = {name: call() for name, call in calls.items()}
    torch.set_num_threads(THREADS)
    run_all(calls, expected)

    def caller(_: int) -> None:
        torch.set_num_threads(THREADS)  # each thread has a number of its own
        for _ in range(ROUNDS):
            run_all(calls, expected)

    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(caller, range(CALLERS)))
    print(
        f"no race in {len(calls)} operations on {THREADS} threads, alone and from {CALLERS} threads at once"
    )


if __name__ == "__main__":
    main()
