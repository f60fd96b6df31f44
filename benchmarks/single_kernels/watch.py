"""Runs work that may crash, hang or lose its GPU in a process of its own, and what it had not begun in
another. Only the standard library is imported: the process that watches needs nothing of the GPU's."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection
from pathlib import Path

from single_kernels.journal import FAILED, Facts, GpuLost, Journal

# It is given what to call with the facts of an attempt that begins, and with none at its end; and the facts
# of the attempts of earlier processes.
Work = Callable[[Callable[[Facts], None], Collection[Facts]], None]
# The exit status of a process whose GPU is lost. The error is a row already.
LOST = 75
# Seconds in which a process that was killed is gone; one that waits for a broken driver may never be.
KILLED = 10


def run_watched(work: Work, path: Path, seconds: float) -> None:
    """Do the work. Where its process ends before the work does, or begins nothing for so many seconds, the
    attempt that it was at is a row FAILED of the journal at `path`, and another process goes on behind it;
    but none after a process that began nothing. work: it is pickled."""
    context = multiprocessing.get_context("spawn")
    attempts: list[Facts] = []
    while True:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(work, theirs, tuple(attempts)), daemon=True)
        process.start()
        theirs.close()
        before, ended = len(attempts), False
        try:
            ended, at = _followed(ours, attempts, seconds)
        finally:  # of an interrupt, too
            if not ended:
                process.kill()
        process.join(KILLED)
        if ended and process.exitcode == 0:
            return
        if not ended or process.exitcode != LOST:
            reason = f"status {process.exitcode}" if ended else f"nothing came for {seconds:.0f} s"
            with Journal(path) as journal:
                journal.note(FAILED, **at, error=f"the process was ended: {reason}")
        if len(attempts) == before:
            return


def _followed(connection: Connection, attempts: list[Facts], seconds: float) -> tuple[bool, Facts]:
    """Whether the process ended by itself, and what it was at. What it begins is added to `attempts`."""
    at: Facts = {}
    while connection.poll(seconds):
        try:
            at = connection.recv()
        except (EOFError, OSError):  # the latter where it was killed in the middle of a word
            return True, at
        if at:
            attempts.append(at)
    return False, at


def _work(work: Work, connection: Connection, attempts: Collection[Facts]) -> None:
    faulthandler.enable()
    status = 0
    try:
        work(connection.send, attempts)
    except GpuLost:
        status = LOST
    os._exit(status)  # what would be tidied up is on the GPU
