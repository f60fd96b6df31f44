"""What is timed on a GPU is timed once, kept, and used; here with a stand-in for the clock, interpreted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import pruned_ops
from inputs import randn
from pruned_ops import LayerShape, ModelShape
from pruned_ops.ops.registry import BACKENDS, KernelError, use_backend

pytestmark = pytest.mark.skipif(
    BACKENDS["triton"].missing is not None or torch.cuda.is_available(), reason="Triton's interpreter is off"
)

if BACKENDS["triton"].missing is None:
    from pruned_ops.ops.backends.triton import (
        add_layer_norm,
        configs,
        linear_add_layer_norm,
        linear_gelu,
        timing,
        tuning,
    )
    from pruned_ops.ops.backends.triton.tuning import Problem

CPU = torch.device("cpu")
SHAPE = ModelShape((LayerShape(2, 24), LayerShape(0, 24), LayerShape(1, 0)), 32, 16)
BATCHES = [(9, 30), (1,)]


class Clock:
    """A timer that runs nothing: the n-th configuration of a shape is the fastest."""

    def __init__(self, fastest: int) -> None:
        self.fastest, self.asked = fastest, 0

    def __call__(self, works: Sequence[Callable[[], Tensor]]) -> float:
        self.asked += 1
        return abs(self.asked % 3 - self.fastest)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty one."""
    monkeypatch.setenv("PRUNED_OPS_CACHE", str(tmp_path))
    tuning.known.cache_clear()
    tuning.forget()
    yield tmp_path
    tuning.known.cache_clear()
    tuning.forget()


def test_every_shape_of_the_model_is_timed_once() -> None:
    clock = Clock(0)
    wanted = set(timing.problems(SHAPE, BATCHES, torch.float16))
    # Two batches of: two counts of heads, one FFN width, three inner sizes (32, 16 and 24), and two norms.
    assert len(wanted) == 2 * (2 + 1 + 3 + 2)
    assert timing.tune(SHAPE, BATCHES, torch.float16, CPU, clock) == len(wanted) == len(tuning.known(CPU))
    asked = clock.asked
    assert timing.tune(SHAPE, BATCHES, torch.float16, CPU, clock) == 0 and clock.asked == asked
    assert timing.tune(SHAPE, [(300,)], torch.float16, CPU, clock) == 8
    # Of layers that norm first and have gated FFNs: two counts of heads, one width, and the embedding's norm.
    assert timing.tune(SHAPE, [(99,)], torch.float16, CPU, clock, gated=True, norm_first=True) == 4
    assert Problem("linear_geglu", "torch.float16", 128, 24, 32) in tuning.known(CPU)


def test_what_cannot_be_compiled_is_left_out() -> None:
    """As where a configuration needs more shared memory than the GPU has: another one is chosen."""
    from triton.errors import TritonError

    problem = Problem("attention", "torch.float16", 16, 2, 16, 16)
    first, second, *_ = tuning.candidates(problem, True, tuning.Chip.of(CPU))

    def clock(works: Sequence[Callable[[], Tensor]]) -> float:
        asked.append(works)
        if len(asked) == 1:
            raise TritonError("out of resource: shared memory")
        return float(len(asked))

    asked: list[Any] = []
    with pytest.warns(RuntimeWarning, match="attention is tuned without .*: TritonError: out of resource"):
        assert timing.fastest(problem, CPU, clock) == second != first

    def nothing_runs(works: Sequence[Callable[[], Tensor]]) -> float:
        raise TritonError("no")

    with pytest.warns(RuntimeWarning), pytest.raises(KernelError, match="TritonError: no"):
        timing.fastest(problem, CPU, nothing_runs)


def test_the_fastest_runs_and_another_process_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = randn(0, 9, 32).half(), randn(1, 48, 32).half(), randn(2, 48).half()
    problem = Problem("linear_gelu", "torch.float16", 16, 48, 32)
    slow = tuning.candidates(problem, True, tuning.Chip.of(CPU))[3]
    seen: list[Any] = []
    original = linear_gelu.launch_linear_gelu
    monkeypatch.setattr(
        linear_gelu, "launch_linear_gelu", lambda *args: (seen.append(args[3]), original(*args))[1]
    )

    def run() -> Tensor:
        with use_backend("triton"):
            return pruned_ops.ops.linear_gelu(x, weight, bias)

    modelled = run()
    assert seen == [tuning.modelled(problem, True, tuning.Chip.of(CPU))] and seen[0] != slow
    tuning.remember(CPU, {problem: slow})
    tuning.forget()
    torch.testing.assert_close(run(), modelled, rtol=1e-2, atol=1e-2)
    tuning.known.cache_clear()  # as in another process
    tuning.forget()
    run()
    assert seen[1:] == [slow, slow]
    tuning.remember(CPU, {problem: None})
    tuning.forget()
    run()
    assert len(seen) == 3  # torch's own way ran


