"""The benchmarks of kernels without a GPU: inputs that L2 does not hold, graphs that are timed, failures that
stop nothing, and results that are there case by case."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_kernels
import bench_ops
import dying_work
import torch_ways
from pruned_ops.ops.registry import BACKENDS, OPS
from single_kernels import right, sweep
from single_kernels.cases import Model, Place, cases
from single_kernels.journal import GpuLost, Journal, rows_in
from single_kernels.rotation import L2, MOST_SETS, input_sets, rotated
from single_kernels.watch import run_watched

SMALL = Model("small", 32, 2, 16, 40)


def test_inputs_are_larger_than_three_caches() -> None:
    for nbytes in (1e6, 2.5e7, 1e8, 5e9):
        sets = input_sets(nbytes)
        assert sets == MOST_SETS or sets * nbytes > 3 * L2
    assert input_sets(5e9) == 1
    made = iter(range(9))
    assert [call() for call in rotated(lambda: (next(made),), lambda number: number, 3)] == [0, 1, 2]


def test_on_a_gpu_graphs_of_rotating_inputs_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a call of its own, whose time would be the host's."""
    timed: list[int] = []

    def replay_seconds(calls: Any, rounds: int) -> tuple[float, ...]:
        addresses = {call().data_ptr() for call in calls}
        timed.append(len(addresses))
        return (1e-6,) * rounds

    monkeypatch.setattr(bench_ops, "replay_seconds", replay_seconds)
    (case,) = [c for c in cases(SMALL, (5, 9), Place(torch.float32, "cpu")) if c.op == "add_layer_norm"]
    monkeypatch.setattr(bench_ops, "input_sets", lambda nbytes: 4)
    runners = case.make()
    outputs: list[Any] = []
    monkeypatch.setattr(bench_ops, "ours_elsewhere", lambda case, own: {})
    for name, run in list(runners.items()):
        runners[name] = lambda batch, run=run: outputs.append(run(batch)) or outputs[-1]
    timings, failures = bench_ops.timed(case, runners, "cuda", 5)
    assert not failures and set(timings) == {"ours", "torch adds, layer_norm"}
    assert timed[0] >= 2 and len(timings["ours"].seconds) == bench_ops.REPLAYS


def test_one_runner_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ops, "input_sets", lambda nbytes: 1)
    monkeypatch.setattr(bench_ops, "replay_seconds", lambda calls, rounds: calls[0]() or (1.0,))

    def broken(batch: Any) -> None:
        raise RuntimeError("no kernel image")

    (case,) = [c for c in cases(SMALL, (5,), Place(torch.float32, "cpu")) if c.op == "linear_gelu"]
    runners = {"ours": lambda batch: None, "rival": broken, "other": lambda batch: None}
    timings, failures = bench_ops.timed(case, runners, "cuda", 5)
    assert set(timings) == {"ours", "other"}
    assert failures == ["FAILED: rival of linear_gelu, small: RuntimeError: no kernel image"]


def test_results_are_written_after_every_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run that is interrupted keeps what it has."""
    out = tmp_path / "folder" / "ops.csv"
    plain, seen = bench_ops.measured, list[int]()

    def interrupted(*arguments: Any) -> Any:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(1)
        return plain(*arguments)

    monkeypatch.setattr(bench_ops, "measured", interrupted)
    monkeypatch.setattr(bench_ops, "MODELS", (SMALL, SMALL))
    monkeypatch.setattr(bench_ops.harness, "ceilings", lambda *_: {"flops": 1e9, "bytes": 1e9})
    monkeypatch.setattr(sys, "argv", ["bench_ops.py", "--quick", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        bench_ops.main()
    with out.open(encoding="utf-8") as file:
        assert {row["op"] for row in csv.DictReader(file)} == {"attention", "linear_gelu"}
    assert "| linear_gelu |" in out.with_suffix(".md").read_text("utf-8")


def test_measured_times_are_refused_where_no_bounds_are_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_ops.harness, "ceilings", lambda *_: pytest.fail("it measures"))
    monkeypatch.setattr(sys, "argv", ["bench_ops.py", "--measured", str(tmp_path / "kernels.jsonl")])
    with pytest.raises(ValueError, match="bounds, which --device cuda prints where there is no GPU"):
        bench_ops.main()


LIMITS = ("recompile_limit", "fail_on_recompile_limit_hit")


def test_past_the_limit_of_sizes_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default torch runs such a function eagerly, under the name of the compiled one."""
    monkeypatch.setattr(torch_ways, "COMPILED_SIZES", 2)
    plain = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: plain(function, backend="eager", dynamic=False)
    )
    config = torch._dynamo.config
    with config.patch({name: getattr(config, name) for name in LIMITS}):  # as they are now, afterwards too
        fast = torch_ways.compile_each_size(lambda x: x + 1, "max-autotune")
        fast(torch.ones(2))
        fast(torch.ones(3))
        with pytest.raises(Exception, match="recompile_limit"):
            fast(torch.ones(4))
    torch._dynamo.reset()


