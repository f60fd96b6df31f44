"""Documents a second on Natural Questions: our packed runtime beside Hugging Face's padded one.

All windows of a document are one batch, and all runners take turns on the same documents, in rounds. Hugging
Face's dense model is its own BertModel or RobertaModel (with eager attention, and with sdpa) under the
checkpoint's heads; it cannot hold a pruned encoder, which runs in plain PyTorch with sdpa instead. Peak
memory is measured in a process of its own for each.
Usage: python benchmarks/bench_natural_questions.py DENSE PRUNED --data NATURAL_QUESTIONS/eval.jsonl.gz
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, RobertaConfig
from transformers.utils import logging

import harness
import pruned_ops
from harness import Row
from option_types import at_least
from presentation import counted
from pruned_ops.checkpoints.loading import load_tokenizer
from pruned_ops.files import write_whole
from pruned_ops.measure.timing import Workload
from pruned_ops.models.families.known import family_of
from pruned_ops.models.heads import NaturalQuestionsOutput
from pruned_ops.models.natural_questions import load_natural_questions
from pruned_ops.qa.logits import batch_logits
from pruned_ops.runtime.batch_runner import padded
from pruned_ops.runtime.refusals import refuse_encoder
from pruned_trainer.tasks.natural_questions.documents import Document, read_documents
from pruned_trainer.tasks.natural_questions.predictions import decode_documents
from pruned_trainer.tasks.natural_questions.windows import NqWindow, cut_document, located, with_markers
from rivals.rival import Run, compare_logits, forward
from whole_models.memory import megabytes

# The first runtime of each model is padded, with sdpa: the others' logits and times are compared with it.
RUNTIMES = {
    "dense": ("hf-sdpa", "hf-eager", "ours", "ours-int8"),
    "pruned": ("torch-sdpa", "ours", "ours-int8"),
}
BASELINE = "hf-eager dense"
MAX_LENGTH, STRIDE = 384, 128
# Writing 5 to it makes the present memory the peak.
CLEAR = Path("/proc/self/clear_refs")


class HuggingFace(nn.Module):
    """The dense model as Hugging Face computes it: its own encoder under the checkpoint's heads."""

    def __init__(self, model: Any, attention: str) -> None:
        super().__init__()
        kind: Any = RobertaConfig if family_of(model.config).positions_from_padding else BertConfig
        fields = {name: value for name, value in model.config.to_dict().items() if name != "model_type"}
        self.encoder = AutoModel.from_config(
            kind(**fields), attn_implementation=attention, add_pooling_layer=False
        )
        self.encoder.load_state_dict(model.base_model.state_dict(), assign=True)
        self.qa_outputs, self.answer_type_outputs = model.qa_outputs, model.answer_type_outputs

    def forward(self, **batch: Any) -> NaturalQuestionsOutput:
        states = self.encoder(**batch).last_hidden_state
        start, end = self.qa_outputs(states).unbind(-1)
        return NaturalQuestionsOutput(None, start, end, self.answer_type_outputs(states[:, 0]))


@dataclass(frozen=True)
class Pages:
    """Documents with their windows. seconds: the median time to tokenise a document and cut it up."""

    documents: list[Document]
    windows: list[list[NqWindow]]
    seconds: float

    @classmethod
    def read(cls, data: Path, checkpoint: str, number: int) -> Pages:
        """`number` documents of the file, drawn with seed 0."""
        documents = list(read_documents([data]))
        chosen = random.Random(0).sample(documents, min(number, len(documents)))
        tokenizer, windows, seconds = with_markers(load_tokenizer(checkpoint)), [], []
        for document in chosen:
            start = time.perf_counter()
            page, parts = cut_document(document, tokenizer, MAX_LENGTH, STRIDE)
            windows.append([located(part, page, 0) for part in parts])
            seconds.append(time.perf_counter() - start)
        return cls(chosen, windows, statistics.median(seconds))

    @property
    def workload(self) -> Workload:
        return Workload("document", tuple(tuple(map(len, windows)) for windows in self.windows))

    def inputs(self, pad_token_id: int) -> list[dict[str, Tensor]]:
        """A padded batch for each document."""
        return [padded(windows, pad_token_id) for windows in self.windows]


def load(checkpoint: str, runtime: str) -> Any:
    """The checkpoint's model in evaluation mode, as this runtime runs it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = load_natural_questions(checkpoint).eval()
    if runtime.startswith("hf-"):
        return HuggingFace(model, runtime.removeprefix("hf-")).eval()
    if runtime == "torch-sdpa":
        return model
    return pruned_ops.optimize(model, dtype="int8" if runtime == "ours-int8" else None)


def peak(checkpoint: str, runtime: str, inputs: Sequence[dict[str, Tensor]], threads: int) -> float:
    """The most MiB resident in this process while the loaded model runs once on every document."""
    torch.set_num_threads(threads)
    model = load(checkpoint, runtime)
    gc.collect()
    CLEAR.write_text("5")
    with torch.inference_mode():
        for batch in inputs:
            model(**batch)
    return megabytes("VmHWM")


def peak_apart(checkpoint: str, runtime: str, inputs: Sequence[dict[str, Tensor]]) -> float:
    """`peak` in a process of its own: spawned, because a fork would start with all that this one holds."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, checkpoint, runtime, inputs, torch.get_num_threads()).result()


