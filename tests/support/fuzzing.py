"""How tests/fuzz attacks: hostile values and bytes, memory that ends at a page that may not be touched, and
how many cases a run has.

`make test` runs a few cases of each attack, always the same. `make fuzz MINUTES=30` (PRUNED_OPS_FUZZ_MINUTES)
shares the minutes among the attacks, and each run tries others.
"""

from __future__ import annotations

import copy
import ctypes
import faulthandler
import functools
import hashlib
import json
import mmap
import os
import pickle
import select
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

MINUTES = float(os.environ.get("PRUNED_OPS_FUZZ_MINUTES", "0"))
CASES = Path(__file__).parents[1] / "fuzz" / "cases"
# Folder of cases -> the suffix by which their reader knows what they are.
SUFFIXES = {"squad": ".json", "rows": ".jsonl", "decision": ".json", "nq": ".jsonl", "config": ".json"}
# Attack -> how many cases of it ran.
ran: Counter[str] = Counter()
# How long each attack may take, in seconds, where it takes its time; conftest.py sets it.
seconds_each = 60.0


def fuzzed(quick: int, cases: str | None = None, **strategies: Any) -> Callable[[Any], Any]:
    """Runs a test on what these strategies make: `quick` cases, or as many as there is time for.

    cases: the folder of tests/fuzz/cases that keeps the content or value of a long run's failure, from where
    every later run takes it. Without one, the failure's @reproduce_failure, or an @example, keeps it.
    """
    options = settings(
        max_examples=300 if MINUTES else quick,
        deadline=None,
        derandomize=not MINUTES,
        print_blob=bool(MINUTES),
        suppress_health_check=list(HealthCheck),
    )

    def decorate(test: Any) -> Any:
        failure: dict[str, Any] = {}  # the arguments that failed last: hypothesis ends with the smallest

        @functools.wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            ran[test.__name__] += 1
            try:
                test(*args, **kwargs)
            except Exception:
                failure.update(kwargs)
                raise

        attack = options(given(**strategies)(counted))
        if not MINUTES:
            return attack

        @functools.wraps(attack)
        def until_time_is_up(*args: Any, **kwargs: Any) -> None:
            end = time.monotonic() + seconds_each
            try:
                while time.monotonic() < end:
                    attack(*args, **kwargs)
            except Exception:
                if cases is not None and failure:
                    _keep(cases, next(failure[name] for name in strategies))
                raise

        return until_time_is_up

    return decorate


def _keep(folder: str, failed: Any) -> None:
    content = failed if isinstance(failed, bytes) else json_bytes(failed)
    path = CASES / folder / f"{hashlib.sha256(content).hexdigest()[:8]}{SUFFIXES[folder]}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    print(f"kept as {path}")


# Numbers that files and arguments should not hold.
NUMBERS = [
    0,
    -1,
    1,
    1.7,
    -0.0,
    1e-300,
    2**31,
    2**63,
    2**64,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
]
# Everything else that they should not.
HOSTILE: list[Any] = [
    None, True, False, *NUMBERS, "", " ", "x", "1", "NaN", "\ud800", "\x00", "é" * 3, "\U0001f600",
    "a" * 5_000, "../x", [], {}, [[]], [None], {"": None}, {"__class__": "x"}, [1, 2],
    functools.reduce(lambda inner, _: [inner], range(90), 0),
]  # fmt: skip


@st.composite
def mutated_json(draw: Any, values: Any, edits: int = 3) -> Any:
    """One of these JSON values with one to three of its places replaced, removed or repeated."""
    value = json.loads(json.dumps(draw(st.sampled_from(values))))
    for _ in range(draw(st.integers(1, edits))):
        value = _edited(draw, value)
    return value


def _edited(draw: Any, value: Any) -> Any:
    places = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    if not places or draw(st.integers(0, 9)) == 0:
        return copy.deepcopy(draw(st.sampled_from(HOSTILE)))
    place = draw(st.sampled_from(places))
    how = draw(st.sampled_from(["descend", "descend", "descend", "replace", "remove", "repeat"]))
    if how == "remove":
        del value[place]
    elif how == "repeat" and isinstance(value, list):
        value.insert(place, value[place])
    elif how == "repeat":
        value[draw(st.sampled_from(["x", "", place.upper(), place + " "]))] = value[place]
    elif how == "replace":
        value[place] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
    else:
        value[place] = _edited(draw, value[place])
    return value


@st.composite
def mutated_bytes(draw: Any, contents: Any, edits: int = 4) -> bytes:
    """One of these contents with some bytes changed, removed, repeated or cut off."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, edits))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        size = draw(st.sampled_from([1, 1, 2, 4, 8, 64]))
        how = draw(st.sampled_from(["change", "change", "number", "remove", "repeat", "cut"]))
        if how == "change":
            content[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif how == "number":  # a length or an offset
            number = draw(st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 2**62, -(2**63)]))
            content[at : at + 8] = number.to_bytes(8, "little", signed=True)
        elif how == "remove":
            del content[at : at + size]
        elif how == "repeat":
            content[at:at] = content[at : at + size]
        else:
            del content[at:]
    return bytes(content)


def json_bytes(value: Any) -> bytes:
    """The value as JSON; what JSON has no word for is written as Python and JavaScript do."""
    return json.dumps(value).encode()


def assert_refusal(error: BaseException, *names: object) -> None:
    """One line, not too long, that holds each of these names."""
    text = str(error)
    assert text.strip() and "\n" not in text.strip(), f"not one line: {text!r}"
    assert len(text) < 1_000, f"{len(text)} characters: {text[:300]!r}"
    assert "allocate" not in text, f"memory was asked for: {text!r}"
    for name in names:
        assert str(name) in text, f"{name} is not named: {text!r}"


def in_child(function: Callable[[], Any], seconds: float = 60) -> Any:
    """What the function returns in a forked child; AssertionError where the child dies or does not end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            os.write(writer, pickle.dumps(function()))
        finally:
            os._exit(0)
    os.close(writer)
    try:
        content = b""
        end = time.monotonic() + seconds
        while select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
            part = os.read(reader, 1 << 16)
            if not part:
                break
            content += part
        else:
            os.kill(child, signal.SIGKILL)
            raise AssertionError(f"no end after {seconds} seconds")
    finally:
        os.close(reader)
        _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status), f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    assert content, "ended without a result"
    return pickle.loads(content)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NONE, _READ = 0, 1


def guarded(tensor: Tensor, at_end: bool = True) -> Tensor:
    """The same numbers in pages that can only be read, between two that cannot be touched; the tensor ends at
    the second, or begins at the first. Strides are kept."""
    extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    if not tensor.numel():
        return tensor
    page, used = mmap.PAGESIZE, extent * tensor.element_size()
    pages = -(-used // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    first = page + (pages * page - used if at_end else 0)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=extent, offset=first)
    view = flat.as_strided(tensor.shape, tensor.stride())
    view.copy_(tensor)
    base = flat.data_ptr() - first
    for start, size, allowed in (
        (0, page, _NONE),
        (page, pages * page, _READ),
        ((pages + 1) * page, page, _NONE),
    ):
        if _libc.mprotect(base + start, size, allowed):
            raise OSError(ctypes.get_errno(), "mprotect")
    return view


def guarded_all(arguments: Any, at_end: bool) -> Any:
    """Arguments of an op, each tensor of them guarded."""
    if isinstance(arguments, Tensor):
        return guarded(arguments, at_end) if arguments.device.type == "cpu" else arguments
    if isinstance(arguments, (list, tuple)):
        return [guarded_all(argument, at_end) for argument in arguments]
    return arguments
