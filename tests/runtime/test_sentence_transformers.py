"""sentence-transformers around an optimised encoder: the same values by every way in, batches of tokens."""

from __future__ import annotations

import copy
import io
import pickle
import queue
import threading
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

import pruned_ops
from inputs import ODD_SHAPES, pruned_model, stock_model
from pruned_ops.ops.registry import record
from pruned_ops.runtime import texts as texts_module
from pruned_ops.runtime.refusals import refuse_encoder
from text_models import WORDS, sentences, text_folder

st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

CUTS_PAIRS = hasattr(st.CrossEncoder, "preprocess")  # since 5.4
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
MIXED = sentences([3, 40, 0, 11, 1, 0, 25, 7])
INT8 = refuse_encoder(stock_model().bert, int8=True)
needs_multi_vectors = pytest.mark.skipif(
    not hasattr(st, "MultiVectorEncoder"), reason="this sentence-transformers has no MultiVectorEncoder"
)
needs_int8 = pytest.mark.skipif(INT8 is not None, reason=str(INT8))


def multi_vector_encoder(folder: str, expansion: dict[str, Any] | None) -> Any:
    """A ColBERT without a projection, whose queries are filled up as `expansion` says."""
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    modules = [Transformer(folder, query_expansion=expansion), MultiVectorMask()]
    return st.MultiVectorEncoder(modules=modules, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_folder(tmp_path_factory.mktemp("embedder"))


@pytest.fixture
def pair(folder: str) -> tuple[Any, Any]:
    """The same embedder twice: plain, and optimised."""
    prompts = {"query": "w3 w4 ", "passage": "w5 "}
    plain, fast = (st.SentenceTransformer(folder, device="cpu", prompts=dict(prompts)) for _ in range(2))
    return plain, pruned_ops.optimize(fast)


@pytest.fixture
def batches_of_64_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts_module, "TOKENS_ON_A_CPU", 64)
    monkeypatch.setattr(texts_module, "_TOKENS_OF_WIDE_OUTPUTS", 64)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, (np.ndarray, np.generic, torch.Tensor)):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), **CLOSE)
    else:
        assert found == expected


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tensor": {"convert_to_tensor": True},
    "list": {"convert_to_numpy": False},
    "normalised": {"normalize_embeddings": True},
    "truncated": {"truncate_dim": 5},
    "prompt": {"prompt": "w9 w9 "},
    "prompt-name": {"prompt_name": "query"},
    "batch-size": {"batch_size": 3},
    "tokens": {"output_value": "token_embeddings"},
    "int8-vectors": {"precision": "binary"},
}


@pytest.mark.parametrize("call", CALLS)
def test_encode_is_the_same(call: str, pair: tuple[Any, Any], batches_of_64_tokens: None) -> None:
    plain, fast = pair
    for inputs in (MIXED, MIXED[:1], [""], MIXED[1], ""):
        assert_same(fast.encode(inputs, **CALLS[call]), plain.encode(inputs, **CALLS[call]))
    if call != "truncated" or len(plain.encode([], **CALLS[call])) == 0:
        assert_same(fast.encode([], **CALLS[call]), plain.encode([], **CALLS[call]))


def test_all_that_the_forward_puts_out_is_the_same(pair: tuple[Any, Any], batches_of_64_tokens: None) -> None:
    """Where padding is left: what is asked for is cut to each text's real tokens first."""
    # 5.7 itself fails with more than four: it takes a letter of the word "text" for each.
    found, expected = (model.encode(MIXED[:4], output_value=None) for model in pair)
    for one, other in zip(found, expected, strict=True):
        real = other["attention_mask"].bool()
        assert one.keys() == other.keys()
        assert_same(one["token_embeddings"][real], other["token_embeddings"][real])
        assert_same(one["sentence_embedding"], other["sentence_embedding"])
    features = pair[0].tokenize(MIXED)
    found, expected = (model(dict(features))["sentence_embedding"] for model in pair)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_the_forward_takes_its_argument_by_name(pair: tuple[Any, Any], batches_of_64_tokens: None) -> None:
    features = pair[0].tokenize(MIXED)
    found, expected = (model(input=dict(features))["sentence_embedding"] for model in reversed(pair))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_queries_documents_and_similarity(pair: tuple[Any, Any]) -> None:
    plain, fast = pair
    for name in ("encode_query", "encode_document"):
        assert_same(getattr(fast, name)(MIXED), getattr(plain, name)(MIXED))
    assert fast.similarity(*[fast.encode(MIXED)] * 2).shape == (8, 8)