def checked(name: str, runners: dict[str, Run], inputs: list[dict[str, Tensor]]) -> Row:
    """How far a runner's logits are from the padded model's; ValueError where it is more than rounding."""
    runtime, model = name.split()
    precision = "int8" if runtime == "ours-int8" else "fp32"
    padded = runners[f"{RUNTIMES[model][0]} {model}"]
    return {"precision": precision, **compare_logits(runners[name], padded, inputs[:3], precision)}


def decoding_seconds(pages: Pages, model: Any) -> float:
    """The median time to decode a document's answer."""
    seconds = []
    for windows in pages.windows:
        with torch.inference_mode():
            logits = list(batch_logits(model, windows, model.config.pad_token_id, torch.device("cpu")))
        start = time.perf_counter()
        decode_documents(windows, logits, 1)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(arguments: argparse.Namespace) -> list[Row]:
    """A row for each runner."""
    checkpoints = {"dense": arguments.dense, "pruned": arguments.pruned}
    models = {}
    for name, checkpoint in checkpoints.items():
        refused = refuse_encoder(load_natural_questions(checkpoint).base_model, int8=True)
        for runtime in RUNTIMES[name]:
            if runtime == "ours-int8" and refused is not None:
                print(f"ours-int8 {name} is left out: {refused}")
            else:
                models[f"{runtime} {name}"] = load(checkpoint, runtime)
    runners = {name: forward(model) for name, model in models.items()}
    pages = Pages.read(arguments.data, arguments.dense, arguments.documents)
    inputs = pages.inputs(models["ours dense"].config.pad_token_id)
    facts = {name: checked(name, runners, inputs) for name in runners}
    for name in runners:
        runtime, model = name.split()
        facts[name]["peak_mib"] = round(peak_apart(checkpoints[model], runtime, inputs), 1)
    decoding = decoding_seconds(pages, models["ours pruned"])
    timings = harness.interleaved(runners, pages.workload, inputs, arguments.rounds)
    for name, timing in timings.items():
        model = name.split()[1]
        facts[name] |= {
            "documents": len(inputs),
            "padded_tokens": sum(batch["input_ids"].numel() for batch in inputs),
            "documents_per_s": round(len(inputs) / statistics.median(timing.seconds), 3),
            "speedup_vs_hf_sdpa_dense": round(timing.speedup_over(timings["hf-sdpa dense"]), 3),
            "speedup_vs_itself_padded": round(
                timing.speedup_over(timings[f"{RUNTIMES[model][0]} {model}"]), 3
            ),
            "cutting_ms": round(1000 * pages.seconds, 2),
            "decoding_ms": round(1000 * decoding, 2),
            "data": arguments.data.name,
        }
    return harness.rows(timings, BASELINE, facts)


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows as a Markdown table, then the documents and the machine that they were measured on."""
    first = rows[0]
    columns = (
        "runner", "documents/s", "ms a document, p50 (p20-p80)", f"against {BASELINE}",
        "against hf-sdpa dense", "against itself, padded", "largest logit error", "peak MiB",
    )  # fmt: skip
    shown = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for row in rows:
        ratios = ("speedup_vs_rival", "speedup_vs_hf_sdpa_dense", "speedup_vs_itself_padded")
        cells = (
            row["runner"], f"{row['documents_per_s']:.2f}",
            f"{row['ms_p50']:.1f} ({row['ms_p20']:.1f}-{row['ms_p80']:.1f})",
            *(f"{row[name]:.2f}x" for name in ratios), f"{row['max_error']:.1e}", f"{row['peak_mib']:.0f}",
        )  # fmt: skip
        shown.append(f"| {' | '.join(cells)} |")
    padded = first["padded_tokens"] / first["real_tokens"]
    return [
        *shown, "",
        f"{first['documents']} documents of {first['data']} (seed 0), {first['sequences']} windows, each "
        f"document's in a batch: {first['real_tokens']:,} tokens a round, {padded:.2f}x with padding. The "
        f"model alone: tokenising and cutting a document takes {first['cutting_ms']} ms, decoding "
        f"its answer {first['decoding_ms']} ms. Ratios are medians over {first['rounds']} rounds.", "",
        f"Machine: {first['machine_processor']}, {counted(first['machine_threads'], 'thread')}, "
        f"{first['machine_cpu_capability']}; torch {first['version_torch']}, transformers "
        f"{first['version_transformers']}; {first['date']}. `{first['command']}`",
    ]  # fmt: skip


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dense", metavar="DENSE", help="a dense Natural Questions checkpoint")
    parser.add_argument("pruned", metavar="PRUNED", help="a checkpoint that was pruned from it")
    parser.add_argument("--data", type=Path, required=True, help="Natural Questions JSONL")
    parser.add_argument(
        "--documents", type=at_least(1), default=24, help="how many are drawn from it (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=at_least(1), default=5, help="times that every runner runs (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, help="CSV to write (default: in benchmarks/results/, named after the machine)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parsed(argv)
    out = harness.out_path(arguments.out, "natural-questions-speed", "cpu")
    rows = measure(arguments)
    harness.write_rows(out, rows)
    text = "\n".join(lines(rows))
    write_whole(out.with_suffix(".md"), f"{text}\n")
    print(f"{text}\nwritten to {out} and {out.with_suffix('.md').name}")


if __name__ == "__main__":
    harness.run(main)
