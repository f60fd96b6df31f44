"""What a server makes of folders: what kind of model it is, and that it computes what its library does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertForMaskedLM

for package in ("fastapi", "orjson", "prometheus_client"):
    pytest.importorskip(package, reason='the server is not installed: pip install "pruned_ops[serve]"')

from fastapi.testclient import TestClient  # noqa: E402

import pruned_ops  # noqa: E402
from inputs import READY, stock_model  # noqa: E402
from matching import save_checkpoint  # noqa: E402
from pruned_ops.cli import main  # noqa: E402
from pruned_ops.commands.serve import described  # noqa: E402
from pruned_ops.qa import answerer as answerer_module  # noqa: E402
from pruned_ops.qa.answerer import QuestionAnswerer  # noqa: E402
from pruned_ops.runtime.packed_encoder import packed_encoders  # noqa: E402
from pruned_ops.serving import models as loading  # noqa: E402
from pruned_ops.serving.application import Access, application  # noqa: E402
from pruned_ops.serving.connections import Hosts  # noqa: E402
from pruned_ops.serving.folders import contents_of  # noqa: E402
from pruned_ops.serving.limits import Limits  # noqa: E402
from pruned_ops.serving.models import Loading, load, load_all  # noqa: E402
from pruned_ops.serving.refusals import Refusal  # noqa: E402
from pruned_ops.serving.service import Service  # noqa: E402
from served import loaded, saved  # noqa: E402
from tiny_tokenizers import word_tokenizer, words  # noqa: E402

TEXTS = [words(3), words(40), "w5  w6", words(11)]
HERE = Loading(device="cpu")


def test_kinds(tmp_path: Path) -> None:
    models = loaded(tmp_path, "embedder", "reranker", "classifier", "reader")
    kinds = [model.kind for model in models.values()]
    assert kinds == ["embedder", "reranker", "classifier", "question answering"]
    assert models["classifier"].labels == ("bad", "so so", "good")
    assert models["embedder"].dimension == 64 and "mean of its tokens" in models["embedder"].notes[0]
    assert all(model.encoder.max_tokens == 80 for model in models.values())


def test_plain_and_packed_agree(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, "embedder")
    packed, plain = load(folder, "a", HERE), load(folder, "b", Loading(device="cpu", plain=True))
    sequences = packed.encoder.encode(TEXTS, cut=True)
    np.testing.assert_allclose(packed.compute(sequences), plain.compute(sequences), rtol=1e-4, atol=1e-5)


def sentence_transformer(tmp_path: Path, pooling: dict[str, Any], **settings: Any) -> Any:
    """A model of sentence-transformers; it is saved in the folder `whole`."""
    library: Any = pytest.importorskip("sentence_transformers", reason="sentence-transformers is missing")
    (folder,) = saved(tmp_path, "embedder")
    try:
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    except ImportError:  # before 5.4
        from sentence_transformers.models import Normalize, Pooling, Transformer
    modules = [Transformer(folder, max_seq_length=32), Pooling(64, **pooling), Normalize()]
    model = library.SentenceTransformer(modules=modules, device="cpu", **settings)
    model.save_pretrained(str(tmp_path / "whole"))
    return model


def test_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a model is cast where a GPU runs it, which is played here; what it puts out is near fp32's."""
    names = ("embedder", "classifier", "reader")
    folders = dict(zip(names, saved(tmp_path, *names), strict=True))
    exact = {name: load(folder, name, HERE) for name, folder in folders.items()}
    with pytest.raises(ValueError, match="float16 is for a GPU"):
        load(folders["embedder"], "a", Loading(device="cpu", dtype="float16"))
    for module in (loading, answerer_module):
        monkeypatch.setattr(module, "cast_and_dtype", lambda dtype, place: (getattr(torch, dtype), None))
    for dtype in ("float16", "bfloat16"):
        for name, folder in folders.items():
            served = load(folder, name, Loading(device="cpu", dtype=dtype))
            assert served.dtype == dtype and f"linear layers in {dtype}" in described(served)
            sequences = served.encoder.encode(TEXTS, cut=True)
            for found, expected in zip(
                served.compute(sequences), exact[name].compute(sequences), strict=True
            ):
                np.testing.assert_allclose(found, expected, atol=0.1)
                assert all(part.dtype == np.float32 for part in found)
    answerer = QuestionAnswerer(folders["reader"], device="cpu", dtype="float16")
    assert next(answerer.model.parameters()).dtype == torch.float16
    both = (answerer, QuestionAnswerer(folders["reader"], device="cpu"))
    answer, expected = (each.answer("w1 w2", words(9), allow_none=False) for each in both)
    assert (answer.answer, answer.score) == (expected.answer, pytest.approx(expected.score, abs=0.02))
    with pytest.raises(ValueError, match="dtype is 'float16'"):
        QuestionAnswerer(stock_model(), word_tokenizer(96), dtype="float16")  # a caller's own is not cast


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_sentence_transformers_folders(tmp_path: Path, pooling: str) -> None:
    """Usual poolings are computed here, others by the library; a normalisation is left to the routes."""
    model = sentence_transformer(tmp_path, {"pooling_mode": pooling}, prompts={"query": "w9 w8 "})
    served = load(str(tmp_path / "whole"), "whole", HERE)
    assert (served.kind, served.encoder.max_tokens, served.dimension) == ("embedder", 32, 64)
    assert contents_of(tmp_path / "whole").library == ("SentenceTransformer" if pooling == "max" else "")
    found = np.stack(served.compute(served.encoder.encode(TEXTS, cut=True)))
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    np.testing.assert_allclose(found, model.encode(TEXTS), rtol=1e-4, atol=1e-5)
    assert served.prompts == model.prompts and served.prompts["query"] == "w9 w8 "


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_publisher_s_prompt_and_dimensions_are_used_as_encode_does(tmp_path: Path, pooling: str) -> None:
    prompts = {"query": "w9 w8 ", "document": "w7 "}
    model = sentence_transformer(
        tmp_path, {"pooling_mode": pooling}, prompts=prompts, default_prompt_name="query", truncate_dim=24
    )
    served = load(str(tmp_path / "whole"), "whole", HERE)
    assert served.dimension == 24 and "'query' is put before texts" in described(served)
    with TestClient(application(Service({"whole": served}, Limits()), Access(Hosts("testserver")))) as client:
        for name in (None, "document"):
            answered = client.post("/embed", json={"inputs": TEXTS, "prompt_name": name, "truncate": True})
            expected = model.encode(TEXTS, prompt_name=name, normalize_embeddings=True)
            np.testing.assert_allclose(answered.json(), expected, rtol=1e-4, atol=1e-5)
        assert client.get("/info").json()["models"][0]["default_prompt"] == "query"


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_the_length_that_a_publisher_set_is_read_where_encode_reads_it(tmp_path: Path, kind: str) -> None:
    """In a file of today's name or an older one; the tokenizer's own length does not matter then."""
    place = Path(*saved(tmp_path, "embedder"))
    word_tokenizer(96, model_max_length=16).save_pretrained(place)
    assert load(str(place), "a", HERE).encoder.max_tokens == 16
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{name}"}
        for path, name in (("", "Transformer"), ("1_Pooling", "Pooling"))
    ]
    (place / "1_Pooling").mkdir()
    for name, value in (
        ("modules.json", modules),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True}),
        (f"sentence_{kind}_config.json", {"max_seq_length": 24, "do_lower_case": True}),
    ):
        (place / name).write_text(json.dumps(value))
    contents = contents_of(place)
    assert (contents.pooling, contents.max_tokens, contents.lower_case) == ("mean", 24, True)
    assert load(str(place), "b", HERE).encoder.max_tokens == 24