def test_each_way_is_really_run_while_it_is_timed() -> None:
    """With a clock that runs what it times."""
    ran = []

    def clock(works: Sequence[Callable[[], Tensor]]) -> float:
        ran.extend(work().shape for work in works)
        return float(len(ran))

    for op, outputs, inner, longest, shape in (
        ("linear_gelu", 24, 32, 0, (16, 24)),
        ("linear_add_layer_norm", 32, 24, 0, (16, 32)),
        ("attention", 2, 16, 8, (16, 32)),
        ("add_layer_norm", 32, 0, 0, (16, 32)),
        ("embed_layer_norm", 32, 0, 0, (16, 32)),
    ):
        ran.clear()
        problem = Problem(op, "torch.float16", 16, outputs, inner, longest)
        timing.fastest(problem, CPU, clock)
        assert len(ran) >= 3 and set(ran) == {torch.Size(shape)}


def test_the_rows_of_a_norm_are_chosen_by_timing_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = add_layer_norm.launch_add_layer_norm
    for module in (add_layer_norm, linear_add_layer_norm):
        monkeypatch.setattr(
            module, "launch_add_layer_norm", lambda *args: (seen.append(args[-1]), original(*args))[1]
        )
    x, vector = randn(0, 9, 32).half(), randn(1, 32).half()
    problem = Problem("add_layer_norm", "torch.float16", 16, 32, 0)
    best, slow = configs.row_configs(32)[0], configs.row_configs(32)[-1]

    def run() -> None:
        with use_backend("triton"):
            pruned_ops.ops.add_layer_norm(x, vector, x, vector, vector, 1e-12)
            pruned_ops.ops.linear_add_layer_norm(x.float(), *others)

    others = [randn(2, 32, 32), vector.float(), x.float(), vector.float(), vector.float(), 1e-12]
    run()
    in_fp32 = Problem("add_layer_norm", "torch.float32", 16, 32, 0)
    tuning.remember(CPU, {problem: slow, in_fp32: slow})
    tuning.known.cache_clear()  # as in another process
    tuning.forget()
    run()
    assert seen == [best, best, slow, slow] and best != slow


