"""encode_many on random arrivals: order, each text once, bounded windows and batches, each as alone;
and the copies beside the computing, with a stand-in for a GPU's lanes."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import repeat
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertModel

import family_models
import pruned_ops
from head_models import stock
from inputs import padded_batch, pruned_model, stock_model
from pruned_ops.layers.packing import PackedBatch
from pruned_ops.runtime.batch_runner import LOOK_AHEAD, BatchRunner, CudaLanes, HostLanes, Tensors
from pruned_ops.runtime.streaming import RefusedText, encode_many

HUNG = 300  # seconds after which a thread or a child is taken to hang
FAST = pruned_ops.optimize(stock_model())


class StandInLanes:
    """Lanes like a GPU's: a copy holds nothing useful before it is waited for, and one batch is ahead."""

    ahead = 1

    def __init__(self) -> None:
        self.log: list[str] = []
        self.waited = 0

    def to_device(self, host: Tensors) -> Callable[[], Tensors]:
        return self._copied("in", host)

    def to_host(self, device: Tensors) -> Callable[[], Tensors]:
        return self._copied("out", device)

    def _copied(self, name: str, source: Tensors) -> Callable[[], Tensors]:
        self.log.append(f"{name} begins")
        there = {key: torch.full_like(tensor, -1) for key, tensor in source.items()}

        def arrive() -> Tensors:
            self.log.append(f"{name} ends")
            for key, tensor in source.items():
                there[key].copy_(tensor)
            return there

        return arrive

    def wait(self) -> None:
        self.waited += 1


def text(length: int, seed: int) -> list[int]:
    return torch.randint(5, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model: Any, ids: list[int]) -> Any:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]))


def shapes_of(model: nn.Module, seen: list[tuple[int, ...]]) -> Any:
    """A hook that notes the shape of each batch."""
    return model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 80), max_size=120), tokens=st.integers(1, 200), overlapped=st.booleans()
)
def test_random_arrivals(lengths: list[int], tokens: int, overlapped: bool) -> None:
    """Each text comes out once, in order, as it does alone; windows, batches and what is held are bounded."""
    texts = [text(length, seed) for seed, length in enumerate(lengths)]
    seen: list[tuple[int, ...]] = []
    read = 0

    def arrivals() -> Iterator[list[int]]:
        nonlocal read
        for one in texts:
            read += 1
            yield one

    lanes = StandInLanes() if overlapped else HostLanes()
    hook = shapes_of(FAST, seen)
    given_back = 0
    try:
        for found in encode_many(FAST, arrivals(), tokens, lanes):
            held = sum(lengths[given_back:read])
            # The window that is computed, the one that is read meanwhile, and on a GPU the one before.
            longest = max(lengths)
            windows = (2 + lanes.ahead) * (LOOK_AHEAD * tokens + longest)
            assert held <= windows + 2 * lanes.ahead * max(tokens, longest)
            assert found.start_logits.shape == (lengths[given_back],)
            given_back += 1
    finally:
        hook.remove()
    assert given_back == read == len(texts)
    assert sum(batch for batch, _ in seen) == len(texts)
    assert all(batch * longest <= tokens or batch == 1 for batch, longest in seen)