def test_prompts_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    """A pooling that leaves a prompt's tokens out would need to know which they are."""
    prompts, folder = {"query": "w9 w8 "}, tmp_path / "whole"
    sentence_transformer(tmp_path, {"pooling_mode": "mean", "include_prompt": False}, prompts=prompts)
    served = load(str(folder), "whole", HERE)
    assert not served.prompts and "its prompts are not served" in described(served)
    for default, message in (
        ("query", "default prompt 'query' cannot be served"),
        ("other", "no prompt 'other'"),
    ):
        path = folder / "config_sentence_transformers.json"
        path.write_text(json.dumps({"prompts": prompts, "default_prompt_name": default}))
        with pytest.raises(ValueError, match=message):
            load(str(folder), "whole", HERE)
    path.write_text(json.dumps({"model_type": "CrossEncoder", "default_prompt_name": "query"}))
    with pytest.raises(ValueError, match="a CrossEncoder with a default prompt"):
        load(str(folder), "whole", HERE)


def test_what_would_be_served_as_another_kind_is_refused(tmp_path: Path) -> None:
    """sentence-transformers would load the first with a mean pooling, and transformers the second without the
    modules that its scores come of."""
    place = Path(*saved(tmp_path, "embedder"))
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    (place / "modules.json").write_text(json.dumps(modules))
    for kind, message in (
        ("MultiVectorEncoder", "says that it is a 'MultiVectorEncoder'; known are"),
        ("CrossEncoder", "is a CrossEncoder of 'BertModel', which gives no scores"),
    ):
        (place / "config_sentence_transformers.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ValueError, match=message):
            contents_of(place)


def test_a_publisher_s_own_arguments_of_the_tokenizer_are_refused(tmp_path: Path) -> None:
    """`encode` would cut texts by these, for example."""
    place = Path(*saved(tmp_path, "embedder"))
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    (place / "modules.json").write_text(json.dumps(modules))
    settings = place / "sentence_bert_config.json"
    settings.write_text(json.dumps({"processing_kwargs": {"image": {"size": 8}}}))
    assert contents_of(place).kind == "embedder"
    settings.write_text(json.dumps({"processing_kwargs": {"text": {"max_length": 8}}}))
    with pytest.raises(ValueError, match="its processing_kwargs, by which texts are tokenised, are not"):
        contents_of(place)


def normalisation() -> Any:
    """sentence-transformers' class, which earlier versions have elsewhere."""
    try:
        from sentence_transformers.sentence_transformer.modules import Normalize
    except ImportError:  # before 5.4
        from sentence_transformers.models import Normalize
    return Normalize


def test_a_cross_encoder_and_a_sparse_encoder(tmp_path: Path) -> None:
    library: Any = pytest.importorskip("sentence_transformers", reason="sentence-transformers is missing")
    (folder,) = saved(tmp_path, "reranker")
    ranks = library.CrossEncoder(folder, device="cpu")
    ranks.save_pretrained(str(tmp_path / "ranks"))
    served = load(str(tmp_path / "ranks"), "ranks", HERE)
    pairs: Any = [("w1 w2", text) for text in TEXTS]
    found = np.stack(served.compute(served.encoder.encode(pairs, cut=True)))[:, 0]
    expected = ranks.predict(pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

    mask = save_checkpoint(BertForMaskedLM(stock_model().config).eval(), tmp_path / "mask")
    for most, normalises in ((None, False), (3, False), (3, True)):
        sparse = library.SparseEncoder(str(mask), device="cpu", max_active_dims=most)
        if normalises:
            sparse.append(normalisation()())
        place = str(tmp_path / f"sparse-{most}-{normalises}")
        sparse.save_pretrained(place)
        served = load(place, "sparse", HERE)
        assert served.kind == "sparse embedder"
        found = np.stack(served.compute(served.encoder.encode(TEXTS, cut=True)))
        expected = sparse.encode(TEXTS, convert_to_sparse_tensor=False, convert_to_tensor=True)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert most is None or int((found != 0).sum(1).max()) == most


def test_what_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        load(str(tmp_path / "none"), "a", HERE)
    save_checkpoint(BertForMaskedLM(stock_model().config), tmp_path / "mask")
    with pytest.raises(ValueError, match="'BertForMaskedLM', which does nothing that is served"):
        load(str(tmp_path / "mask"), "a", HERE)
    (folder,) = saved(tmp_path, "embedder")
    with pytest.raises(ValueError, match="two models are called 'embedder': give one another name"):
        load_all([folder, folder], HERE)
    for source, lacking in ((f"={folder}", "name"), ("embedder=", "model")):
        with pytest.raises(ValueError, match=f"'{source}' has no {lacking}: NAME=MODEL is needed"):
            load_all([source], HERE)
    for extra, why in (
        (["--texts-file", "none.txt"], "none.txt"),
        (["--texts", "0"], "--texts is 0"),
        (["--wait-ms", "-1"], "wait_ms is -1.0"),
        (["--plain", "--dtype", "int8"], "a plain model runs in its own dtype"),
        (["--api-key-file", str(tmp_path / "embedder" / "none")], "No such file"),
        (["--port", "99999"], "cannot listen at 127.0.0.1, port 99999"),
        (["--device", "nowhere"], "nowhere"),
    ):
        assert main(["serve", folder, *extra]) == 2
        error = capsys.readouterr().err
        assert why in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("embedder", "encoder.layer.1.output.dense.weight"),
        ("reranker", "bert.pooler.dense.weight"),
        ("classifier", "classifier.bias"),
    ],
)
def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path, name: str, lost: str) -> None:
    """They would be drawn at random, and nobody would be told."""
    (folder,) = saved(tmp_path, name)
    path = Path(folder) / "model.safetensors"
    left = {key: tensor.clone() for key, tensor in load_file(path).items() if key != lost}
    save_file(left, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"it is no checkpoint of its class: it lacks {lost}"):
        load(folder, "a", HERE)