def test_batches_are_bounded_by_tokens(pair: tuple[Any, Any], batches_of_64_tokens: None) -> None:
    """Whatever the caller's batch_size; and no batch is longer than its longest text."""
    plain, fast = pair
    inputs = sentences([2] * 90 + [50] * 7 + [9] * 20)
    seen: list[torch.Tensor] = []
    inner = fast[0]
    inner.register_forward_pre_hook(lambda module, args: seen.append(args[0]["attention_mask"].clone()))
    for batch_size in (1, 32, 1000):
        seen.clear()
        assert_same(fast.encode(inputs, batch_size=batch_size), plain.encode(inputs))
        assert sum(len(mask) for mask in seen) == len(inputs)
        assert all(mask.numel() <= 64 or len(mask) == 1 for mask in seen)
        assert all(int(mask.sum(1).max()) == mask.size(1) for mask in seen)
    assert len(seen) < 30  # short texts fill their batches


def test_ten_thousand_short_texts_keep_their_order(pair: tuple[Any, Any]) -> None:
    fast = pair[1]
    single = fast.encode([f"w{i}" for i in range(WORDS)])
    order = np.random.default_rng(0).integers(WORDS, size=10_000)
    found = fast.encode([f"w{i}" for i in order])
    np.testing.assert_allclose(found, single[order], **CLOSE)


def test_the_encoder_runs_packed(pair: tuple[Any, Any]) -> None:
    with record() as ran:
        pair[1].encode(MIXED)
    assert "embed_layer_norm" in ran


