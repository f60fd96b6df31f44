"""Words with labels, rankings and embeddings from the command line: fine-tuned and scored; bad input is one
line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import normalizers
from transformers import (
    AutoModelForTokenClassification,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from matching import squad_file
from pruned_ops.checkpoints.loading import load_any_head, load_tokenizer
from pruned_trainer.cli import main
from pruned_trainer.pruning.importance import example_losses
from pruned_trainer.tasks.faults import FormatError
from pruned_trainer.tasks.options import TaskOptions
from pruned_trainer.tasks.texts import embedding
from pruned_trainer.tasks.texts.encoding import Encoded
from pruned_trainer.tasks.texts.examples import Example
from pruned_trainer.tasks.texts.pair_training import PairTraining, pair_features
from pruned_trainer.tasks.texts.reranking import RerankingTask, squad_pairs
from pruned_trainer.tasks.texts.retrieval import Retrieval
from pruned_trainer.tasks.texts.tasks import text_task
from pruned_trainer.training.batches import GROUP, pad_batch
from text_files import CUT, checkpoint, ranked, scored, tagged, write_rows


def evaluated(
    task: list[str], model: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> dict[str, float]:
    """What evaluate prints, by name."""
    capsys.readouterr()
    assert main(["evaluate", *task, "--model", str(model), "--eval-file", str(file), *CUT]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {words[0]: float(words[1]) for words in lines if len(words) == 2 and words[0] != "--"}


def refused(task: list[str], model: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that refuses it."""
    assert main(["evaluate", *task, "--model", str(model), "--eval-file", str(file), *CUT]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_words_with_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--task", "token-classification"]
    start = checkpoint(tmp_path / "start", BertModel)
    train, judged = (write_rows(tmp_path / f"{n}.jsonl", tagged(n, n)) for n in (240, 60))
    argv = ["finetune", *task, "--model", str(start), "--train-file", str(train), "--epochs", "6", *CUT]
    assert main([*argv, "--learning-rate", "3e-3", "--out", str(tmp_path / "model")]) == 0
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "model")
    assert list(model.config.id2label.values()) == ["B-a", "B-b", "I-a", "I-b", "O"]
    scores = evaluated(task, tmp_path / "model", judged, capsys)
    assert scores["entity_f1"] > 80 and scores["entity_precision"] > 80 and scores["total"] == 60
    # A word of which the tokenizer leaves nothing changes nothing of the others' labels, and is right as O.
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200d", "")
    tokenizer.save_pretrained(tmp_path / "model")
    assert tokenizer("\u200d w1").input_ids == tokenizer("w1").input_ids
    rows = [{k: ["\u200d" if k == "tokens" else "O", *v] for k, v in row.items()} for row in tagged(60, 60)]
    dropped = write_rows(tmp_path / "dropped.jsonl", rows)
    again = evaluated(task, tmp_path / "model", dropped, capsys)
    assert again == scores


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["w1", "w2"], "tags": ["O"]}, "row 0: 2 words, but 1 labels"),
        ({"tokens": ["w1"], "tags": ["B-c"]}, "row 0: label 'B-c' is none of the model's: 'B-a', 'O'"),
        ({"tokens": ["", " "], "tags": ["O", "O"]}, "row 0: 'tokens' is empty"),
        ({"tokens": "w1", "tags": ["O"]}, "row 0: 'tokens' has type str, not list"),
        ({"tokens": ["w1"], "tags": ["O"]}, "the words of all 1 rows have the label 'O'"),
        ({"words": ["w1"], "tags": ["O"]}, "no column 'tokens'; there are 'words', 'tags'"),
    ],
)
def test_bad_sentences(
    row: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"id2label": {0: "B-a", 1: "O"}, "label2id": {"B-a": 0, "O": 1}}
    model = checkpoint(tmp_path / "model", BertForTokenClassification, **names)
    file = write_rows(tmp_path / "eval.jsonl", [row])
    assert message in refused(["--task", "token-classification"], model, file, capsys)


def test_where_all_sentences_are_bad_the_first_fault_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"id2label": {0: "B-a", 1: "O"}, "label2id": {"B-a": 0, "O": 1}}
    model = checkpoint(tmp_path / "model", BertForTokenClassification, **names)
    file = write_rows(tmp_path / "eval.jsonl", [{"tokens": ["w1", "w2"], "tags": ["B-c", "O"]}])
    said = refused(["--task", "token-classification", "--skip-bad"], model, file, capsys)
    assert said.endswith(
        f"(1 were skipped; the first: {file}, row 0: label 'B-c' is none of the model's: 'B-a', 'O')"
    )


