"""The engine and encode_many with real CUDA graphs and streams, where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import pruned_ops
from family_models import ANSWERS, stock
from head_models import MODELS, fields
from pruned_ops.measure.timing import event_seconds
from stand_in_graphs import ids_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


# Every head of BERT, and families whose attention depends on positions.
MADE = {**MODELS, **{stem: lambda stem=stem: stock(stem, ANSWERS) for stem in ("MPNet", "ModernBert")}}


def on_gpu(kind: str, graphs: bool = True) -> Any:
    return pruned_ops.optimize(MADE[kind]().cuda().half(), graphs=graphs)


def batch_of(lengths: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in ids_of(lengths, seed).items()}


def close(output: Any, expected: Any) -> None:
    for name, value in fields(expected).items():
        torch.testing.assert_close(output[name], value, rtol=2e-2, atol=2e-2)


def nearly_as_exact(output: Any, other: Any, exact: Any) -> None:
    """Two fp16 runs of different kernels differ in rare elements by more than either differs from fp32 in
    most, so that both are compared with fp32: the one may be twice as far from it as the other."""
    for name, value in fields(exact).items():
        real = value > torch.finfo(torch.float16).min  # padded positions hold a dtype's minimum
        errors = [(one[name].float() - value)[real].norm() for one in (output, other)]
        assert errors[0] <= 2 * errors[1] + 1e-3 * value[real].norm(), name


@pytest.mark.parametrize("kind", MADE)
def test_graphs_are_as_exact_as_eager(kind: str) -> None:
    eager, fast = on_gpu(kind, graphs=False), on_gpu(kind)
    exact = pruned_ops.optimize(MADE[kind]().cuda(), graphs=False)
    for _ in range(2):
        for seed, lengths in enumerate(((20, 3, 11), (7, 40), (9, 9, 9), (77,))):
            batch = batch_of(lengths, seed)
            nearly_as_exact(fast(**batch), eager(**batch), exact(**batch))
    assert fast.engine.stats.replays == 8
    assert bool(fast.engine.stats.outside) == (kind == "MPNet")  # its forward hands nothing on to the encoder


def test_two_graphs_that_are_shared_and_dropped_serve_all_sizes() -> None:
    """Graphs of one pool of memory, whose place others take."""
    eager, fast = on_gpu("question-answering", graphs=False), on_gpu("question-answering")
    exact = pruned_ops.optimize(MADE["question-answering"]().cuda(), graphs=False)
    fast.engine.max_graphs = 2
    for i in range(20):
        batch = batch_of((2 + 7 * i % 30, 40 - i, 1 + 11 * i % 17)[: 1 + i % 3], i)
        nearly_as_exact(fast(**batch), eager(**batch), exact(**batch))
    stats = fast.engine.stats
    assert stats.replays == 20 and stats.evicted == stats.captures - 2 > 0 and len(fast.engine) == 2


def test_threads_and_streams_get_their_own_answers() -> None:
    eager, fast = on_gpu("question-answering", graphs=False), on_gpu("question-answering")
    batches = [batch_of((3 + i, 20 - i), i) for i in range(16)]
    expected = [eager(**batch) for batch in batches]
    torch.cuda.synchronize()

    def run(batch: dict[str, torch.Tensor]) -> Any:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = fast(**batch)
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(run, batches * 8), expected * 8, strict=True):
            close(found, wanted)


def test_warm_up_and_weights_that_move() -> None:
    fast = on_gpu("question-answering")
    assert fast.engine.warm_up([(10, 7), (30,)]) == 2
    batch = batch_of((10, 7))
    first = fast(**batch)
    assert fast.engine.stats.captures == 2 and fast.engine.stats.replays == 1
    fast.float().half()
    torch.cuda.empty_cache()
    close(fast(**batch), first)
    layer = fast.base_model.packed.encoder.layers[0]
    layer.ffn.norm.weight.data = layer.ffn.norm.weight.data.clone()
    torch.cuda.empty_cache()  # what the graph reads is still there when it is looked at
    close(fast(**batch), first)
    assert fast.engine.stats.invalidated == 2


def test_encode_many_on_streams_of_its_own() -> None:
    fast = on_gpu("question-answering")

    def texts() -> Iterator[list[int]]:
        for i in range(300):
            yield ids_of((1 + 7 * i % 60,), i)["input_ids"][0].tolist()

    for ids, found in zip(texts(), fast.encode_many(texts(), 400), strict=True):
        alone = fast(input_ids=torch.tensor([ids]).cuda())
        assert not found.start_logits.is_cuda
        torch.testing.assert_close(found.start_logits, alone.start_logits[0].cpu(), rtol=2e-2, atol=2e-2)


@pytest.mark.alone
def test_a_replay_costs_the_host_little() -> None:
    """A graph leaves no gap between launches, so the time of a small batch hardly depends on the layers."""
    fast = on_gpu("question-answering")
    batch = batch_of((8,))
    with torch.inference_mode():
        for _ in range(5):
            fast(**batch)
        assert min(event_seconds(lambda: fast(**batch)) for _ in range(50)) < 2e-3