@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_cross_encoder_is_the_same(num_labels: int, tmp_path: Path, batches_of_64_tokens: None) -> None:
    where = text_folder(tmp_path, "CrossEncoder", num_labels=num_labels)
    plain, fast = (st.CrossEncoder(where, device="cpu") for _ in range(2))
    pruned_ops.optimize(fast)
    pairs = [(MIXED[0], text) for text in [*MIXED, *sentences([4] * 50)]]
    for settings in ({}, {"convert_to_tensor": True}, {"convert_to_numpy": False}, {"apply_softmax": True},
                     {"activation_fn": torch.nn.Identity()}, {"batch_size": 2}):  # fmt: skip
        assert_same(fast.predict(pairs, **settings), plain.predict(pairs, **settings))
    assert_same(fast.predict(pairs[0]), plain.predict(pairs[0]))
    assert len(fast.predict([])) == 0
    if num_labels == 1:
        found, expected = (model.rank(MIXED[0], MIXED[:4], return_documents=True) for model in (fast, plain))
        assert [hit["text"] for hit in found] == [hit["text"] for hit in expected]
        assert fast.rank(MIXED[0], MIXED[:4], top_k=2)[1]["corpus_id"] == expected[1]["corpus_id"]
    assert ("forward" in vars(fast)) == CUTS_PAIRS
    fast.save_pretrained(str(tmp_path / "saved"))
    again = st.CrossEncoder(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_array_equal(again.predict(pairs), plain.predict(pairs))


def test_a_sparse_encoder_is_the_same(tmp_path: Path, batches_of_64_tokens: None) -> None:
    where = text_folder(tmp_path, "SparseEncoder")
    plain, fast = (st.SparseEncoder(where, device="cpu") for _ in range(2))
    pruned_ops.optimize(fast)
    for settings in ({}, {"max_active_dims": 7}, {"convert_to_sparse_tensor": False}):
        found, expected = (model.encode(MIXED, **settings) for model in (fast, plain))
        assert found.layout == expected.layout
        torch.testing.assert_close(found.to_dense(), expected.to_dense(), **CLOSE)
    assert_same(
        fast.encode([], convert_to_sparse_tensor=False), plain.encode([], convert_to_sparse_tensor=False)
    )
    together: list[int] = []  # its batch_size has an effect
    fast[0].register_forward_pre_hook(lambda module, args: together.append(len(args[0]["attention_mask"])))
    fast.encode(MIXED, batch_size=2)
    assert sum(together) == len(MIXED) and max(together) <= 2


@needs_multi_vectors
@pytest.mark.parametrize(
    "expansion", [None, {"strategy": "fixed", "attend": True, "length": 12, "token": "w7"}]
)
def test_a_multi_vector_encoder_is_the_same(expansion: dict[str, Any] | None, folder: str) -> None:
    plain, fast = (multi_vector_encoder(folder, expansion) for _ in range(2))
    pruned_ops.optimize(fast)
    queries, documents = MIXED[:2], MIXED[3:]
    for name, inputs in (("encode_query", queries), ("encode_document", documents)):
        assert_same(getattr(fast, name)(inputs), getattr(plain, name)(inputs))
    packed_scores, plain_scores = (
        model.similarity(model.encode_query(queries), model.encode_document(documents))
        for model in (fast, plain)
    )
    torch.testing.assert_close(packed_scores, plain_scores, rtol=1e-4, atol=1e-3)


@needs_multi_vectors
def test_expansion_that_nothing_attends_to_is_refused(folder: str) -> None:
    """Its tokens are padding to the encoder, and scored."""
    message = (
        r"this MultiVectorEncoder: the tokens .* set query_expansion with \"attend\": True if .* or leave"
    )
    model = multi_vector_encoder(folder, {"strategy": "min", "length": 12, "token": "w7"})
    expected = model.encode_query(MIXED[:2])
    with pytest.raises(ValueError, match=message):
        pruned_ops.optimize(model)
    assert_same(model.encode_query(MIXED[:2]), expected)
    optimised = pruned_ops.optimize(multi_vector_encoder(folder, None))
    optimised[0].query_expansion = model[0].query_expansion
    with pytest.raises(ValueError, match=message):
        pruned_ops.optimize(st.MultiVectorEncoder(modules=list(optimised), device="cpu"))


@needs_multi_vectors
def test_expansion_that_is_set_after_optimize_is_refused_by_the_call(folder: str) -> None:
    expansion = {"strategy": "fixed", "attend": True, "length": 12, "token": "w7"}
    model = pruned_ops.optimize(multi_vector_encoder(folder, dict(expansion)))
    expected = model.encode_query(MIXED[:2])
    copied = pickle.loads(pickle.dumps(model))
    message = "this Transformer was changed after optimize: the tokens .* set query_expansion with"
    for fast in (model, copy.deepcopy(model), copied):
        attending = fast[0].query_expansion
        fast[0].query_expansion = {**attending, "attend": False}
        with pytest.raises(ValueError, match=message):
            fast.encode_query(MIXED[:2])
        fast[0].query_expansion = attending
        assert_same(fast.encode_query(MIXED[:2]), expected)
    late = pruned_ops.optimize(multi_vector_encoder(folder, None))
    late[0].query_expansion = {"strategy": "min", "length": 12, "token": "w7"}
    with pytest.raises(ValueError, match=message):
        late.encode_query(MIXED[:2])
    pruned_ops.restore(late).encode_query(MIXED[:2])


def test_expansion_of_pylate_that_is_set_after_optimize_is_refused_by_the_call(folder: str) -> None:
    model = st.SentenceTransformer(folder, device="cpu")
    model.do_query_expansion, model.attend_to_expansion_tokens = True, True
    expected = pruned_ops.optimize(model).encode(MIXED)
    model.attend_to_expansion_tokens = False
    with pytest.raises(ValueError, match="changed after optimize: .* set attend_to_expansion_tokens to True"):
        model.encode(MIXED)
    model.do_query_expansion = False
    assert_same(model.encode(MIXED), expected)


def test_expansion_of_pylate_is_refused(folder: str) -> None:
    model = st.SentenceTransformer(folder, device="cpu")
    model.do_query_expansion, model.attend_to_expansion_tokens = True, False
    with pytest.raises(ValueError, match="set attend_to_expansion_tokens to True if it was trained so"):
        pruned_ops.optimize(model)
    model.attend_to_expansion_tokens = True
    pruned_ops.optimize(model)


def test_it_is_saved_copied_and_pickled(pair: tuple[Any, Any], tmp_path: Path) -> None:
    plain, fast = pair
    expected, own = plain.encode(MIXED), plain.state_dict()
    saved = fast.state_dict()
    assert list(saved) == list(own) and all(torch.equal(saved[name], own[name]) for name in own)
    fast.save_pretrained(str(tmp_path))
    again = st.SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_array_equal(again.encode(MIXED), expected)
    assert again.prompts["query"] == plain.prompts["query"]
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        np.testing.assert_array_equal(copied.encode(MIXED), fast.encode(MIXED))
        np.testing.assert_array_equal(pruned_ops.restore(copied).encode(MIXED), expected)
    np.testing.assert_allclose(fast.encode(MIXED), expected, **CLOSE)  # the copies are models of their own


class Finished(Exception):
    """There is nothing more to do for a worker."""


class Work:
    """The queue of a worker process, which ends after what is in it."""

    def __init__(self, *items: Any) -> None:
        self._items = list(items)

    def get(self) -> Any:
        if not self._items:
            raise Finished
        return self._items.pop(0)


def test_a_worker_of_a_pool_runs_it(folder: str) -> None:
    """What `encode(device=[...])` does in each process, with the model as it is sent there."""
    plain, fast = (st.SentenceTransformer(folder, device="cpu") for _ in range(2))
    pruned_ops.optimize(fast)
    fast.share_memory()
    sent = io.BytesIO()
    ForkingPickler(sent).dump(fast)
    arrived, results = pickle.loads(sent.getvalue()), queue.Queue()
    encoding: dict[str, Any] = {"batch_size": 2, "show_progress_bar": False, "normalize_embeddings": True}
    if hasattr(st.SentenceTransformer, "_inference"):
        encoding |= {
            "prompt": None,
            "output_value": "sentence_embedding",
            "save_to_cpu": True,
            "truncate_dim": None,
        }
    with pytest.raises(Finished):
        type(arrived)._multi_process_worker("cpu", arrived, Work([0, MIXED, encoding]), results)
    found = np.asarray(results.get()[1])
    np.testing.assert_allclose(found, plain.encode(MIXED, normalize_embeddings=True), **CLOSE)


def test_the_progress_bar_is_right(pair: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    pair[1].encode(MIXED, show_progress_bar=True)
    shown = capsys.readouterr().err
    assert "Batches" in shown and "100%" in shown


def test_threads_encode_at_once(pair: tuple[Any, Any], batches_of_64_tokens: None) -> None:
    fast, found = pair[1], {}
    inputs = [sentences([3, 30, 8] * 5, seed) for seed in range(4)]
    expected = [fast.encode(texts) for texts in inputs]

    def encode(number: int) -> None:
        found[number] = fast.encode(inputs[number])

    threads = [threading.Thread(target=encode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        np.testing.assert_array_equal(found[number], expected[number])


def test_restore_leaves_nothing_behind(folder: str) -> None:
    model = st.SentenceTransformer(folder, device="cpu")
    model[0].can_flatten_inputs = True  # as with flash attention on a GPU
    before, flattened = set(vars(model)), set(vars(model[0]))
    pruned_ops.optimize(model)
    assert model[0].can_flatten_inputs is False and "forward" in vars(model)
    pruned_ops.restore(model)
    left = {"_pruned_ops_head"}  # hooks stay, for forwards that are under way, and do nothing
    assert set(vars(model)) - left == before and set(vars(model[0])) - left == flattened
    assert model[0].can_flatten_inputs is True
    model[0].can_flatten_inputs = False
    np.testing.assert_array_equal(
        model.encode(MIXED), st.SentenceTransformer(folder, device="cpu").encode(MIXED)
    )


def test_a_forward_of_the_users_own_stays(folder: str) -> None:
    model = st.SentenceTransformer(folder, device="cpu")
    expected, own = model.encode(MIXED), model.forward
    model.forward = lambda features, **settings: own(features, **settings)
    mine = model.forward
    pruned_ops.optimize(model)
    assert model.forward is mine
    np.testing.assert_allclose(model.encode(MIXED), expected, **CLOSE)
    assert pruned_ops.restore(model).forward is mine


def test_encode_many_is_where_it_can_be_served(pair: tuple[Any, Any], folder: str) -> None:
    fast = pair[1]
    assert not hasattr(fast, "encode_many")
    with pytest.raises(ValueError, match=r"SentenceTransformer.forward does not take them by name"):
        pruned_ops.runtime.streaming.encode_many(fast, [[2, 3]])
    assert hasattr(pruned_ops.optimize(AutoModel.from_pretrained(folder)), "encode_many")


def test_a_pruned_encoder_in_it_is_saved_and_loaded(tmp_path: Path, folder: str) -> None:
    encoder = pruned_model(shapes=ODD_SHAPES).base_model
    encoder.save_pretrained(tmp_path / "encoder")
    st.SentenceTransformer(folder).tokenizer.save_pretrained(tmp_path / "encoder")
    model = st.SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    texts = [" ".join(f"w{i}" for i in range(length)) for length in (3, 40, 0, 11)]
    expected = model.encode(texts)
    pruned_ops.optimize(model)
    np.testing.assert_allclose(model.encode(texts), expected, **CLOSE)
    model.save_pretrained(str(tmp_path / "saved"))
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert type(again[0].auto_model) is pruned_ops.PrunedBertModel
    np.testing.assert_array_equal(again.encode(texts), expected)


def test_calibration_that_is_no_list_of_texts(pair: tuple[Any, Any]) -> None:
    batches = texts_module.text_batches
    with pytest.raises(ValueError, match="text 1 is a int; a text or a pair of texts is needed"):
        batches(pair[1], ["w1", 3])
    with pytest.raises(ValueError, match="BertForQuestionAnswering has no tokenizer"):
        batches(stock_model(), ["w1"])
    with pytest.raises(ValueError, match="calibration is a str; a list of batches or texts is needed"):
        pruned_ops.runtime.int8_choice.batches_of(pair[1], "w1 w2")


@needs_int8
@pytest.mark.parametrize("kind", ["SentenceTransformer", "CrossEncoder"])
def test_int8_by_one_argument(kind: str, tmp_path: Path) -> None:
    where = text_folder(tmp_path, kind)
    plain, fast = (getattr(st, kind)(where, device="cpu") for _ in range(2))
    texts: Any = sentences([5, 20, 60] * 4)
    if kind == "CrossEncoder":
        texts = [(text, texts[0]) for text in texts]
    pruned_ops.optimize(fast, dtype="int8", calibration=texts, tolerance=0.5)
    assert all(error >= 0 for error in fast.int8_errors.values()) and len(fast.int8_errors) == 8
    method = "predict" if kind == "CrossEncoder" else "encode"
    found, expected = (getattr(model, method)(texts).ravel() for model in (fast, plain))
    assert not np.array_equal(found, expected)
    assert found @ expected / np.linalg.norm(found) / np.linalg.norm(expected) > 0.99
