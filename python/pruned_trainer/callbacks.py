"""What watches a training: progress on one line, a clock, and an orderly stop on Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class OneLineProgress(ProgressCallback):
    """Trainer's progress bar, with its logs as one line that people can read."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs or "loss" not in logs:
            return
        parts = ", ".join(f"{k[5:]} {v:.3g}" for k, v in logs.items() if k.startswith("loss_"))
        line = f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.3f}" + (
            f" ({parts})" if parts else ""
        )
        if "expected" in logs:
            line += f"  budget {logs['expected']:.3f}, wanted {logs['wanted']:.3f}"
        self.training_bar.write(line)


class StopOnInterrupt(TrainerCallback):
    """Ends training after the step under way once `request` was called, with a checkpoint."""

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.requested:
            control.should_save = control.should_training_stop = True
        return control


@contextmanager
def stop_on_interrupt() -> Iterator[StopOnInterrupt]:
    """Turn the first Ctrl-C inside the block into a request to stop; a second one interrupts at once."""
    callback = StopOnInterrupt()
    if threading.current_thread() is not threading.main_thread():
        yield callback
        return
    previous = signal.getsignal(signal.SIGINT)

    def request(number: int, frame: Any) -> None:
        callback.requested = True
        signal.signal(signal.SIGINT, previous)
        print("\nstopping after this step, with a checkpoint (Ctrl-C again: at once, without)", flush=True)

    signal.signal(signal.SIGINT, request)
    try:
        yield callback
    finally:
        signal.signal(signal.SIGINT, previous)


class StepClock(TrainerCallback):
    """Wall-clock seconds of each training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)
