"""Callbacks that watch a training: progress on one line, a clock, TensorBoard, and an orderly stop on
Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pruned_trainer.distributed import on_any


class OneLineProgress(ProgressCallback):
    """The Trainer's progress bar, with its logs as one line that people can read."""

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
    """Ends training, with a checkpoint, after the step in which `requested` is set on any process."""

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.requested = on_any(self.requested)
        if self.requested:
            control.should_save = control.should_training_stop = True
        return control


@contextmanager
def stop_on_interrupt() -> Iterator[StopOnInterrupt]:
    """Turn the first Ctrl-C, or SIGTERM, inside the block into a request to stop; a second Ctrl-C interrupts
    at once."""
    callback = StopOnInterrupt()
    if threading.current_thread() is not threading.main_thread():
        yield callback
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: Any) -> None:
        callback.requested = True
        signal.signal(signal.SIGINT, previous[signal.SIGINT])
        print("\nstopping after this step, with a checkpoint (Ctrl-C again: at once, without)", flush=True)

    for number in previous:
        signal.signal(number, request)
    try:
        yield callback
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StepClock(TrainerCallback):
    """Wall-clock seconds of each training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def tensorboard_writer(folder: Path) -> TrainerCallback:
    """A callback that writes the Trainer's logs for TensorBoard into `folder`.

    The Trainer itself would take the folder from an environment variable. Errors: ImportError where
    tensorboard is not installed.
    """
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))
