"""The engine without a GPU: buckets, copies, eviction, weights that move, threads; a stand-in for graphs."""

from __future__ import annotations

import copy
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pruned_ops
from family_models import ANSWERS, batch, largest_difference, outputs, stock
from inputs import padded_batch, pruned_model, stock_model
from pruned_ops.layers.packing import PackedBatch
from pruned_ops.layers.weights import AlignedWeights, PanelWeights
from pruned_ops.ops.registry import BACKENDS, Backend
from pruned_ops.runtime.cuda_graphs import CAPTURE
from pruned_ops.runtime.engine import Engine, pieces
from pruned_ops.runtime.packed_encoder import PackedEncoder
from stand_in_graphs import StandIn, ids_of, with_engine

STEP = 0.05


def same(found: Any, expected: Any) -> None:
    for name in ("start_logits", "end_logits"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=5))
def test_random_arrivals_are_answered_as_without_graphs(arrivals: list[list[int]]) -> None:
    """Results do not depend on what ran before, and are the caller's own."""
    model = stock_model()
    eager = [pruned_ops.optimize(model)(**ids_of(lengths, i)) for i, lengths in enumerate(arrivals)]
    fast, engine = with_engine(model)
    found = [fast(**ids_of(lengths, i)) for i, lengths in enumerate(arrivals)]
    for one, expected in zip(found, eager, strict=True):
        same(one, expected)
    assert engine.stats.replays == len(arrivals) and engine.stats.eager == 0
    assert engine.stats.wasted <= STEP * engine.stats.tokens == STEP * sum(map(sum, arrivals))


