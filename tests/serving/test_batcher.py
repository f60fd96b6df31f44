"""The thread that computes all requests' texts: how they share batches, who waits, and whom a fault costs
its answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

for package in ("fastapi", "orjson", "prometheus_client"):
    pytest.importorskip(package, reason='the server is not installed: pip install "pruned_ops[serve]"')

from pruned_ops.runtime.batch_runner import TOKENS_ON_A_CPU  # noqa: E402
from pruned_ops.serving.batcher import Batcher  # noqa: E402
from pruned_ops.serving.limits import Limits  # noqa: E402
from pruned_ops.serving.metrics import Metrics  # noqa: E402
from pruned_ops.serving.refusals import Refusal  # noqa: E402
from served import HUNG  # noqa: E402


def test_a_batch_has_as_many_tokens_as_elsewhere() -> None:
    assert Limits().batch_tokens == TOKENS_ON_A_CPU


class Held:
    """Stands in for a model: gives each text's length, once it may. A text "nan" has no finite result, and a
    batch with a text "bang" fails."""

    name = "held"

    def __init__(self, is_held: bool = False) -> None:
        self.batches: list[list[str]] = []
        self.is_asked, self.may_answer = threading.Event(), threading.Event()
        if not is_held:
            self.may_answer.set()

    def compute(self, texts: list[str]) -> list[Any]:
        self.batches.append(texts)
        self.is_asked.set()
        assert self.may_answer.wait(HUNG)
        if "bang" in texts:
            raise RuntimeError("out of memory\nand a long explanation")
        return [None if text == "nan" else len(text) for text in texts]


def run(work: Callable[[Batcher], Awaitable[Any]], **limits: Any) -> Any:
    """What the work gives with a new batcher. A wait is for ever where the work does not say otherwise."""

    async def main() -> Any:
        return await work(Batcher(Limits(**{"wait_ms": 1000.0 * HUNG, **limits}), Metrics()))

    return asyncio.run(main())


async def begun(*jobs: Awaitable[Any]) -> list[asyncio.Future[Any]]:
    tasks = [asyncio.ensure_future(job) for job in jobs]
    await asyncio.sleep(0)
    return tasks


async def is_asked(model: Held) -> None:
    assert await asyncio.to_thread(model.is_asked.wait, HUNG)
    model.is_asked.clear()


def test_results_are_in_their_order() -> None:
    model, texts = Held(), ["a" * size for size in (3, 1, 40, 2, 17)]
    assert run(lambda batcher: batcher.run(model, texts), batch_tokens=20) == [3, 1, 40, 2, 17]
    assert sorted(sum(model.batches, [])) == sorted(texts)
    for batch in model.batches:  # padding included
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= 20


def test_what_waits_together_is_computed_together() -> None:
    model = Held(is_held=True)

    async def work(batcher: Batcher) -> None:
        first = await begun(batcher.run(model, ["a"]))
        await is_asked(model)
        others = await begun(*(batcher.run(model, ["b" * 2]) for _ in range(5)))
        assert batcher.waiting_tokens == 10 and batcher.waiting_requests == 6
        model.may_answer.set()
        assert await asyncio.gather(*first, *others) == [[1]] + [[2]] * 5
        assert batcher.waiting_tokens == batcher.waiting_requests == 0

    run(work)
    assert [len(batch) for batch in model.batches] == [1, 5]


def test_a_batch_waits_only_for_who_is_on_the_way() -> None:
    """With a deadline that no test would wait for."""
    model = Held()

    async def work(batcher: Batcher) -> None:
        assert await batcher.run(model, ["a"]) == [1]  # nobody is on the way
        coming = batcher.arrival()
        (waits,) = await begun(batcher.run(model, ["b"]))
        await asyncio.sleep(0.05)
        assert not waits.done() and len(model.batches) == 1
        assert await batcher.run(model, ["c"], coming) == [1]
        assert await waits == [1]
        gone = batcher.arrival()
        (waits,) = await begun(batcher.run(model, ["d"]))
        gone.is_over()
        gone.is_over()
        assert await waits == [1]

    run(work)
    assert [sorted(batch) for batch in model.batches] == [["a"], ["b", "c"], ["d"]]


def test_a_batch_does_not_wait_beyond_its_deadline() -> None:
    async def work(batcher: Batcher) -> list[Any]:
        batcher.arrival()  # of somebody who never comes
        return await batcher.run(Held(), ["a"])

    assert run(work, wait_ms=20.0) == [1]


def test_a_large_request_does_not_hold_up_a_small_one() -> None:
    model = Held(is_held=True)

    async def work(batcher: Batcher) -> None:
        large = await begun(batcher.run(model, ["a" * 10] * 1000))
        await is_asked(model)
        (small,) = await begun(batcher.run(model, ["b"]))
        model.may_answer.set()
        assert await small == [1]
        assert await large[0] == [10] * 1000

    run(work, batch_tokens=100)
    assert ["b" in batch for batch in model.batches].index(True) <= 2


def test_a_large_request_does_not_hold_up_another_model() -> None:
    first, second = Held(is_held=True), Held()
    batches_before: list[int] = []  # of the first model when the second is asked

    def compute(texts: list[str]) -> list[Any]:
        batches_before.append(len(first.batches))
        return list(map(len, texts))

    second.compute = compute  # type: ignore[method-assign]

    async def work(batcher: Batcher) -> None:
        large = await begun(batcher.run(first, ["a" * 10] * 1000))
        await is_asked(first)
        small = await begun(batcher.run(second, ["b"]))
        first.may_answer.set()
        assert await asyncio.gather(*large, *small) == [[10] * 1000, [1]]

    run(work, batch_tokens=100)
    assert batches_before[0] <= 2 and len(first.batches) == 100


def test_the_queue_is_bounded() -> None:
    model = Held(is_held=True)

    async def work(batcher: Batcher) -> None:
        tasks = await begun(batcher.run(model, ["a" * 500]))  # alone, whatever its size
        await is_asked(model)
        tasks += await begun(*(batcher.run(model, ["b" * 40]) for _ in range(2)))
        with pytest.raises(Refusal, match="80 tokens wait already, and 100 may") as refused:
            await batcher.run(model, ["c" * 40])
        assert refused.value.reason == "overloaded" and refused.value.headers["Retry-After"] == "1"
        model.may_answer.set()
        assert await asyncio.gather(*tasks) == [[500], [40], [40]]
        assert await batcher.run(model, ["c" * 40]) == [40]

    run(work, queue_tokens=100)


def test_the_work_of_who_left_is_dropped() -> None:
    model = Held(is_held=True)

    async def work(batcher: Batcher) -> None:
        first = await begun(batcher.run(model, ["a"]))
        await is_asked(model)
        left, stays = await begun(batcher.run(model, ["left"] * 3), batcher.run(model, ["stays"]))
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        assert batcher.waiting_tokens == 5
        model.may_answer.set()
        assert await stays == [5] and await first[0] == [1]

    run(work)
    assert model.batches == [["a"], ["stays"]]


@pytest.mark.parametrize(
    ("bad", "why"), [("nan", "not finite for input 1"), ("bang", "failed: out of memory")]
)
def test_a_fault_is_its_own_requests(bad: str, why: str) -> None:
    model = Held(is_held=True)

    async def work(batcher: Batcher) -> list[Any]:
        first = await begun(batcher.run(model, ["a"]))
        await is_asked(model)
        jobs = [batcher.run(model, texts) for texts in (["b"], ["c", bad, "d"], ["e"])]
        tasks = await begun(*jobs)
        model.may_answer.set()
        await asyncio.gather(*first)
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    before, fault, after = run(work)
    assert before == after == [1]
    assert isinstance(fault, Refusal) and fault.reason == "fault" and why in fault.sentence


def test_the_model_whose_request_waited_longest_is_next() -> None:
    first, second = Held(is_held=True), Held()

    async def work(batcher: Batcher) -> None:
        tasks = await begun(batcher.run(first, ["a"]))
        await is_asked(first)
        tasks += await begun(batcher.run(second, ["b"]), batcher.run(first, ["c"]))
        first.may_answer.set()
        assert await asyncio.gather(*tasks) == [[1], [1], [1]]

    run(work)
    assert first.batches == [["a"], ["c"]] and second.batches == [["b"]]


def test_its_end() -> None:
    model = Held(is_held=True)

    async def work(batcher: Batcher) -> None:
        tasks = await begun(batcher.run(model, ["a"]))
        await is_asked(model)
        tasks += await begun(batcher.run(model, ["b"]))
        slow = batcher.arrival()
        batcher.end()
        with pytest.raises(Refusal, match="the server ends"):
            await batcher.run(model, ["c"])
        batcher.give_up()
        with pytest.raises(Refusal, match="the server ends"):
            await batcher.run(model, ["d"], slow)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(answer, Refusal) and answer.reason == "ending" for answer in answers)
        model.may_answer.set()

    run(work)


def test_a_request_that_was_tokenised_when_the_end_began_is_answered() -> None:
    async def work(batcher: Batcher) -> None:
        early = batcher.arrival()
        batcher.end()
        assert await batcher.run(Held(), ["a"], early) == [1]
        with pytest.raises(Refusal, match="the server ends"):
            await batcher.run(Held(), ["b"], batcher.arrival())

    run(work)