@pytest.mark.parametrize("name", ["embedder", "classifier"])
def test_a_folder_of_another_model_than_its_config_says_is_refused(tmp_path: Path, name: str) -> None:
    """A layer more would be left out; a weight that is no number would make NaN of every text."""
    (folder,) = saved(tmp_path, name)
    config, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"tensors that its config does not describe: \S*encoder.layer.2"):
        load(folder, "a", HERE)
    (folder,) = saved(tmp_path, name)
    tensors = load_file(weights)
    tensors[next(key for key in tensors if key.endswith("layer.1.output.dense.weight"))].fill_(float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="layer.1.output.dense.weight holds numbers from nan"):
        load(folder, "a", HERE)


def test_an_embedder_that_is_saved_with_a_head_is_served_without(tmp_path: Path) -> None:
    """As rubert-tiny2 is, which sentence-transformers reads so, too."""
    whole = BertForMaskedLM(stock_model().config).eval()
    whole.save_pretrained(tmp_path)
    word_tokenizer(96).save_pretrained(tmp_path)
    modules = [{"path": path, "type": f"models.{path[2:] or 'Transformer'}"} for path in ("", "1_Pooling")]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    served = load(str(tmp_path), "a", HERE)
    sequences = served.encoder.encode(TEXTS[:1], cut=True)
    with torch.inference_mode():
        expected = whole.bert(torch.tensor(sequences[0].input_ids)[None]).last_hidden_state[0, 0]
    np.testing.assert_allclose(served.compute(sequences)[0], expected, rtol=1e-4, atol=1e-5)