class Gpu:
    """torch.cuda as timing sees it, with a clock: a launch takes the host 100 us, that of a graph 50, and the
    GPU 10; or 30 until it has been busy for 20 ms."""

    def __init__(self) -> None:
        self.now, self.captured, self.capturing = 0.0, 0, False
        self.streams, self.is_idle, self.worked = 0, True, 0.0

    def launch(self) -> Tensor:
        self.now += 0.1
        self.captured += self.capturing
        return torch.empty(0)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing and not gpu.capturing

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                gpu.is_idle = True

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Graph:
            def replay(self) -> None:
                work = (0.01 if gpu.worked >= 20 else 0.03) * gpu.captured
                gpu.now += work + (0.05 if gpu.is_idle else 0.0)
                gpu.worked += work
                gpu.is_idle = False

        @contextmanager
        def graph(_: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            gpu.capturing, gpu.captured, gpu.worked = True, 0, 0.0
            yield
            gpu.capturing = False

        def stream(_: int, priority: int) -> SimpleNamespace:
            assert priority < 0
            gpu.streams += 1
            return SimpleNamespace(wait_stream=lambda _: None, synchronize=lambda: None)

        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": graph, "Stream": stream,
            "stream": lambda _: nullcontext(), "current_stream": lambda: None, "current_device": lambda: 0,
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
        timing._stream.cache_clear()


@pytest.mark.parametrize("sets", [1, 5, 30])
def test_the_time_of_the_gpu_counts_and_not_the_hosts(sets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    with monkeypatch.context() as patch:
        gpu.install(patch)
        for _ in range(2):
            assert timing.graph_ms([gpu.launch] * sets) == pytest.approx(0.01)
        timing._stream.cache_clear()
    assert gpu.captured >= max(timing.LAUNCHES - 4, sets) and gpu.streams == 1


def test_outputs_of_a_turn_do_not_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would be written into L2: freed at once, one lends its memory to the next."""
    alive: list[int] = []

    class Output:
        def __init__(self) -> None:
            alive.append(alive[-1] + 1 if alive else 1)

        def __del__(self) -> None:
            alive.append(alive[-1] - 1)

    works: Any = [Output] * 5
    with monkeypatch.context() as patch:
        Gpu().install(patch)
        patch.setattr(timing, "WARM_UP", 0.0)
        timing.graph_ms(works)
        timing._stream.cache_clear()
    assert 5 <= max(alive) <= 10 and alive[-1] == 0


def test_launches_take_turns_on_more_numbers_than_l2_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.launch, "l2_bytes", lambda _: 100_000)
    found: list[int] = []

    def clock(works: Sequence[Callable[[], Tensor]]) -> float:
        found.append(len(works))
        return 1.0

    for tokens, sets in ((16, timing.MOST_SETS), (1024, 3), (8192, 1)):
        timing.fastest(Problem("add_layer_norm", "torch.float16", tokens, 32, 0), CPU, clock)
        assert set(found) == {sets}
        found.clear()


def test_a_choice_that_cannot_run_these_tensors_is_left() -> None:
    """Timed with tensor descriptors; these rows begin where none can."""
    problem = Problem("linear_gelu", "torch.float16", 16, 24, 32)
    tma = next(c for c in tuning.candidates(problem, True, tuning.Chip.of(CPU)) if c.tma)
    tuning.remember(CPU, {problem: tma})
    tuning.forget()
    weight = randn(1, 24, 32).half()
    assert tuning.linear_gelu_config(randn(0, 9, 32).half(), weight) == tma
    odd = randn(0, 9, 33).half()[:, 1:]
    assert tuning.linear_gelu_config(odd, weight) is None


def test_sizes_that_move_2_bytes_at_a_time_are_torchs() -> None:
    """Compiled for them, the configurations spill registers and have no pipeline (312: TinyBERT's hidden
    size; 1,843: an FFN as it was pruned, called op by op). What was timed on them is taken as it is."""
    x, tail = randn(0, 2048, 320).half(), randn(0, 2048, 336).half()[:, 16:]
    assert tuning.linear_gelu_config(x, randn(1, 1280, 320).half()) is not None
    assert tuning.linear_geglu_config(tail, randn(1, 1280, 320).half()) is not None
    for tokens, hidden, width in ((2048, 312, 1200), (9, 312, 1200), (2048, 90, 72), (2048, 320, 1843)):
        x, weight = randn(0, tokens, hidden).half(), randn(1, width, hidden).half()
        config = tuning.linear_gelu_config(x, weight)
        assert config is None or (config.tma and hidden % 8 == 0)
        assert tuning.linear_geglu_config(x, randn(1, 2 * width, hidden).half()) is None or width % 16 == 0
        assert tuning.linear_add_layer_norm_config(x[:, :90], weight[:, :90]) is None
    problem = Problem("linear_geglu", "torch.float16", 16, 24, 32)
    fastest = tuning.candidates(problem, False, tuning.Chip.of(CPU))[0]
    tuning.remember(CPU, {problem: fastest})
    tuning.forget()
    shifted = randn(0, 9, 33).half()[:, 1:]
    assert tuning.linear_geglu_config(shifted, randn(1, 48, 32).half()) == fastest


@pytest.mark.parametrize(
    "error", [RuntimeError("Could not determine home directory."), PermissionError("/root")]
)
def test_without_a_home_folder_a_model_chooses(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_there(device: torch.device) -> Path:
        raise error

    monkeypatch.setattr(tuning, "file_of", none_there)
    tuning.known.cache_clear()
    with pytest.warns(RuntimeWarning, match="PRUNED_OPS_CACHE names another folder"):
        assert tuning.known(CPU) == {}


def test_other_gpus_and_versions_have_files_of_their_own(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    problem = Problem("linear_gelu", "torch.float16", 16, 24, 32)
    tuning.remember(CPU, {problem: configs.LINEAR_GELU[2][0]})
    (saved,) = cache.iterdir()
    assert json.loads(saved.read_text())["made_with"]["gpu"] == "interpreter"
    monkeypatch.setattr(tuning, "__version__", "another")
    tuning.known.cache_clear()
    assert tuning.known(CPU) == {}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "[" * 1000,
        '{"choices": ["secret"]}',
        '{"choices": [{"problem": {}, "config": null}]}',
        '{"choices": [{"problem": 3}]}',
        '{"choices": [{"problem": {"op": "secret", "dtype": "", "tokens": 1, "outputs": 1, "inner": 1}, '
        '"config": 7}]}',
        '{"choices": [{"problem": {"op": "secret", "dtype": "", "tokens": 1, "outputs": 1, "inner": 1}, '
        '"config": {"RowConfig": {"secret": 1.5}}}]}',
    ],
)
def test_a_broken_file_is_named_and_left(text: str) -> None:
    path = tuning.file_of(CPU)
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match="pruned_ops.tune makes it anew") as warned:
        assert tuning.known(CPU) == {}
    assert str(path) in str(warned[0].message) and "secret" not in str(warned[0].message)