def test_results_are_copied_to_the_host_whatever_device_is_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch refuses pinned memory on a GPU, which is the default device of many programs."""
    stream = SimpleNamespace(record_event=lambda: stream, wait_event=lambda _: None, synchronize=lambda: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **others: empty(*size, **others))
    with torch.device("meta"):
        results = CudaLanes(torch.device("cuda")).to_host({"logits": torch.ones(2, 3, device="cpu")})()
    assert torch.equal(results["logits"], torch.ones(2, 3))


@pytest.mark.parametrize("overlapped", [False, True])
def test_each_text_gives_what_it_gives_alone(model: Any, overlapped: bool) -> None:
    fast = pruned_ops.optimize(model)
    texts = [text(1 + 11 * seed % 40, seed) for seed in range(30)]
    lanes = StandInLanes() if overlapped else None
    for ids, found in zip(texts, encode_many(fast, texts, 64, lanes), strict=True):
        expected = alone(fast, ids)
        assert type(found) is type(expected) and not found.start_logits.is_inference()
        for name in ("start_logits", "end_logits"):
            torch.testing.assert_close(found[name], expected[name][0], rtol=1e-4, atol=1e-5)
            assert found[name].untyped_storage().nbytes() == 4 * len(ids)  # no batch is kept with it


def test_little_is_padded_and_few_batches_are_run() -> None:
    """Sorted within a window: what arrives long and short in turn is computed by like lengths."""
    seen: list[tuple[int, ...]] = []
    hook = shapes_of(FAST, seen)
    lengths = [70, 5] * 200
    list(FAST.encode_many((text(length, 1) for length in lengths), tokens_per_batch=700))
    hook.remove()
    assert sum(batch * longest for batch, longest in seen) <= 1.2 * sum(lengths)
    assert len(seen) <= 2 * sum(lengths) / 700


def test_copies_run_beside_the_computing() -> None:
    """The next batch is on its way before this one is computed, and before the last one's results are."""
    lanes = StandInLanes()
    batches = [[text_of(4)], [text_of(5)], [text_of(6)]]
    computed: list[int] = []

    def model(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        lanes.log.append("computed")
        computed.append(input_ids.size(1))
        assert bool((attention_mask == 1).all()) and int(input_ids.min()) >= 5  # it has arrived
        return input_ids

    runner = BatchRunner(model, 0, torch.device("cpu"), lambda output: {"ids": output}, lanes)
    found = [results["ids"].shape for _, results in runner.run(batches)]
    assert computed == [4, 5, 6] and found == [(1, 4), (1, 5), (1, 6)] and lanes.waited == 1
    one = ["in ends", "computed", "out begins"]
    expected = ["in begins", "in begins", *one, "in begins", *one, "out ends", *one, "out ends", "out ends"]
    assert lanes.log == expected


def text_of(length: int) -> Any:
    class Text:
        input_ids = text(length, 0)
        token_type_ids = None

        def __len__(self) -> int:
            return length

    return Text()


def test_who_stops_early_leaves_nothing_on_its_way() -> None:
    lanes = StandInLanes()
    stream = encode_many(FAST, ([7, 8] for _ in iter(int, 1)), 8, lanes)  # without end
    next(stream)
    stream.close()
    assert lanes.waited == 1


def test_the_gpu_is_not_asked_for_lengths_that_the_host_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor] = []
    plain = PackedBatch.from_mask.__func__  # type: ignore[attr-defined]

    def from_mask(cls: Any, mask: Tensor, *rest: Any) -> Any:
        masks.append(mask)
        batch = plain(cls, mask, *rest)
        mask[:, 0] = 7  # where the lengths are told nobody looks at the mask, and so nobody waits
        again = plain(cls, mask, *rest)
        assert again.lengths == batch.lengths == (3, 1)
        return batch

    classifier = pruned_ops.optimize(stock("bert", "sequence"))  # which would look at position 0
    with monkeypatch.context() as patched:
        patched.setattr(PackedBatch, "from_mask", classmethod(from_mask))
        for model in (FAST, classifier):
            assert len(list(model.encode_many([[7, 8, 9], [7]]))) == 2
    assert len(masks) == 2
    wrong = torch.tensor([[0, 1, 1]])
    with pytest.raises(ValueError, match="reads position 0"):
        classifier(input_ids=torch.full((1, 3), 7), attention_mask=wrong)
    known = PackedBatch.from_mask(None, 1, 3, torch.device("cpu"))
    classifier(input_ids=torch.full((1, 3), 7), attention_mask=wrong, packed_batch=known)  # nobody looks


def test_other_heads() -> None:
    texts = [text(length, length) for length in (9, 3, 30)]
    for kind in ("bert", "roberta"):
        for head in ("sequence", "token"):
            fast = pruned_ops.optimize(stock(kind, head))
            for ids, found in zip(texts, fast.encode_many(texts), strict=True):
                assert found.logits.shape == ((3,) if head == "sequence" else (len(ids), 3))
                torch.testing.assert_close(found.logits, alone(fast, ids).logits[0], rtol=1e-4, atol=1e-5)


def test_a_bare_encoder_and_a_head_of_ones_own() -> None:
    encoder = pruned_ops.optimize(BertModel(stock_model().config).eval())
    ids = text(6, 0)
    (found,) = encoder.encode_many([ids])
    torch.testing.assert_close(found.last_hidden_state, alone(encoder, ids).last_hidden_state[0])
    torch.testing.assert_close(found.pooler_output, alone(encoder, ids).pooler_output[0])

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = BertModel(stock_model().config), nn.Linear(64, 2)

        def forward(self, **batch: Tensor) -> Any:
            return self.head(self.encoder(**batch).last_hidden_state[:, 0])

    own = pruned_ops.optimize(Own().eval())
    (label,) = own.encode_many([ids])
    torch.testing.assert_close(label, alone(own, ids)[0])
    inner = own.encoder
    for output, message in (
        (
            lambda **batch: inner(**batch).last_hidden_state,
            "one tensor .batch, labels.; this one gives a Tensor",
        ),
        (lambda **batch: tuple(inner(**batch).values()), "this one gives a tuple"),
        (lambda **batch: {"x": inner(**batch).pooler_output}, "does not know how x belongs to the texts"),
    ):
        own.forward = output
        with pytest.raises(ValueError, match=message):
            list(own.encode_many([ids]))


