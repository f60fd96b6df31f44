"""The model card, README.md, of a pruned checkpoint: its layer shapes, scores and speed, and how to load it.

Scores and speed come from the trainer's report.json. A card that somebody wrote by hand is left alone.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pruned_ops.files import read_json, write_whole
from pruned_ops.shape import LayerShape, ModelShape
from pruned_ops.version import __version__

CARD, REPORT, WEIGHTS = "README.md", "report.json", "model.safetensors"
# Every card that is written here holds this line. Somebody who changes the text by hand deletes it.
MARKER = (
    "<!-- Written by pruned_ops, and anew when the model is saved. Delete this line to keep your text. -->"
)
# The placeholder that transformers puts into a new repository of the hub holds this sentence.
_PLACEHOLDER = "This model card has been automatically generated."
# The end of a class's name -> what loads such a model, and the hub's name for its task.
_KINDS = {
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForNaturalQuestions": ("load_natural_questions", "question-answering"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "Model": ("AutoModel", "feature-extraction"),
}
_SCORES = {
    "f1": "F1", "exact": "exact match", "f1_span": "span F1 (answerable questions, no null option)",
    "long_f1": "long answer F1", "short_f1": "short answer F1",
}  # fmt: skip


def write_model_card(folder: str | Path, model: Any) -> bool:
    """Write README.md beside the checkpoint of `model` in `folder`.

    An earlier card of ours, and transformers' placeholder, are replaced; returns False where another README
    is there. Scores and speed come from report.json in the folder. Where there is none, they come from the
    folder that the model was loaded from, if the weights are the same bit for bit. A report of other layer
    shapes is not this model's, and is not used.
    """
    path = Path(folder) / CARD
    if path.exists():
        card = path.read_text(encoding="utf-8", errors="replace")
        if MARKER not in card and _PLACEHOLDER not in card:
            return False
    text = model_card(type(model).__name__, model.config, _report(Path(folder), model))
    write_whole(path, text)
    return True


def _report(folder: Path, model: Any) -> Mapping[str, Any] | None:
    source = Path(model.name_or_path or folder)
    if not (folder / REPORT).is_file():
        weights = source / WEIGHTS, folder / WEIGHTS
        if not all(path.is_file() for path in weights) or not filecmp.cmp(*weights, shallow=False):
            return None
        folder = source
    try:
        report = read_json(folder / REPORT)
        return report if report["shape"] == model.config.layer_shapes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the file is no report of the trainer's


def model_card(model_class: str, config: Any, report: Mapping[str, Any] | None) -> str:
    """The text of the card. report: the trainer's report.json for this checkpoint."""
    loader, task = next(
        (kind for ending, kind in _KINDS.items() if model_class.endswith(ending)), _KINDS["Model"]
    )
    kind = config.family.name
    lines = [
        "---", "library_name: transformers", f"pipeline_tag: {task}", "tags:", "- pruned_ops", "- pruning",
        "---", MARKER, "",
        f"# A structurally pruned {kind} ({task})", "",
        "Attention heads and feed-forward units that the task did not need are cut out of the weights: "
        "layers differ in size, nothing is masked. No code comes with the checkpoint; `trust_remote_code` "
        "is not needed.", "",
        *_loading(loader, getattr(config, "quantization_config", None) is not None),
        *_shapes(config),
        *(_numbers(report) if report else ["## Scores and speed", "", "Not known of this checkpoint.", ""]),
        f"`{model_class}`, written by pruned_ops {__version__}.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _loading(loader: str, in_int8: bool) -> Iterator[str]:
    """How to load it. in_int8: whether its linears are stored so, and cannot be trained."""
    where = '"PATH_OR_HUB_NAME"'
    yield from ("## Load it", "", "```python")
    if loader == "load_natural_questions":
        yield from ("import pruned_ops", f"from pruned_ops.natural_questions import {loader}", "")
        load = f"{loader}({where})"
    else:
        yield "import pruned_ops  # teaches the Auto classes what a pruned checkpoint is"
        yield from (f"from transformers import {loader}", "")
        load = f"{loader}.from_pretrained({where})"
    use = "linear layers in int8; it can only be run" if in_int8 else "it can be trained on"
    yield f"model = {load}  # plain torch, padded; {use}"
    yield "model = pruned_ops.optimize(model)  # the same calls, fast, for inference"
    if loader == "AutoModelForQuestionAnswering":
        yield f"answerer = pruned_ops.QuestionAnswerer({where})  # answers out of texts of any length"
    yield from ("```", "")


def _shapes(config: Any) -> Iterator[str]:
    shape: ModelShape = config.shape
    heads, width = config.num_attention_heads, config.intermediate_size
    # A stock model is as wide as its heads together; a pruned one may have lost some of that.
    hidden = max(shape.hidden_size, heads * shape.head_dim)
    dense = replace(shape, layers=(LayerShape(heads, width),) * len(shape.layers), hidden_size=hidden)
    kept = f"{shape.parameters():,} of {dense.parameters():,}"
    yield from (
        "## What is left",
        "",
        f"| layer | heads of {heads} | FFN width of {width} |",
        "| --- | --- | --- |",
    )
    for number, layer in enumerate(shape.layers):
        yield f"| {number} | {layer.num_heads} | {layer.ffn_width} |"
    yield from (
        "",
        f"Hidden size {shape.hidden_size}, heads of {shape.head_dim}; {kept} parameters in layers.",
        "",
    )


def _numbers(report: Mapping[str, Any]) -> Iterator[str]:
    """Scores and speed beside the dense model's. Lines for which the report has no numbers are left out."""
    dense, pruned, speed = (_mapping(report.get(name)) for name in ("dense", "pruned", "speedup"))
    yield from ("## Scores and speed", "", "| | dense | pruned |", "| --- | --- | --- |")
    for key, label in {**_SCORES, **dict(_listed(report))}.items():
        if _are_numbers(dense.get(key), pruned.get(key)):
            yield f"| {label} | {dense[key]:.2f} | {pruned[key]:.2f} |"
    name = str(speed.get("workload"))
    times = [
        _mapping(_mapping(_mapping(model.get("workloads")).get(name)).get("ms")).get("p50")
        for model in (dense, pruned)
    ]
    if _are_numbers(*times):
        yield f"| ms a batch (p50), {name} | {times[0]:.1f} | {times[1]:.1f} |"
    if _are_numbers(speed.get("reached")):
        dtype = speed.get("dtype", "fp32")
        runtime = "our runtime" if dtype == "fp32" else f"our runtime in {dtype}"
        yield f"| speed-up, both in {runtime} | 1.00x | {speed['reached']:.2f}x |"
    evaluated_on, machine = _mapping(report.get("evaluated_on")), _mapping(report.get("machine"))
    yield ""
    if evaluated_on:
        noun = evaluated_on.get("noun", "questions")
        yield f"Scored on {evaluated_on.get(noun)} {noun} of {evaluated_on.get('file')}."
    if machine:
        place = machine.get("accelerator") or machine.get("processor")
        torch = _mapping(report.get("versions")).get("torch")
        threads = machine.get("threads")
        yield f"Timed on {place}, {threads} thread{'' if threads == 1 else 's'}, torch {torch}."
    yield from ("Both by pruned-trainer when the checkpoint was made.", "")


def _listed(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, label) of the scores that the report itself lists, beside those of _SCORES."""
    listed = report.get("score_lines")
    for line in listed if isinstance(listed, list) else ():
        key, label = _mapping(line).get("key"), _mapping(line).get("label")
        if isinstance(key, str) and isinstance(label, str) and key not in _SCORES:
            yield key, label


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