def test_every_model_runs_by_graphs(model: Any) -> None:
    """The batch has holes, left padding, and a row of padding only."""
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    expected = pruned_ops.optimize(model)(**batch)
    fast, engine = with_engine(model)
    same(fast(**batch), expected)
    assert engine.stats.replays == 1


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers lie as on a GPU, and run op by op; no positions are checked, such as those of filling rows."""
    monkeypatch.setattr(AlignedWeights, "refuse", staticmethod(lambda parts: None))
    monkeypatch.setattr(PanelWeights, "refuse", staticmethod(lambda parts: "not now"))
    monkeypatch.setattr(pruned_ops.ops.attention, "kernels", {})
    monkeypatch.setattr(pruned_ops.ops.attention, "check_values", None)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("stem", ["MPNet", "ModernBert"])
def test_positions_and_places_are_in_the_graph(stem: str) -> None:
    """Batches padded anywhere and not at all share it, whatever places its filling rows have kept."""
    model = stock(stem, ANSWERS)
    batches = [batch(kind, (14, 18, 2)) for kind in ("left", "holes", "right")] + [ids_of([17, 17])]
    eager = [outputs(pruned_ops.optimize(model), inputs) for inputs in batches]
    fast, engine = with_engine(model)
    for inputs, expected in [*zip(batches, eager, strict=True)] * 2:
        assert largest_difference(outputs(fast, inputs), expected) <= 2e-5
    assert engine.stats.replays == 8 and engine.stats.eager == engine.stats.invalidated == 0
    assert bool(engine.stats.outside) == (stem == "MPNet")  # its forward hands nothing on to the encoder


@pytest.mark.parametrize("first", [True, False])
def test_callers_in_inference_mode_and_others_share_graphs(first: bool) -> None:
    fast, engine = with_engine(stock_model())
    batch = ids_of([9, 3])
    found = []
    for mode in (first, not first, first):
        with torch.inference_mode(mode):
            found.append(fast(**batch).start_logits)
    assert engine.stats.captures == 1 and engine.stats.replays == 3
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_batches_of_nothing_and_hidden_states_run_eagerly() -> None:
    fast, engine = with_engine(stock_model())
    nothing = {"input_ids": torch.zeros(2, 3, dtype=torch.int64), "attention_mask": torch.zeros(2, 3)}
    assert fast(**nothing).start_logits.shape == (2, 3) and engine.stats.eager == 1
    states = fast(**ids_of([4, 7]), output_hidden_states=True).hidden_states
    assert len(states) == fast.config.num_hidden_layers + 1 and engine.stats.replays == 0
    assert engine.stats.eager == 2


def test_a_large_batch_is_split_between_sequences() -> None:
    model = stock_model()
    batch = ids_of([30, 8, 25, 40, 1])
    expected = pruned_ops.optimize(model)(**batch)
    fast, engine = with_engine(model, max_tokens=40)
    same(fast(**batch), expected)
    assert engine.stats.replays == 4 and engine.stats.tokens == 104  # 30 + 8, 25, 40, 1


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=30), most=st.integers(1, 120))
def test_pieces_hold_every_sequence_once(lengths: list[int], most: int) -> None:
    cut = list(pieces(lengths, most))
    assert [length for _, piece in cut for length in piece] == lengths
    bounds = [0]
    for first, piece in cut:
        assert first == bounds[-1] and (sum(piece) <= most or sum(map(bool, piece)) == 1)
        bounds.append(first + sum(piece))


def test_graphs_used_longest_ago_go() -> None:
    fast, engine = with_engine(stock_model(), max_graphs=2)
    for tokens in (10, 20, 10, 30, 10, 20):
        fast(**ids_of([tokens]))
    # 30 replaced 20, the older one then; 20 replaced 30. Each time a graph may run still.
    assert len(engine) == 2 and engine.stats.captures == 4 and engine.stats.evicted == 2
    assert engine._recorder.waited == 2


def test_where_all_graphs_are_taken_a_batch_shares_one_that_holds_it() -> None:
    fast, engine = with_engine(stock_model(), max_graphs=1)
    batches = [ids_of(lengths, sum(lengths)) for lengths in ((20, 12, 10), (25, 14), (40, 35))]
    eager = [pruned_ops.optimize(stock_model())(**inputs) for inputs in batches]
    for i in (0, 1, 0, 2, 0):
        same(fast(**batches[i]), eager[i])
    # 39 tokens ran as 42. 75 made room for themselves, as 76, and so did 42 after them.
    assert engine.stats.captures == 3 and engine.stats.evicted == 2 and engine.stats.wasted == 3 + 1


def test_batches_of_all_sizes_record_few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server has them. If each size had its own graph, 71% would record one."""
    _, engine = with_engine(stock_model())
    graph = lambda bucket, _: SimpleNamespace(inputs=SimpleNamespace(bucket=bucket))  # noqa: E731
    monkeypatch.setattr(engine, "_captured", graph)
    chance = random.Random(0)
    for _ in range(2):  # a first half in which most sizes are new
        before, tokens, rows = engine.stats.captures, 0, 0
        for _ in range(1500):
            lengths = [min(int(chance.lognormvariate(4, 0.6)) + 3, 512) for _ in range(chance.randint(1, 8))]
            found: Any = engine._graph(sum(lengths), len(lengths), max(lengths), None)
            tokens, rows = tokens + sum(lengths), rows + found.inputs.bucket.tokens
    assert engine.stats.captures - before < 0.1 * 1500 and rows < 1.04 * tokens
    assert len(engine) == engine.max_graphs


def test_warm_up_captures_what_then_only_runs() -> None:
    fast, engine = with_engine(stock_model())
    assert engine.warm_up([(10, 7), (30,), (10, 7)]) == 2
    fast(**ids_of([10, 7]))
    fast(**ids_of([30]))
    assert engine.stats.captures == 2 and engine.stats.replays == 2
    with pytest.raises(RuntimeError, match="do not run by CUDA graphs here"):
        pruned_ops.optimize(stock_model()).engine.warm_up([(3,)])