def test_rankings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--task", "reranking"]
    start = checkpoint(tmp_path / "start", BertModel)
    train, judged = (write_rows(tmp_path / f"{n}.jsonl", ranked(n, n)) for n in (160, 30))
    argv = ["finetune", *task, "--model", str(start), "--train-file", str(train), "--epochs", "1", *CUT]
    assert main([*argv, "--learning-rate", "2e-3", "--out", str(tmp_path / "model")]) == 0
    scores = evaluated(task, tmp_path / "model", judged, capsys)
    assert 25 <= scores["mrr"] <= scores["ndcg"] <= 100 and scores["total"] == 30
    # The same pairs, a row each.
    rows = [
        {"query": row["query"], "passage": passage, "relevant": int(relevant)}
        for row in ranked(30, 30)
        for passage, relevant in zip(row["passage"], row["relevant"], strict=True)
    ]
    assert evaluated(task, tmp_path / "model", write_rows(tmp_path / "pairs.csv", rows), capsys) == scores
    irrelevant = write_rows(tmp_path / "none.jsonl", [{**rows[0], "relevant": 0}])
    assert "no passage is relevant" in refused(task, tmp_path / "model", irrelevant, capsys)
    classes = checkpoint(tmp_path / "classes", BertForSequenceClassification, num_labels=3)
    assert "gives 3 classes, and reranking needs one score" in refused(task, classes, judged, capsys)


def test_a_reranker_of_others_learns_what_is_relevant(tmp_path: Path) -> None:
    """Its config names no loss, and transformers would then take the squared difference to the labels."""
    folder = checkpoint(tmp_path / "model", BertForSequenceClassification, num_labels=1)
    task = RerankingTask(TaskOptions(task="reranking", max_length=24))
    model = task.load_model(str(folder))
    examples = task.read(write_rows(tmp_path / "train.jsonl", ranked(3, 3)), "train")
    batch = pad_batch(task.features(examples, load_tokenizer(str(folder)), model), 0)
    asked = {name: tensor for name, tensor in batch.items() if name != GROUP}
    with torch.no_grad():
        outputs = model(**asked)
    expected = F.binary_cross_entropy_with_logits(outputs.logits, batch["labels"])
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(example_losses(outputs, batch, model.config).mean(), expected)


def test_squad_as_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A question's own paragraph is relevant, the others of its article are not."""
    file = squad_file(tmp_path / "squad.json", 40, 1, unanswerable=0.2, articles=4)
    pairs = squad_pairs(file, None, 0).rows
    data = json.loads(file.read_text())["data"]
    articles = {p["context"]: a["title"] for a in data for p in a["paragraphs"]}
    own = {qa["id"]: p["context"] for a in data for p in a["paragraphs"] for qa in p["qas"]}
    for pair in pairs:
        question = pair.where.split("'")[1]
        assert pair.label == (pair.texts[1] == own[question])
        assert articles[pair.texts[1]] == articles[own[question]]
    # An article has ten paragraphs, of which some have no question that is answerable.
    assert len(pairs) == 10 * sum(pair.label for pair in pairs)
    train, held_out = squad_pairs(file, None, 0).split(0)
    sides = [{articles[row.texts[1]] for row in part.rows} for part in (train, held_out)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    few = squad_pairs(file, 2, 0).rows
    assert len(few) == 3 * sum(pair.label for pair in few) < len(pairs)
    task = RerankingTask(TaskOptions(task="reranking"))
    assert len(task.read(file, "train")) == 4 * sum(pair.label for pair in pairs) < len(pairs)
    assert task.read(file, "validation").rows == pairs  # all of them judge
    model = checkpoint(tmp_path / "model", BertForSequenceClassification, num_labels=1)
    assert evaluated(["--task", "reranking"], model, file, capsys)["total"] == sum(p.label for p in pairs)
    apart = squad_file(tmp_path / "apart.json", 4, 1, articles=4)
    with pytest.raises(FormatError, match="no answerable question has another paragraph in its article"):
        squad_pairs(apart, None, 0)


def test_similar_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cosines of mean-pooled states, correlated with the scores."""
    from scipy.stats import spearmanr

    folder = checkpoint(tmp_path / "model", BertModel)
    rows = scored(24, 5)
    scores = evaluated(["--task", "embedding"], folder, write_rows(tmp_path / "eval.csv", rows), capsys)
    model = BertModel.from_pretrained(folder).eval()
    vectors = []
    for row in rows:
        for side in ("text_a", "text_b"):
            ids = [2, *(int(word[1:]) + 4 for word in row[side].split()), 3]
            with torch.no_grad():
                vectors.append(model(torch.tensor([ids])).last_hidden_state[0].mean(0))
    cosines = torch.cosine_similarity(torch.stack(vectors[::2]), torch.stack(vectors[1::2]))
    expected = 100 * spearmanr([row["score"] for row in rows], cosines.numpy()).statistic
    assert scores["spearman"] == pytest.approx(expected, abs=0.5)


def test_retrieval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Documents that are the query itself stand first; an id that the corpus lacks is refused."""
    folder = checkpoint(tmp_path / "model", BertModel)
    texts = [f"w{i} w{i + 1} w{i + 2}" for i in range(12)]
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"_id": str(i), "text": t} for i, t in enumerate(texts)])
    queries = [{"text": texts[i], "relevant": [i]} for i in range(6)]
    task = ["--task", "embedding", "--corpus", str(corpus)]
    scores = evaluated(task, folder, write_rows(tmp_path / "eval.jsonl", queries), capsys)
    assert scores["ndcg"] == scores["mrr"] == scores["recall"] == 100 and scores["total"] == 6
    # The same as BEIR has it: the queries apart, and a file of who is relevant to whom.
    named = [{"_id": f"q{number}", "text": text} for number, text in enumerate(texts)]
    apart = write_rows(tmp_path / "queries.jsonl", named)
    pairs = [
        {"query-id": f"q{i}", "corpus-id": str(j), "score": int(i == j)} for i in range(6) for j in (i, 7)
    ]
    judged = write_rows(tmp_path / "test.tsv", pairs)
    assert evaluated([*task, "--queries", str(apart)], folder, judged, capsys) == scores
    unknown = write_rows(tmp_path / "bad.tsv", [{**pairs[0], "query-id": "x"}])
    assert "query 'x' is not among" in refused([*task, "--queries", str(apart)], folder, unknown, capsys)
    train = write_rows(tmp_path / "train.json", queries)
    argv = ["finetune", *task, "--model", str(folder), "--train-file", str(train), "--out"]
    assert main([*argv, str(tmp_path / "trained"), *CUT]) == 0  # each query finds its document in the batch
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": "w1", "relevant": ["12"]}])
    assert "row 0: document '12' is not in the corpus" in refused(task, folder, bad, capsys)


