"""One optimised model from many threads, and in forked and spawned processes."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

import pruned_ops
from inputs import READY, encoder_arguments, logits, padded_batch, stock_model
from pruned_ops.ops.registry import OPS, use_backend
from pruned_ops.runtime.cuda_graphs import CAPTURE
from stand_in_graphs import with_engine

HUNG = 300  # seconds after which a child is taken to hang


def batches() -> list[dict[str, Tensor]]:
    return [padded_batch((20 + seed, 3, 11), seed=seed) for seed in range(8)]


def test_eight_threads_get_the_answers_of_one() -> None:
    model = pruned_ops.optimize(stock_model())
    expected = [logits(model, batch) for batch in batches()]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            found = list(pool.map(lambda batch: logits(model, batch), batches()))
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_threads_may_ask_for_different_backends() -> None:
    """A preference is one thread's own."""
    model = pruned_ops.optimize(stock_model())
    expected = {name: logits_on(model, name) for name in READY if name != "triton"}
    with ThreadPoolExecutor(8) as pool:
        names = [*expected] * 8
        found = list(pool.map(lambda name: logits_on(model, name), names))
    assert all(torch.equal(one, expected[name]) for one, name in zip(found, names, strict=True))


def logits_on(model: Any, backend: str) -> Tensor:
    with use_backend(backend):
        return logits(model, padded_batch())


@pytest.mark.skipif("cpu" not in READY, reason="pruned_ops._C is not built")
@pytest.mark.parametrize("op", ["attention", "encoder"])
def test_kernels_let_other_threads_run(op: str) -> None:
    """This thread counts on while the kernel runs in another: it does not hold the interpreter's lock."""
    arguments = encoder_arguments(4000, 384, 384, seed=0)
    if op == "attention":
        arguments = [torch.randn(4000, 3 * 384), torch.tensor([0, 4000], dtype=torch.int32), 4000, 32]
    kernel = getattr(torch.ops.pruned_ops_cpu, op).default
    turns: list[int] = []

    def run() -> None:
        turns.append(count)
        kernel(*arguments)
        turns.append(count)

    count, thread = 0, Thread(target=run)
    thread.start()
    while thread.is_alive():
        count += 1
    assert turns[1] - turns[0] > 100


def test_optimize_and_restore_while_others_answer() -> None:
    """Every answer meanwhile is right, packed or padded, and no weight is lost."""
    model, batch = stock_model(), padded_batch((20, 3, 11))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    real = batch["attention_mask"].bool()
    expected, ended = logits(model, batch)[real], Event()

    def answer() -> int:
        count = 0
        while not ended.is_set():
            torch.testing.assert_close(logits(model, batch)[real], expected, atol=2e-5, rtol=1e-5)
            count += 1
        return count

    def change(times: int) -> None:
        for _ in range(times):
            pruned_ops.optimize(model)
            pruned_ops.restore(model)

    with ThreadPoolExecutor(5) as pool:
        answering = [pool.submit(answer) for _ in range(3)]
        changing = [pool.submit(change, 10) for _ in range(2)]
        try:
            for future in changing:
                future.result()
        finally:
            ended.set()
        assert all(future.result() > 0 for future in answering)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, batch)[real], expected)


def test_first_requests_at_once_may_each_optimize() -> None:
    """As a server does that optimises a model when it is first asked; two models beside one another, too."""
    models, batch = [stock_model(), stock_model(seed=1)], padded_batch()
    expected = [logits(pruned_ops.optimize(stock_model(seed=seed)), batch) for seed in (0, 1)]
    start = Barrier(8)

    def request(number: int) -> Tensor:
        start.wait(HUNG)
        return logits(pruned_ops.optimize(models[number % 2]), batch)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(request, range(8)))
    assert all(torch.equal(one, expected[number % 2]) for number, one in enumerate(found))
    before = [stock_model(seed=seed).state_dict() for seed in (0, 1)]
    for model, state in zip(models, before, strict=True):
        restored = pruned_ops.restore(model).state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in restored.items())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_while_a_thread_runs_by_graphs() -> None:
    """The thread that holds the engine's lock, and that of the captures, does not exist in the child."""
    fast, engine = with_engine(stock_model())
    batch = padded_batch((9, 4))
    fast(**batch)
    held, ended = Event(), Event()

    def hold() -> None:
        with engine._lock, CAPTURE:
            held.set()
            ended.wait(HUNG)

    def answer() -> None:
        fast(**batch)
        with CAPTURE:
            os._exit(0 if engine.stats.replays == 2 else 1)

    thread = Thread(target=hold)
    thread.start()
    held.wait(HUNG)
    process = multiprocessing.get_context("fork").Process(target=answer)
    process.start()
    process.join(HUNG)
    ended.set()
    thread.join()
    assert process.exitcode == 0


def child(model: Any, connection: Any) -> None:
    try:
        connection.send((logits(model, padded_batch()).numpy(), torch.get_num_threads()))
    except Exception as error:
        connection.send((repr(error), 0))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_answers(method: str) -> None:
    """torch's OpenMP pool does not survive a fork: the child runs on one thread."""
    model = pruned_ops.optimize(stock_model())
    expected = logits(model, padded_batch())
    big = encoder_arguments(400, 384, 384, seed=0)
    if "cpu" in READY:
        OPS["encoder"](*big)  # the parent's pool is there
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(model, sender))  # type: ignore[attr-defined]
    process.start()
    assert receiver.poll(HUNG), f"the {method}ed child hangs"
    found, threads = receiver.recv()
    process.join(HUNG)
    torch.testing.assert_close(torch.from_numpy(found), expected)
    assert process.exitcode == 0 and (threads == 1 or method == "spawn")