def test_token_types_reach_the_model() -> None:
    ids, types = text(6, 0), [0, 0, 0, 1, 1, 1]
    plain, typed = FAST.encode_many([ids, {"input_ids": torch.tensor([ids]), "token_type_ids": types}])
    with torch.inference_mode():
        expected = FAST(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types]))
    torch.testing.assert_close(typed.start_logits, expected.start_logits[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(typed.start_logits, plain.start_logits)


def test_without_a_table_of_positions_a_text_may_have_any_length() -> None:
    """Here one of 100 tokens, where the config says 80."""
    fast = pruned_ops.optimize(family_models.stock("DebertaV2", ""))
    ids = text(100, 0)
    (found,) = encode_many(fast, [ids])
    expected = alone(fast, ids).last_hidden_state[0]
    torch.testing.assert_close(found.last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RefusedText, match="has 0 tokens; the model takes at least 1"):
        list(encode_many(fast, [[]]))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "text 2 has 0 tokens; the model takes 1 to 80"),
        ([7] * 81, "text 2 has 81 tokens"),
        ({"input_ids": [7, 8], "attention_mask": [1, 0]}, "text 2 is padded"),
        ({"input_ids": [7, 8], "token_type_ids": [1]}, "text 2 has 2 input_ids, but 1 token_type_ids"),
        ({"input_ids": [7], "position_ids": [3]}, "text 2 has position_ids; encode_many reads input_ids and"),
        ({"token_type_ids": [1]}, "text 2 has no input_ids"),
        ([0.5], r"text 2 cannot be read: its input_ids are torch.float32 \(1,\); whole numbers"),
        ("abc", "text 2 cannot be read: its input_ids are no numbers"),
        ([[7, 8], [7, 8]], r"text 2 cannot be read: its input_ids are torch.int64 \(2, 2\)"),
        ([7, 100], "text 2 cannot be run: input_ids holds 100; its table has 100 rows"),
        ({"input_ids": [7], "token_type_ids": [2]}, "text 2 cannot be run: token_type_ids holds 2; its"),
    ],
)
def test_bad_texts_are_named_after_the_results_before_them(bad: Any, message: str) -> None:
    stream = FAST.encode_many([[7, 8], [9], bad, [7]])
    assert [len(one.start_logits) for one in (next(stream), next(stream))] == [2, 1]
    with pytest.raises(ValueError, match=message):
        next(stream)


def test_a_refused_text_does_not_cost_the_others() -> None:
    several = [[7, 8], [], [9], "abc", [7, 8], [5000]]
    for texts in (several, iter(several)):
        found = list(FAST.encode_many(texts, keep_refused=True))
        assert [one.index for one in found if isinstance(one, RefusedText)] == [1, 3, 5]
        assert [len(found[place].start_logits) for place in (0, 2, 4)] == [2, 1, 2]
    same = pickle.loads(pickle.dumps(found[3]))  # as a pool of processes hands it over
    assert type(same) is RefusedText and (str(same), same.index) == (str(found[3]), 3)


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_text_may_wait_for_the_results_of_the_one_before(overlapped: bool) -> None:
    results: Queue[Any] = Queue()

    def person() -> Iterator[Any]:
        for ids in ([7], [], [7, 8], [7, 8, 9]):
            yield ids
            results.get(timeout=HUNG)

    lanes, lengths = StandInLanes() if overlapped else HostLanes(), []
    for found in encode_many(FAST, person(), lanes=lanes, keep_refused=True):
        lengths.append(0 if isinstance(found, RefusedText) else len(found.start_logits))
        results.put(found)
    assert lengths == [1, 0, 2, 3]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_that_goes_on_with_its_parents_results_is_told() -> None:
    stream = FAST.encode_many(iter([[7, 8]] * 3), tokens_per_batch=2)
    next(stream)

    def child() -> None:
        with pytest.raises(RuntimeError, match="this stream was begun in process"):
            next(stream)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(HUNG)
    assert process.exitcode == 0 and len(list(stream)) == 2


def test_an_error_of_the_model_leaves_no_thread_waiting() -> None:
    model = pruned_ops.optimize(stock_model())

    def fails(*args: Any) -> None:
        raise OSError("the model is gone")

    hook = model.register_forward_pre_hook(fails)
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="the model is gone") as failure:
        next(model.encode_many(repeat([7, 8]), tokens_per_batch=2))
    for thread in set(threading.enumerate()) - before:
        thread.join(HUNG)
        assert not thread.is_alive(), failure  # whose traceback holds the stream
    hook.remove()


def test_an_error_of_the_iterable_comes_after_the_results_before_it() -> None:
    def broken() -> Iterator[list[int]]:
        yield [7, 8]
        raise OSError("the disk is gone")

    stream = FAST.encode_many(broken())
    assert len(next(stream).start_logits) == 2
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)


def test_what_is_no_stream_of_texts_is_refused_at_once() -> None:
    for wrong in ("text", {"input_ids": [1]}, 3):
        with pytest.raises(ValueError, match="an iterable of tokenised texts is needed"):
            FAST.encode_many(wrong)
    for tokens in (0, True, 1.5):
        with pytest.raises(ValueError, match="tokens_per_batch is"):
            FAST.encode_many([[7]], tokens)
    with pytest.raises(ValueError, match="takes an optimised model"):
        encode_many(stock_model(), [[7]])


def test_it_comes_and_goes_with_optimize() -> None:
    model = pruned_ops.optimize(pruned_model())
    twin = pickle.loads(pickle.dumps(model))
    assert twin.encode_many.args == (twin,)
    assert not hasattr(pruned_ops.restore(model), "encode_many")
    padded = padded_batch((3, 2))
    found = list(twin.encode_many(ids[mask.bool()] for ids, mask in zip(*padded.values(), strict=True)))
    assert [len(one.end_logits) for one in found] == [3, 2]