def test_models_are_chosen_between_on_fewer_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All queries, and all documents that answer one; the evaluation searches the whole corpus."""
    texts = tuple(f"w{i} w{i + 1}" for i in range(20))
    queries = tuple(Example((texts[i],), f"row {i}") for i in (3, 3, 18))
    search = Retrieval("eval", queries, ({3: 2.0, 4: 1.0}, {3: 1.0}, {18: 1.0}), texts)
    fewer = search.on_fewer(7)
    assert fewer.queries == queries and fewer.documents == tuple(texts[i] for i in (0, 3, 4, 6, 10, 14, 18))
    found = [[fewer.documents[number] for number in each] for each in fewer.relevant]
    assert found == [[texts[3], texts[4]], [texts[3]], [texts[18]]]
    assert [list(each.values()) for each in fewer.relevant] == [[2.0, 1.0], [1.0], [1.0]]
    assert search.on_fewer(2).documents == (texts[3], texts[4], texts[18])
    assert search.on_fewer(20) == search == search.on_fewer(99)

    monkeypatch.setattr(embedding, "CHOOSING_DOCUMENTS", 7)
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"_id": str(i), "text": t} for i, t in enumerate(texts)])
    rows = [{"text": texts[i], "relevant": [i]} for i in range(5)]
    argv = ["prune", "--task", "embedding", "--model", str(checkpoint(tmp_path / "model", BertModel)), *CUT]
    argv += ["--corpus", str(corpus), "--macs", "0.7", "--gate-steps", "1", "--retrain-steps", "1"]
    for name in ("train", "validation", "eval"):
        argv += [f"--{name}-file", str(write_rows(tmp_path / f"{name}.jsonl", rows))]
    assert main([*argv, "--recipe", "fast", "--out", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "validation: 5 queries on 7 documents; evaluation: 5 queries on 20 documents" in said


def test_an_embedder_learns_the_scores_of_pairs(tmp_path: Path) -> None:
    """Its cosines come near the scores, from 0 to 1, that it was trained on."""
    task, start = ["--task", "embedding"], checkpoint(tmp_path / "start", BertModel)
    rows = scored(40, 6)
    judged, said = write_rows(tmp_path / "eval.jsonl", rows), tmp_path / "said.json"
    train = write_rows(tmp_path / "train.jsonl", scored(320, 7))
    argv = ["finetune", *task, "--model", str(start), "--train-file", str(train), "--out"]
    assert main([*argv, str(tmp_path / "model"), "--learning-rate", "2e-3", *CUT]) == 0
    errors = []
    for model in (start, tmp_path / "model"):
        argv = ["evaluate", *task, "--model", str(model), "--eval-file", str(judged), *CUT]
        assert main([*argv, "--predictions", str(said)]) == 0
        errors.append(np.square(np.array(json.loads(said.read_text())) - [r["score"] for r in rows]).mean())
    assert errors[1] < 0.5 * errors[0]


def test_an_embedder_reads_lines_whatever_the_columns_of_its_pairs_are(tmp_path: Path) -> None:
    """The columns are those of the pairs that it is judged by."""
    (tmp_path / "texts.txt").write_text("w1 w2\n\nw3\n")
    for task, columns in (("embedding", ("one", "other")), ("reranking", ("asked", "found"))):
        made: Any = text_task(TaskOptions(task=task, text_columns=columns))
        if task == "embedding":
            texts, _ = made.read_texts(tmp_path / "texts.txt", True)
            assert [row.texts for row in texts.rows] == [("w1 w2",), ("w3",)]
        else:
            with pytest.raises(FormatError, match="pairs are read from .jsonl"):
                made.read_texts(tmp_path / "texts.txt", True)


def test_pairs_are_taken_apart_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = BertModel.from_pretrained(checkpoint(tmp_path / "model", BertModel)).eval()
    texts = [[2, 5, 6, 3], [2, 7, 3], [2, 8, 9, 10, 11, 3], [2, 12, 3]]
    windows = [Encoded(np.array(ids, np.int32), np.zeros(len(ids), np.int32)) for ids in texts]
    vectors = []
    with torch.no_grad():
        for ids in texts:
            vectors.append(encoder(torch.tensor([ids])).last_hidden_state[0].mean(0))
        cosine = torch.cosine_similarity(torch.stack(vectors)[::2], torch.stack(vectors)[1::2])
        batch = pad_batch(pair_features([(windows[0], windows[1]), (windows[2], windows[3])], [1.0, 4.0]), 0)
        loss = PairTraining(encoder, "mean")(**batch).loss
        alone = pad_batch(pair_features([(windows[0], windows[1])], None), 0)
        with pytest.raises(ValueError, match="a batch of one pair has no other text"):
            PairTraining(encoder, "mean")(**alone)
    torch.testing.assert_close(loss, (cosine - torch.tensor([0.25, 1.0])).square().mean())
    PairTraining(encoder, "mean")(**batch).loss.backward()
    idle = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle  # several processes would wait for its gradient


PRUNE = ("--macs", "0.6", "--gate-steps", "2", "--retrain-steps", "2", "--batch-size", "8", *CUT)


@pytest.mark.parametrize(
    ("task", "model_class", "keys"),
    [
        ("token-classification", BertForTokenClassification, ["entity_f1"]),
        ("reranking", BertForSequenceClassification, ["mrr", "ndcg"]),
        ("embedding", BertModel, ["spearman", "pearson"]),
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_prune(
    task: str,
    model_class: Any,
    keys: list[str],
    labelled: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each task from rows to a report, with labels and without; the pruned checkpoint loads as it was."""
    monkeypatch.setattr("pruned_trainer.jobs.prune._draw", lambda folder: None)  # another test's, and slow
    names = ["B-a", "B-b", "I-a", "I-b", "O"] if task == "token-classification" else ["LABEL_0"]
    fields = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = checkpoint(tmp_path / "model", model_class, **fields)
    make = {"token-classification": tagged, "reranking": ranked, "embedding": scored}[task]
    train, judged = (write_rows(tmp_path / f"{n}.jsonl", make(n, n)) for n in (48, 16))
    argv = ["prune", "--task", task, "--model", str(model), "--out", str(tmp_path / "out"), *PRUNE]
    if labelled:
        argv += ["--train-file", str(train), "--eval-file", str(judged)]
    elif task == "reranking":
        pairs = [{"query": row["query"], "passage": row["passage"][0]} for row in ranked(48, 3)]
        argv += ["--texts", str(write_rows(tmp_path / "pairs.jsonl", pairs))]
    else:
        texts = tmp_path / "texts.txt"
        texts.write_text("".join(f"{' '.join(row['tokens'])}\n" for row in tagged(48, 3)))
        argv += ["--texts", str(texts)]
    assert main(argv) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for key in keys if labelled else ["agreement"]:
        low, high = report[f"{key}_loss_interval"]
        assert low <= report[f"{key}_loss"] <= high
        assert report[f"{key}_loss"] == pytest.approx(report["dense"][key] - report["pruned"][key])
    if not labelled:
        assert report["dense"]["agreement"] == pytest.approx(100)
    pruned = load_any_head(str(tmp_path / "out"))
    assert type(pruned).__name__ == f"Pruned{model_class.__name__}"
    if task == "embedding":
        assert pruned.config.pooling == "mean"