def test_wrong_and_failing_kernels_are_lines_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    kernels = OPS["add_layer_norm"].kernels
    (cpu,) = [kernel for name, kernel in kernels.items() if name == "cpu"]
    nan = replace(cpu, launch=lambda x, *_: torch.full_like(x, torch.nan))
    monkeypatch.setitem(kernels, "cpu", nan)

    def no_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setitem(
        OPS["linear_gelu"].kernels, "cpu", replace(OPS["linear_gelu"].kernels["cpu"], launch=no_memory)
    )
    monkeypatch.setattr(right, "ready_backends", lambda op, device: ["cpu"])
    monkeypatch.setattr(sweep, "ready_backends", lambda op, device: ["cpu"])
    arguments = bench_kernels.parsed(["--device", "cpu", "--out", str(tmp_path)])
    bench_kernels.work(arguments, tmp_path / "kernels.jsonl", math.inf, lambda facts: None, [])
    rows = rows_in(tmp_path / "kernels.jsonl")
    wrong = [row.get("op", row.get("problem")) for row in rows if row["verdict"] == "WRONG"]
    assert wrong == ["add_layer_norm", "add_layer_norm 20x64"]  # the latter is not timed
    timed = [(row["problem"], row["name"]) for row in rows if row["verdict"] == "timed"]
    assert ("add_layer_norm 20x64", "cpu") not in timed and ("attention 2x16, 2 of 9 to 17", "cpu") in timed
    assert ("linear_add_layer_norm 20x64->72", "cpu") in timed
    failed = [row for row in rows if row["verdict"] == "FAILED"]
    assert {row.get("op", row.get("problem")) for row in failed} == {"linear_gelu", "linear_gelu 20x64->72"}
    assert failed[0]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate"


def test_what_no_time_is_left_for_is_named(tmp_path: Path) -> None:
    with Journal(tmp_path / "kernels.jsonl", end=0.0) as journal:
        right.check_all(journal, Place(torch.float32, "cpu"), tiny=True)
        sweep.ceilings(sweep.Sweep(journal, Place(torch.float32, "cpu"), True))
    rows = rows_in(tmp_path / "kernels.jsonl")
    assert {row["verdict"] for row in rows} == {"left out"} and len(rows) >= 7


def test_a_second_sweep_begins_where_the_first_may_have_ended() -> None:
    assert sweep.in_order(False)[0] is sweep.in_order(True)[0] is sweep.ceilings
    assert sweep.in_order(True)[1:] == sweep.in_order(False)[:0:-1]


@pytest.mark.skipif(BACKENDS["triton"].missing is not None, reason="Triton is not here")
def test_cublas_adds_into_a_residual_that_is_given_up() -> None:
    """What the engine runs is what split kernels are timed beside; it changes its residual."""
    place = Place(torch.float32, "cpu")
    x, weight, residual = place.tensor(20, 64), place.tensor(72, 64), place.tensor(20, 72)
    vectors = [place.tensor(72) for _ in range(3)]
    reference = OPS["linear_add_layer_norm"].reference
    expected, before = sweep._normed(reference, vectors, x, weight, residual), residual.clone()
    computed = sweep._normed(sweep._into_residual, vectors, x, weight, residual)
    torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(residual, before + x @ weight.t(), rtol=1e-4, atol=1e-4)


def test_on_a_gpu_no_kernel_of_the_cpus_is_asked() -> None:
    """Of linear_gelu it would be cuBLAS's product, under the name of the CPU."""
    assert all("cpu" not in right.ready_backends(op, "cuda") for op in OPS)
    assert right.ready_backends("linear_gelu", "cpu")[0] == "cpu"


def test_what_an_earlier_process_did_is_not_done_again(tmp_path: Path) -> None:
    """And an error after which the GPU is lost ends this one."""
    told: list[Any] = []
    made: list[str] = []

    def fails() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with Journal(
        tmp_path / "a", done=[{"op": "first"}], tell=told.append, is_lost=lambda: "last" in made
    ) as journal:
        journal.attempt(lambda: made.append("first"), op="first")
        journal.attempt(lambda: made.append("second"), op="second")
        journal.attempt(fails, op="third")  # an error that loses nothing
        journal.attempt(lambda: made.append("last"), op="last")
        with pytest.raises(GpuLost):
            journal.attempt(fails, op="lost")
    assert made == ["second", "last"]
    assert [facts.get("op") for facts in told] == ["second", None, "third", None, "last", None, "lost"]
    assert [(row["verdict"], row["op"]) for row in rows_in(tmp_path / "a")] == [
        ("FAILED", "third"), ("FAILED", "lost"),
    ]  # fmt: skip


def test_the_process_that_watches_does_without_torch() -> None:
    """Its import takes seconds, and what is broken may be torch."""
    code = "import sys, bench_kernels; assert 'torch' not in sys.modules"
    folder = Path(bench_kernels.__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def test_another_process_goes_on_behind_one_that_ends(tmp_path: Path) -> None:
    """It crashes, hangs, loses its GPU, or fails outside of an attempt; then none is begun in vain."""
    path = tmp_path / "kernels.jsonl"
    run_watched(partial(dying_work.work, str(path)), path, 10)
    rows = [(row["verdict"], row.get("name"), row.get("error", "")) for row in rows_in(path)]
    expected = [
        ("right", "plain", ""), ("FAILED", "crash", "the process was ended: status -11"),
        ("FAILED", "hang", "the process was ended: nothing came for 10 s"),
        ("FAILED", "lost", "RuntimeError: an illegal memory access"),
        ("right", "last", ""), *[("FAILED", None, "the process was ended: status 1")] * 2,
    ]  # fmt: skip
    assert rows == expected
