"""CUDA's recorder with stand-ins for torch.cuda: on which stream it captures, one at a time, and what is left
where a capture fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pruned_ops.layers.kinds import BERT_KIND
from pruned_ops.runtime.cuda_graphs import CAPTURE, CudaGraphs
from pruned_ops.runtime.engine import Engine
from pruned_ops.runtime.packed_heads import Outputs

GPU = torch.device("cuda", 0)


class FakeCuda:
    """Streams by number and captures that take a while. fail: what the end of a capture raises."""

    def __init__(self, fail: Exception | None = None) -> None:
        self.fail, self.made, self.capturing, self.captured_on = fail, 0, 0, list[Any]()
        self.did = list[str]()
        self._here = threading.local()

    def stream_made(self, device: Any = None, priority: int = 0) -> Any:
        self.made += 1
        return SimpleNamespace(
            number=self.made,
            priority=priority,
            wait_stream=lambda other: None,
            wait_event=lambda event: self.did.append("waits"),
        )

    def current(self, device: Any = None) -> Any:
        return getattr(self._here, "stream", None) or DEFAULT

    def set_current(self, stream: Any) -> None:
        self._here.stream = stream

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before = self.current()
        self.set_current(stream)
        yield
        self.set_current(before)

    @contextmanager
    def capture(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert self.capturing == 0, "torch captures one graph at a time"
        self.capturing += 1
        before = self.current()
        self.set_current(stream)
        self.captured_on.append(stream)
        try:
            yield
            time.sleep(0.01)
            if self.fail is not None:
                raise self.fail  # as torch's own, it leaves the thread on the stream
            self.set_current(before)
        finally:
            self.capturing -= 1


DEFAULT = SimpleNamespace(number=0, wait_stream=lambda other: None)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    names: dict[str, Callable[..., Any]] = {
        "Stream": cuda.stream_made,
        "stream": cuda.on,
        "current_stream": cuda.current,
        "set_stream": cuda.set_current,
        "graph": cuda.capture,
        "device": lambda device: nullcontext(),
        "graph_pool_handle": object,
        "Event": lambda: SimpleNamespace(synchronize=lambda: None),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
    }
    for name, stand_in in names.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return cuda


def test_warm_up_and_captures_share_the_recorders_one_stream(fake: FakeCuda) -> None:
    recorder, ran_on = CudaGraphs(GPU), list[Any]()
    for _ in range(3):
        recorder.record(lambda: ran_on.append(torch.cuda.current_stream()))
    assert fake.made == 1 and {stream.number for stream in (*ran_on, *fake.captured_on)} == {1}


def test_no_stream_of_a_callers_is_one_that_captures(fake: FakeCuda) -> None:
    """torch gives the same 32 streams of a priority out again and again, so that another thread may work on
    one by this number while it captures."""
    CudaGraphs(GPU).record(lambda: None)
    assert torch.cuda.Stream(GPU).priority == 0
    assert all(stream.priority < 0 for stream in fake.captured_on)


def test_a_warm_up_waits_for_the_graphs_that_still_run(fake: FakeCuda) -> None:
    """On other streams, too: they use the workspace of cuBLAS that belongs to the recorder's stream."""
    CudaGraphs(GPU).record(lambda: fake.did.append("works"))
    assert fake.did == ["waits", "works", "works"]


def test_two_models_in_two_threads_capture_one_after_the_other(fake: FakeCuda) -> None:
    recorders, failures = [CudaGraphs(GPU), CudaGraphs(GPU)], list[BaseException]()

    def record(recorder: CudaGraphs) -> None:
        try:
            for _ in range(5):
                recorder.record(lambda: None)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=record, args=(recorder,)) for recorder in recorders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(fake.captured_on) == 10
    assert {stream.number for stream in fake.captured_on} == {1, 2}  # two workspaces of cuBLAS


@pytest.mark.parametrize("place", ["warm-up", "capture", "its end"])
def test_the_stream_is_what_it_was_after_a_capture_that_failed(fake: FakeCuda, place: str) -> None:
    fake.fail = RuntimeError("operation failed due to a previous error during capture")
    runs = list[int]()

    def work() -> None:
        runs.append(1)
        if place != "its end" and len(runs) == (1 if place == "warm-up" else 2):
            raise LookupError("out of resource")

    with pytest.raises((RuntimeError, LookupError)):
        CudaGraphs(GPU).record(work)
    assert torch.cuda.current_stream() is DEFAULT
    fake.fail = None
    CudaGraphs(GPU).record(lambda: None)  # the lock is free


def test_an_engine_keeps_its_stream_when_weights_move(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder: Any = SimpleNamespace(
        device=GPU,
        encoder=SimpleNamespace(laid_out=None, kind=BERT_KIND),
        modules=lambda: iter(()),
        compute=lambda *_: Outputs(None, None),
        around=[],
    )
    engine = Engine(encoder)

    def inputs(*_: Any) -> Any:
        assert CAPTURE.is_held  # by which no two threads start a kernel for the first time
        return SimpleNamespace(ids=[], cu_seqlens=None)

    monkeypatch.setattr("pruned_ops.runtime.engine.GraphInputs", inputs)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    encoder.heads = []
    for _ in range(40):
        engine.warm_up([(10,)])
        engine.invalidate()
    assert fake.made == 1 and engine.stats.captures == 40
    assert all(stream.priority < 0 for stream in fake.captured_on)
