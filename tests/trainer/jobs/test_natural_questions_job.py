"""Natural Questions through the commands: fine-tune, prune, evaluate; a small BERT and a small RoBERTa."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, RobertaForQuestionAnswering

from inputs import padded_batch, stock_model
from jobs import job_settings, variant
from matching import save_checkpoint, trained_model
from nq_pages import matching_file, original, page, write
from pruned_ops import (
    LayerShape,
    PrunedBertConfig,
    PrunedBertForNaturalQuestions,
    PrunedBertForQuestionAnswering,
)
from pruned_ops.models.natural_questions import load_natural_questions, with_answer_types
from pruned_trainer import Target
from pruned_trainer.cli import main
from pruned_trainer.jobs.job import start
from pruned_trainer.jobs.prune import prune
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.pruning.importance import example_losses
from pruned_trainer.tasks.natural_questions.metrics import nq_metrics
from pruned_trainer.tasks.natural_questions.task import NaturalQuestionsTask
from pruned_trainer.tasks.output_kinds import Outputs, comparable_outputs, divergences
from pruned_trainer.tasks.windows import lengths_of
from pruned_trainer.training.batches import Share
from pruned_trainer.training.distillation import Distillation
from pruned_trainer.training.teacher_cache import TeacherCache
from tiny_tokenizers import byte_tokenizer, word_tokenizer

datasets = pytest.importorskip("datasets")

WORDS = 24
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
CUT = ["--max-length", "32", "--stride", "8", "--task", "natural_questions"]


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files, and an encoder that has learned to find a word."""
    folder = tmp_path_factory.mktemp("natural-questions")
    save_checkpoint(trained_model(), folder / "encoder")
    matching_file(folder / "train.jsonl.gz", 400, 1)
    matching_file(folder / "eval.jsonl", 80, 2, annotators=5)
    return folder


@pytest.fixture(scope="module")
def dense(folder: Path) -> Path:
    """Fine-tuned through the command."""
    argv = ["finetune", "--model", str(folder / "encoder"), "--train-file", str(folder / "train.jsonl.gz")]
    more = ["--epochs", "4", "--learning-rate", "2e-3", "--null-rate", "1", "--batch-size", "32"]
    assert main([*argv, "--out", str(folder / "dense"), *more, *CUT]) == 0
    return folder / "dense"


def job(folder: Path, dense: Path, out: str) -> list[str]:
    return [
        "prune", "--model", str(dense), "--train-file", str(folder / "train.jsonl.gz"), "--eval-file",
        str(folder / "eval.jsonl"), "--out", str(folder / out), "--macs", "0.6", "--gate-steps", "20",
        "--retrain-steps", "30", "--batch-size", "32", "--null-rate", "0.5", "--gate-fraction", "0.2",
        "--retrain-learning-rate", "1e-3", "--cross-pairs", "0.3", *CUT,
    ]  # fmt: skip


def test_finetune_prune_evaluate(folder: Path, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*job(folder, dense, "out"), "--num-proc", "2"]) == 0
    screen = capsys.readouterr().out
    for words in ("tokenising training: 95% of train.jsonl.gz", "long F1", "short F1", "95% interval"):
        assert words in screen
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["task"] == "natural_questions" and report["evaluated_on"]["questions"] == 80
    assert report["dense"]["short_f1"] > 60 and report["target"]["reached"]["macs"] <= 0.6
    for kind in ("long_f1", "short_f1", "long_best_f1", "short_best_f1"):
        low, high = report[f"{kind}_loss_interval"]
        assert low <= report[f"{kind}_loss"] <= high
        assert report[f"{kind}_loss"] == report["dense"][kind] - report["pruned"][kind]
    assert {"loss_task", "loss_logits", "loss_hidden"} <= report["training"]["retrain"][0].keys()
    for name in ("dense", "pruned"):
        # What the official rule says of the file that was written, and what the report says.
        metrics = nq_metrics(folder / "eval.jsonl", folder / "out" / f"predictions-{name}.json")
        assert metrics == report[name]["metrics"]
        assert report[name]["short_best_f1"] == 100 * metrics["short-best-threshold-f1"]
        assert report[name]["short_f1"] <= report[name]["short_best_f1"] + 1e-9
    model = load_natural_questions(folder / "out")
    assert type(model) is PrunedBertForNaturalQuestions
    assert model.config.short_score_threshold == report["pruned"]["short_score_threshold"]
    argv = ["evaluate", "--model", str(folder / "out"), "--eval-file", str(folder / "eval.jsonl"), *CUT]
    assert main([*argv, "--predictions", str(folder / "again.json")]) == 0
    assert f"short_f1  {report['pruned']['short_f1']:.2f}" in capsys.readouterr().out
    again = (folder / "again.json").read_text()
    assert again == (folder / "out" / "predictions-pruned.json").read_text()