def test_int8_with_calibration_texts(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, "embedder")
    if "cpu" not in READY:
        pytest.skip("pruned_ops._C is not built")
    served = load(folder, "a", Loading(device="cpu", dtype="int8", calibration=TEXTS))
    exact = load(folder, "b", HERE)
    sequences = served.encoder.encode(TEXTS, cut=True)
    found, expected = np.stack(served.compute(sequences)), np.stack(exact.compute(sequences))
    assert not (found == expected).all()
    assert np.linalg.norm(found - expected) <= 0.05 * np.linalg.norm(expected)


def test_a_checkpoint_in_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is served as it is, bit for bit what `dtype="int8"` makes of the fp32 one."""
    if "cpu" not in READY:
        pytest.skip("pruned_ops._C is not built")
    (folder,) = saved(tmp_path, "embedder")
    pruned_ops.optimize(AutoModel.from_pretrained(folder), dtype="int8").save_pretrained(tmp_path / "int8")
    word_tokenizer(96).save_pretrained(tmp_path / "int8")
    stored = load(str(tmp_path / "int8"), "a", HERE)
    made = load(folder, "b", Loading(device="cpu", dtype="int8"))
    sequences = stored.encoder.encode(TEXTS, cut=True)
    assert (np.stack(stored.compute(sequences)) == np.stack(made.compute(sequences))).all()
    # Where there is a GPU, which would be the default for others.
    monkeypatch.setattr(loading, "default_device", lambda model=None: "meta" if model is None else "cpu")
    again = load(str(tmp_path / "int8"), "c", Loading())
    assert (np.stack(again.compute(sequences)) == np.stack(made.compute(sequences))).all()


def test_texts_are_cut_or_refused(tmp_path: Path) -> None:
    encoder = loaded(tmp_path, "reranker")["reranker"].encoder
    whole = encoder.encode([words(78)], cut=False)[0]
    assert len(whole) == 80
    with pytest.raises(Refusal, match="input 1 has more than 80 tokens"):
        encoder.encode(["w1", words(79)], cut=False)
    with pytest.raises(Refusal, match="input 0 has more than 20000 characters"):
        encoder.encode(["x" * 20_001], cut=False)
    for query, sentence in (
        (words(70), "input 1 is a pair that has more than 80 tokens"),
        ("x" * 20_001, "input 1 is a pair of which one text has more than 20000 characters"),
    ):
        with pytest.raises(Refusal, match=sentence):
            encoder.encode([("w1", "w2"), (query, words(9))], cut=False)
    right, left = (encoder.encode([words(90)], True, side)[0].input_ids for side in ("right", "left"))
    assert right.tolist() == whole.input_ids.tolist() and left[1:-1].tolist() == list(range(16, 94))
    pair = encoder.encode([("w1 w2", words(100))], cut=True)[0]
    assert len(pair) == 80 and pair.input_ids[1:4].tolist() == [5, 6, 3]
    assert pair.token_type_ids is not None and pair.token_type_ids.tolist() == [0] * 4 + [1] * 76
    assert len(encoder.encode(["x " * 10_000_000], cut=True)[0]) == 80


@pytest.mark.parametrize("library", [False, True])
def test_ids_are_checked_against_the_model_s_table(library: bool, tmp_path: Path) -> None:
    """Many models have more rows than their tokenizer has tokens, and a tokenizer may have got tokens that
    the model has no rows of."""
    (folder,) = saved(tmp_path, "embedder")
    if library:
        sentence_transformer(tmp_path, {"pooling_mode": "max"})
        folder = str(tmp_path / "whole")
    word_tokenizer(90).save_pretrained(folder)
    encoder = load(folder, "a", HERE).encoder
    assert encoder.of_ids([[99, 0]], cut=False)[0].input_ids.tolist() == [99, 0]
    for number in (-1, 100):
        with pytest.raises(Refusal, match="input 1 has a token id outside 0 to 99"):
            encoder.of_ids([[3], [3, number]], cut=False)
    word_tokenizer(110).save_pretrained(folder)
    encoder = load(folder, "a", HERE).encoder
    assert len(encoder.encode(["w95"], cut=False)[0]) == 3
    for refuse in (lambda: encoder.of_ids([[3], [109]], False), lambda: encoder.encode(["w1", "w105"], True)):
        with pytest.raises(Refusal, match="input 1 has a token id outside 0 to 99"):
            refuse()


def test_packed_is_what_runs(tmp_path: Path) -> None:
    served = loaded(tmp_path, "reader")["reader"]
    assert served.answerer is not None and packed_encoders(served.answerer.model)