def test_tuning_is_of_the_sizes_that_graphs_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice for another number of tokens would never be found. Graphs from before have other kernels. What
    is timed is captured, which two threads cannot do at once."""
    fast, engine = with_engine(stock_model(), max_tokens=6000)
    fast(**ids_of([9, 3]))
    timed: list[tuple[int, ...]] = []

    def tune(shape: Any, batches: Any, *_: Any, **kind: Any) -> int:
        assert CAPTURE.is_held
        timed.extend(batches)
        return len(batches)

    monkeypatch.setitem(BACKENDS, "triton", Backend("triton", None, "", tune=tune))
    monkeypatch.setattr(PackedEncoder, "device", torch.device("cuda", 0))
    asked = [(300,) * 17 + (100,), (12,) * 9 + (1,), (4000, 4000)]
    assert pruned_ops.tune(fast, asked) == 4
    assert [sum(lengths) for lengths in timed] == [5376, 112, 4096, 4096]  # of 5,200, 109, and twice 4,000
    assert [max(lengths) for lengths in timed] == [320, 16, 4032, 4032]
    assert len(engine) == 0 and engine.stats.invalidated == 1
    fast.base_model.packed.engine = None
    assert pruned_ops.tune(fast, asked) == 3 and timed[4:] == asked
    assert not CAPTURE.is_held


def test_moved_cast_and_replaced_weights_are_never_read_at_their_old_place() -> None:
    fast, engine = with_engine(stock_model())
    batch = ids_of([12, 5])
    fast(**batch)
    fast.half().float()
    assert len(engine) == 0
    first = fast(**batch).start_logits
    words = fast.base_model.embeddings.word_embeddings
    words.weight.data = words.weight.data.flip(0)  # elsewhere in memory, and nobody said so
    second = fast(**batch).start_logits
    assert not torch.allclose(second, first) and engine.stats.invalidated == 2
    words.weight = torch.nn.Parameter(words.weight.data.flip(0), requires_grad=False)  # another one
    assert torch.equal(fast(**batch).start_logits, first) and engine.stats.invalidated == 3
    fast.base_model.packed.encoder.layers[0].ffn.norm.double().float()  # a part of it
    fast.base_model.packed.encoder.pack(keep_weights=True)  # in another layout
    assert torch.equal(fast(**batch).start_logits, first) and engine.stats.invalidated == 4


@pytest.mark.usefixtures("as_on_a_gpu")
def test_all_that_a_head_reads_is_looked_at() -> None:
    """Also what comes before its last linear, which a graph would go on reading at its old place."""
    fast, engine = with_engine(stock("ModernBert", ANSWERS))
    batch = ids_of([12, 5])
    first = fast(**batch).start_logits
    for count, module in enumerate((fast.head.dense, fast.head.norm, fast.classifier), start=1):
        module.weight.data = module.weight.data.clone()
        assert torch.equal(fast(**batch).start_logits, first) and engine.stats.invalidated == count
    fast.head.norm = copy.deepcopy(fast.head.norm)
    assert torch.equal(fast(**batch).start_logits, first) and engine.stats.invalidated == 4
    assert torch.equal(fast(**batch).start_logits, first) and engine.stats.invalidated == 4


def test_restore_and_casts_hold_no_memory_for_graphs() -> None:
    fast, engine = with_engine(stock_model())
    fast(**ids_of([12, 5]))
    for change in (lambda: fast.to(torch.float64), lambda: pruned_ops.restore(fast)):
        change()
        assert len(engine) == 0
        fast.float()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: operation not permitted when stream is capturing"),
        LookupError("out of resource: shared memory"),  # Triton's errors are plain Exceptions
    ],
)
def test_what_cannot_be_captured_leaves_a_model_that_works(error: Exception) -> None:
    model = stock_model()
    batches = [ids_of([9, 4]), ids_of([50])]
    expected = [pruned_ops.optimize(model)(**batch) for batch in batches]
    fast, engine = with_engine(model, recorder=StandIn(fail_after=1, error=error))
    with pytest.warns(RuntimeWarning, match="runs without graphs from now on") as warned:
        for _ in range(2):
            for batch, one in zip(batches, expected, strict=True):
                same(fast(**batch), one)
    assert len(warned) == 1 and str(error) in str(warned[0].message)
    assert engine.stats.replays == 1 and engine.stats.eager == 3 and len(engine) == 0
    with pytest.raises(RuntimeError, match="could be captured"):
        engine.warm_up([(3,)])


def test_graphs_that_do_not_fit_into_memory_give_way_to_fewer() -> None:
    """Those of today's batches, and not those of the first, are what a server needs."""

    class Small(StandIn):
        def record(self, work: Any) -> Any:
            if len(engine) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().record(work)

    model = stock_model()
    batches = [ids_of([10 * (i + 1)], i) for i in range(7)]
    expected = [pruned_ops.optimize(model)(**inputs) for inputs in batches]
    fast, engine = with_engine(model, recorder=Small())
    for inputs, one in zip(batches, expected, strict=True):
        same(fast(**inputs), one)
    assert engine.stats.replays == 7 and engine.stats.eager == 0
    assert engine.max_graphs == len(engine) == 2 and engine.stats.invalidated == 1


