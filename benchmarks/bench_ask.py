"""What QuestionAnswerer costs around the model, and what it gains over a plain loop around the dense model.

Three runners get the same questions, drawn from a file, in rounds after one that is not timed: `answer` on
the texts; the optimised model alone on the same windows, sorted into batches of as many tokens; and a plain
loop around the dense model with Hugging Face alone, which tokenizes but does not decode, in padded batches of
8 as they come.
Usage: python benchmarks/bench_ask.py DENSE PRUNED --data SQUAD/eval.json
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import harness
from option_types import at_least
from presentation import counted
from pruned_ops import QuestionAnswerer
from pruned_ops.checkpoints.loading import load_model, load_tokenizer
from pruned_ops.measure.timing import Runner, Workload, machine, versions
from pruned_ops.qa.logits import batch_logits
from pruned_ops.qa.windows import Window, windows
from pruned_ops.runtime.batch_runner import token_batches
from pruned_trainer.tasks.squad.examples import load_squad


def bare(answerer: QuestionAnswerer, cut: Sequence[Window]) -> None:
    """Runs the optimised model alone on the windows."""
    model, device = answerer.model, next(answerer.model.parameters()).device
    with torch.inference_mode():
        for places in token_batches(cut, answerer.reading.tokens_per_batch):
            for _ in batch_logits(model, [cut[i] for i in places], model.config.pad_token_id, device):
                pass


def plain_loop(model: Any, tokenizer: Any, questions: Sequence[str], contexts: Sequence[str]) -> None:
    """Runs the dense model in a loop as one writes it with Hugging Face alone."""
    with torch.inference_mode():
        for first in range(0, len(questions), 8):
            texts = (list(questions[first : first + 8]), list(contexts[first : first + 8]))
            batch = tokenizer(
                *texts, truncation="only_second", max_length=384, stride=128, padding=True,
                return_overflowing_tokens=True, return_offsets_mapping=True, return_tensors="pt",
            )  # fmt: skip
            output = model(**{name: batch[name] for name in tokenizer.model_input_names})
            output.start_logits.argmax(1), output.end_logits.argmax(1)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dense", metavar="DENSE", help="a fine-tuned stock checkpoint")
    parser.add_argument("pruned", metavar="PRUNED", help="a checkpoint that was pruned from it")
    parser.add_argument("--data", type=Path, required=True, help="SQuAD-format JSON")
    parser.add_argument(
        "--questions", type=at_least(1), default=300, help="how many are asked (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=at_least(1), default=3, help="times that every runner runs (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    logging.set_verbosity_error()
    examples = list(load_squad(arguments.data).examples)
    random.Random(0).shuffle(examples)
    questions = [example.question for example in examples[: arguments.questions]]
    contexts = [example.context for example in examples[: arguments.questions]]
    answerer = QuestionAnswerer(arguments.pruned, device="cpu")
    cut = windows(answerer.tokenizer, questions, contexts)
    dense, tokenizer = load_model(arguments.dense), load_tokenizer(arguments.dense)
    runners: dict[str, Runner] = {
        "pruned model alone": lambda _: bare(answerer, cut),
        "QuestionAnswerer, pruned": lambda _: answerer.answer(questions, contexts),
        "plain loop, dense": lambda _: plain_loop(dense, tokenizer, questions, contexts),
    }
    workload = Workload("questions", (tuple(map(len, cut)),))
    timings = harness.interleaved(runners, workload, [{}], arguments.rounds)
    print(", ".join(f"{k}: {v}" for k, v in {**machine(), **versions()}.items()))
    threads = counted(torch.get_num_threads(), "thread")
    print(f"{len(questions)} questions, {len(cut)} windows, {threads}")
    ours = timings["QuestionAnswerer, pruned"]
    for name, timing in timings.items():
        rate, ratio = timing.sequences_per_s, ours.speedup_over(timing)
        print(f"{name:>26}  {rate:8.1f} windows/s; QuestionAnswerer is {ratio:.3f} times as fast")


if __name__ == "__main__":
    harness.run(main)
