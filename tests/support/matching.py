"""A task that needs attention and takes seconds to learn: find the question's word in the context."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from transformers import BertConfig, BertForQuestionAnswering

from tiny_tokenizers import word_tokenizer

WORDS = 24
TRAINED = Path(__file__).resolve().parents[2] / "build" / "trained"


def squad_file(path: Path, questions: int, seed: int, unanswerable: float = 0.0, articles: int = 8) -> Path:
    """A SQuAD 2.0 file: "w7" asked of ten different words, of which one is w7 (or none)."""
    rng = random.Random(seed)
    paragraphs = []
    for number in range(questions):
        words = rng.sample([f"w{i}" for i in range(WORDS)], 11)
        context, impossible = " ".join(words[:10]), rng.random() < unanswerable
        asked = words[10] if impossible else rng.choice(words[:10])
        answer = (
            {"text": asked, "answer_start": f" {context} ".index(f" {asked} ")} if not impossible else None
        )
        qa = {
            "id": f"{seed}-{number}",
            "question": asked,
            "is_impossible": impossible,
            "answers": [answer] if answer else [],
        }
        paragraphs.append({"context": context, "qas": [qa]})
    data = [{"title": f"t{i}", "paragraphs": paragraphs[i::articles]} for i in range(articles)]
    path.write_text(json.dumps({"version": "v2.0", "data": data}))
    return path


def batch_of(questions: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The same task as tensors: [CLS] q [SEP] ten words [SEP]."""
    order = torch.rand(questions, WORDS, generator=generator).argsort(1)[:, :10] + 4
    place = torch.randint(10, (questions,), generator=generator)
    asked = order.gather(1, place[:, None])
    one = torch.ones(questions, 1, dtype=torch.long)
    ids = torch.cat([2 * one, asked, 3 * one, order, 3 * one], 1)
    types = (torch.arange(ids.size(1)) > 2).long().expand_as(ids)
    return {
        "input_ids": ids,
        "token_type_ids": types,
        "attention_mask": torch.ones_like(ids),
        "start_positions": place + 3,
        "end_positions": place + 3,
    }


def trained_model(steps: int = 500, **sizes: Any) -> BertForQuestionAnswering:
    """A 2-layer BERT that has learned the task, trained once for all tests, in build/trained."""
    torch.manual_seed(0)
    config = BertConfig(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "vocab_size": WORDS + 4,
            "max_position_embeddings": 32,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **sizes,
        }
    )
    model = BertForQuestionAnswering(config).train()
    made_of = f"{steps} {config.to_json_string()} {torch.__version__} {Path(__file__).read_text()}"
    kept = TRAINED / f"{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.safetensors"
    if not kept.exists():
        _train(model, steps)
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, f"{kept}.{os.getpid()}")
        os.replace(f"{kept}.{os.getpid()}", kept)
    load_model(model, kept)
    return model.eval()


def _train(model: BertForQuestionAnswering, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        loss = model(**batch_of(64, generator)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def accuracy(model: Any) -> float:
    """Share of 500 fresh questions whose start and end are both found."""
    batch = {k: v.to(model.device) for k, v in batch_of(500, torch.Generator().manual_seed(99)).items()}
    with torch.no_grad():
        output = model(**{k: v for k, v in batch.items() if not k.endswith("positions")})
    right = output.start_logits.argmax(1) == batch["start_positions"]
    return float((right & (output.end_logits.argmax(1) == batch["end_positions"])).float().mean())


def save_checkpoint(model: Any, folder: Path) -> Path:
    """Model and word tokenizer as a checkpoint that the commands take."""
    model.save_pretrained(folder)
    word_tokenizer(WORDS).save_pretrained(folder)
    return folder