def test_eight_threads_get_their_own_answers() -> None:
    model = pruned_model()
    batches = [ids_of([3 + i, 20 - i], i) for i in range(16)]
    expected = [pruned_ops.optimize(model)(**batch) for batch in batches]
    fast, engine = with_engine(model)
    with ThreadPoolExecutor(8) as pool:
        for one, wanted in zip(pool.map(lambda batch: fast(**batch), batches * 4), expected * 4, strict=True):
            same(one, wanted)
    assert engine.stats.replays == 64


def test_what_watches_single_ops_gets_them() -> None:
    fast, engine = with_engine(stock_model())
    batch = ids_of([9])
    fast(**batch)
    with pruned_ops.record() as ran:
        fast(**batch)
    assert engine.stats.replays == 2 and sum(ran["embed_layer_norm"].values()) == 1
    with pruned_ops.debug():
        fast(**batch)
    with pruned_ops.use_backend("reference"):
        fast(**batch)
    assert engine.stats.replays == 2


def test_copies_and_pickles_begin_without_graphs() -> None:
    fast, engine = with_engine(stock_model())
    batch = ids_of([9, 3])
    expected = fast(**batch)
    for other in (copy.deepcopy(fast.engine), pickle.loads(pickle.dumps(Engine(None)))):
        assert len(other) == 0
    twin = copy.deepcopy(fast)
    assert twin.engine is twin.base_model.packed.engine and twin.engine is not engine
    same(twin(**batch), expected)
    assert twin.engine.stats.captures == 1 and engine.stats.captures == 1
    again = pickle.loads(pickle.dumps(fast))
    same(again(**batch), expected)
    assert again.engine.stats.replays == 1 and again.engine is again.base_model.packed.engine


def test_restore_takes_the_engine_away_and_graphs_can_be_declined() -> None:
    model = pruned_ops.optimize(stock_model())
    assert isinstance(model.engine, Engine) and not model.engine.serves
    assert not hasattr(pruned_ops.restore(model), "engine")
    declined = pruned_ops.optimize(stock_model(), graphs=False)
    assert not hasattr(declined, "engine")
    for graphs in (False, True):  # the default asks for nothing
        assert pruned_ops.optimize(declined, graphs=graphs) is declined and not hasattr(declined, "engine")
    fast = pruned_ops.optimize(model)
    with pytest.raises(ValueError, match="optimised already, and graphs=False would have no effect: .*rest"):
        pruned_ops.optimize(fast, graphs=False)
    assert fast.engine is fast.bert.packed.engine


def test_settings_are_checked() -> None:
    for wrong in ({"waste": 1.0}, {"waste": -0.1}, {"max_tokens": 0}, {"max_graphs": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Engine(None, **wrong)


def test_lengths_of_a_batch_are_known_on_the_host() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]])
    batch = PackedBatch.from_mask(mask, 3, 3, torch.device("cpu"))
    by_hand = PackedBatch(batch.cu_seqlens, 2, batch.index, 3, 3)
    assert batch.lengths == by_hand.lengths == (2, 0, 2)
    assert PackedBatch.from_mask(None, 2, 5, torch.device("cpu")).lengths == (5, 5)