def test_a_small_roberta_from_end_to_end(folder: Path, tmp_path: Path) -> None:
    """Byte-level tokens, positions from the padding index; every recipe's way through the task's losses."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    source = stock_model("roberta", vocab_size=len(tokenizer), max_position_embeddings=130)
    source.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    argv = ["finetune", "--model", str(tmp_path / "encoder"), "--train-file", str(folder / "train.jsonl.gz")]
    cut = ["--max-length", "100", "--stride", "20", "--task", "natural_questions", "--batch-size", "8"]
    assert isinstance(source, RobertaForQuestionAnswering)
    assert main([*argv, "--out", str(tmp_path / "dense"), "--epochs", "0.1", *cut]) == 0
    for recipe in ("joint", "gain"):
        more = ["--recipe", recipe, "--gate-steps", "2", "--retrain-steps", "2", "--macs", "0.6"]
        files = ["--train-file", str(folder / "train.jsonl.gz"), "--eval-file", str(folder / "eval.jsonl")]
        out = ["--model", str(tmp_path / "dense"), "--out", str(tmp_path / recipe)]
        assert main(["prune", *files, *out, *more, *cut]) == 0
        assert load_natural_questions(tmp_path / recipe).config.model_type == "pruned_roberta"


def test_a_family(folder: Path, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*job(folder, dense, "family"), "--recipe", "random", "--retrain-steps", "1"]
    argv[argv.index("--macs") : argv.index("--macs") + 2] = ["--macs", "0.8", "0.5"]
    for option in ("--gate-fraction", "--gate-steps"):  # a choice by chance looks at no windows
        place = argv.index(option)
        del argv[place : place + 2]
    assert main(["sweep", *argv[1:]]) == 0
    assert "short F1" in capsys.readouterr().out
    found = json.loads((folder / "family" / "sweep.json").read_text())
    assert [point["folder"] for point in found["points"]] == ["macs-0.8", "macs-0.5"]
    for point in found["points"]:
        assert point["long_f1"] == pytest.approx(found["dense"]["long_f1"] - point["long_f1_loss"])
    assert (folder / "family" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_with_squad_s_gates_is_trained_on(folder: Path, dense: Path, tmp_path: Path) -> None:
    """A pruned SQuAD checkpoint becomes a Natural Questions model of its shapes, which may go on training."""
    shapes = [LayerShape(3, 16), LayerShape(0, 24)]
    config = PrunedBertConfig(layer_shapes=shapes, vocab_size=WORDS + 4, **SIZES)
    save_checkpoint(PrunedBertForQuestionAnswering(config), tmp_path / "pruned")
    for source, out in (("pruned", "first"), ("first", "second")):
        argv = [
            "finetune",
            "--model",
            str(tmp_path / source),
            "--out",
            str(tmp_path / out),
            "--epochs",
            "0.01",
        ]
        assert main([*argv, "--train-file", str(folder / "train.jsonl.gz"), *CUT]) == 0
        assert load_natural_questions(tmp_path / out).config.shape.layers == tuple(shapes)


def test_bad_lines_are_refused_or_counted(
    folder: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [original(page(i, "w1", "w1 w2", "w3")) for i in range(3)]
    path = write(tmp_path / "eval.jsonl", [*good, b"{", {**good[0], "example_id": 9, "document_tokens": 1}])
    argv = ["evaluate", "--model", str(dense), "--eval-file", str(path), *CUT]
    assert main(argv) == 2
    assert f"{path}, line 4: not JSON" in capsys.readouterr().err
    assert main([*argv, "--skip-bad"]) == 0
    assert f"bad lines skipped: 2; the first: {path}, line 4" in capsys.readouterr().out
    bare = write(tmp_path / "bare.jsonl", [page(1, "w1", "w2")])
    assert main(["evaluate", "--model", str(dense), "--eval-file", str(bare), *CUT]) == 2
    assert "no document has an annotation to score by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--null-rate", "2"], "null_rate is 2.0: it must lie in [0, 1]"),
        (["--num-proc", "0"], "num_proc is 0: at least 1 is needed"),
        (["--gate-fraction", "0"], "gate_fraction is 0.0: it must lie in (0, 1]"),
        (["--task", "squad", "--num-proc", "2"], "are for --task natural_questions"),
        (["--train-file", "absent.jsonl"], "absent.jsonl: no such file or folder"),
    ],
)
def test_refusals(
    more: list[str], message: str, folder: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*job(folder, dense, "refused"), *more]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not (folder / "refused").exists()


def test_models_of_the_other_task_are_refused(
    folder: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*job(folder, folder / "encoder", "refused")]) == 2
    assert "pruned-trainer finetune --task natural_questions" in capsys.readouterr().err
    one = job_settings(tmp_path, BertForQuestionAnswering(BertConfig(vocab_size=28, **SIZES)))
    with pytest.raises(ValueError, match="the model has answer types: it is for --task natural_questions"):
        prune(replace(one, model=str(dense)))
    with pytest.raises(ValueError, match="its vocabulary has|is for --task|has no answer types"):
        start(settings_of(folder, dense, tmp_path, teacher=one.model))


def settings_of(folder: Path, dense: Path, out: Path, **changes: Any) -> PruneSettings:
    return PruneSettings(
        model=str(dense), train_file=folder / "train.jsonl.gz", out=out / "out", targets=(Target(macs=0.5),),
        task="natural_questions", max_length=32, stride=8, null_rate=1.0, **changes,
    )  # fmt: skip


def test_gates_see_their_part_and_held_out_documents_nobody(
    folder: Path, dense: Path, tmp_path: Path
) -> None:
    found = start(settings_of(folder, dense, tmp_path, gate_fraction=0.2))
    assert len(found.gate_train) == round(0.2 * len(found.train))
    assert isinstance(found.gate_train, Share) and len(found.gate_train[:3]) == 3
    assert lengths_of(found.gate_train) == [len(one["input_ids"]) for one in found.gate_train]
    assert 5 < len(found.validation) < 40
    trained = len(NaturalQuestionsTask(32, 8, null_rate=1.0).prepare(
        NaturalQuestionsTask().read(folder / "train.jsonl.gz", ""), word_tokenizer(WORDS)
    ).windows)  # fmt: skip
    assert len(found.train) + len(found.validation.windows) == trained  # type: ignore[attr-defined]


def test_answer_types_take_part_in_the_losses() -> None:
    torch.manual_seed(0)
    models = [with_answer_types(stock_model("bert", seed=seed)) for seed in (0, 1)]
    batch = padded_batch((6, 3))
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        a, b = (model(**batch) for model in models)
        labels = {name: torch.tensor([1, 2]) for name in ("start_positions", "end_positions", "answer_types")}
        loss = models[0](**batch, **labels).loss
    torch.testing.assert_close(example_losses(a, labels).mean(), loss)
    by_hand = [
        (b.answer_type_logits / 2).softmax(-1)
        * ((b.answer_type_logits / 2).log_softmax(-1) - (a.answer_type_logits / 2).log_softmax(-1))
    ]
    own, wanted = (comparable_outputs(outputs, None, real) for outputs in (a, b))
    starts_and_ends = Outputs(own.kind, {k: v for k, v in wanted.values.items() if k != "answer_type_logits"})
    spans, every = (divergences(own, taught, real, 2.0).mean() for taught in (starts_and_ends, wanted))
    expected = (2 * spans + 4 * by_hand[0].sum(-1).mean()) / 3
    torch.testing.assert_close(every, expected)


def test_a_cached_teacher_teaches_the_same(
    folder: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start, end and type logits read from disk give the losses that the teacher gives; once they are all
    there it is not asked again."""
    stored, losses = [], []
    original = TeacherCache.store

    def counting(self: Any, *args: Any) -> None:
        stored.append(name)
        original(self, *args)

    monkeypatch.setattr(TeacherCache, "store", counting)
    for name, cache in (("plain", None), ("filling", tmp_path / "cache"), ("filled", tmp_path / "cache")):
        one = settings_of(
            folder, dense, tmp_path, cache_teacher=cache, distillation=Distillation(hidden=0.0),
            batch_size=64, gate_steps=4, retrain_steps=10, gate_fraction=0.5,
        )  # fmt: skip
        log = prune(variant(one, name))["training"]
        losses.append([entry["loss"] for entry in log["gates"] + log["retrain"] if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[2] == pytest.approx(losses[0], rel=1e-3)
    assert stored and set(stored) == {"filling"}


def test_the_record_of_a_run_names_its_task(folder: Path, dense: Path, tmp_path: Path) -> None:
    one = settings_of(folder, dense, tmp_path, gate_steps=None, retrain_steps=0, recipe="random")
    report = prune(one)
    assert report["task"] == "natural_questions" and one.to_json()["task"] == "natural_questions"
    assert variant(one, "x", task="natural_questions").differences(one.to_json()) == ["out"]
