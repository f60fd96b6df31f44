"""Times of a GPU by launches of graphs, with stand-ins for the GPU: what is recorded and how often, and that
a latency table is measured by them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig

from pruned_ops import ops
from pruned_ops.layers import parts
from pruned_ops.measure import layer_times
from pruned_ops.measure.graph_timing import CALLS, WARM_UP, GraphClock, replay_seconds
from pruned_ops.measure.layer_times import measure_table
from pruned_ops.measure.timing import Workload
from pruned_ops.ops.registry import is_given_up


class Recorder:
    """Runs the work once while it records, as a GPU's recorder does, and never at a launch."""

    def __init__(self) -> None:
        self.recorded, self.launched = 0, 0

    def record(self, work: Callable[[], Any]) -> Callable[[], Any]:
        self.recorded += 1
        output = work()

        def replay() -> Any:
            self.launched += 1
            return output

        return replay

    def ordered(self) -> Any:
        return nullcontext()

    def wait(self) -> None:
        pass


def test_a_graph_holds_many_calls_on_inputs_in_turn() -> None:
    recorder, ran = Recorder(), list[int]()
    calls = [lambda i=i: ran.append(i) for i in range(5)]
    clocked: list[Any] = []

    def clock(call: Callable[[], Any]) -> float:
        clocked.append(call)
        call()
        return 50.0

    seconds = replay_seconds(calls, 4, recorder, clock)
    repeats = -(-CALLS // 5)
    assert ran == [*range(5)] * repeats  # recorded in turn, and not run again
    assert seconds == (50.0 / (5 * repeats),) * 4
    assert len(clocked) == 5 and recorder.launched == 5 and recorder.recorded == 1  # one is not counted


def test_no_output_of_a_turn_lends_its_memory_to_another() -> None:
    """Freed at once, the outputs of all calls would be one block, which L2 holds."""
    alive: set[int] = set()
    most = 0

    class Output:
        def __init__(self) -> None:
            nonlocal most
            alive.add(id(self))
            most = max(most, len(alive))

        def __del__(self) -> None:
            alive.discard(id(self))

    replay_seconds([Output] * 5, 1, Recorder(), lambda call: 1.0)
    assert 5 <= most <= 10  # those of a turn, and of the one before


def test_a_gpu_is_busy_for_a_while_before_it_is_timed() -> None:
    """Its clock is low while a kernel is compiled, and takes a while to rise."""
    worked = [0.0]

    def clock(call: Callable[[], Any]) -> float:
        took = 0.0024 if worked[0] > WARM_UP / 2 else 0.0072
        worked[0] += took
        return took

    assert replay_seconds([lambda: None], 3, Recorder(), clock) == pytest.approx((1e-4,) * 3)


def test_the_hosts_time_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both events are recorded while the same work is on the GPU already."""
    from pruned_ops.measure.graph_timing import queued_seconds

    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            order.append("event")

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, other: Any) -> float:
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert queued_seconds(lambda: order.append("work")) == 0.003
    assert order == ["work", "event", "work", "event", "wait"]


def test_a_latency_table_is_measured_by_graphs() -> None:
    """Chains are captured once for each batch, and the model with empty layers is timed as a call."""
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, vocab_size=50,
        max_position_embeddings=20,
    )  # fmt: skip
    recorder, alone = Recorder(), list[Any]()

    def clock_alone(call: Callable[[], Any]) -> float:
        alone.append(call())
        return 2e-3

    clock = GraphClock(["base"], recorder, lambda replay: 1e-3, clock_alone)
    workload = Workload("tiny", ((5, 3), (9, 1)))
    table = measure_table(config, workload, rounds=3, progress=False, clock=clock)
    parts = len(table.attention) + len({*dict(table.ffn), 8, 24})
    assert recorder.recorded >= 2 * (len(table.attention) + len(table.ffn))
    assert recorder.recorded <= 2 * (parts + 10) and len(alone) == 1 + 3 * 2
    assert {ms for _, ms in table.attention} == {0.5}  # two parts a chain


def test_parts_are_timed_on_weights_that_lie_as_an_optimised_models_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU FFN widths are filled up, and what an earlier part computed is added to in its own memory."""
    seen = list[tuple[int, bool]]()

    def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        seen.append((weight.size(0), is_given_up(x)))
        return ops.linear_gelu.reference(x, weight, bias)

    monkeypatch.setattr(layer_times.PanelWeights, "refuse", lambda parts: "as on a GPU")
    monkeypatch.setattr(layer_times.AlignedWeights, "refuse", lambda parts: None)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40, vocab_size=50
    )
    empty, dense = layer_times.empty_config(config)
    runners = layer_times.part_runners(empty, dense, "cpu")
    (batch,) = layer_times.part_inputs(empty, Workload("tiny", ((5, 3),)), "cpu")
    x = batch["x"].clone()
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(parts, "ops", SimpleNamespace(**vars(ops) | {"linear_gelu": linear_gelu}))
        for name in ("ffn 24", "attention 2"):
            assert runners[name](batch).shape == x.shape
    assert seen == [(32, False), (32, True), (32, True)] and torch.equal(batch["x"], x)
