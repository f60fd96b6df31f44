"""report.json and sweep.json as prune and sweep write them, with numbers that are easy to find again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# The ids of a page's parts.
SECTIONS = ("scores", "layers", "training", "speed", "speeds", "backends", "machine", "versions", "command")
FIGURES = ("report-layers", "report-gates", "report-target", "report-speed")
SWEEP = ("curve", "models", "figure-sweep", "training", "speed", "backends", "machine", "command")
DATA = {"squad": "SQuAD 2.0", "natural_questions": "Natural Questions"}
SCORES = {"squad": ("f1", "f1_span"), "natural_questions": ("long_f1", "short_f1")}
BACKENDS = {"attention": "cpu", "linear_gelu": "reference"}


def a_report(task: str = "squad", layers: int = 3, **changes: Any) -> dict[str, Any]:
    """The report of a joint run on layers of 12 heads and FFN width 1536. changes: other values of fields."""
    scores = SCORES[task]
    models = {
        name: {
            **{score: base + i for i, score in enumerate(scores)}, "params": size, "macs": 100 * size,
            "bytes": 4 * size,
            "workloads": {
                "arrival-b8": {
                    "ms": {"p20": ms - 1, "p50": ms, "p80": ms + 1}, "sequences_per_s": 8000 / ms,
                    "backends": BACKENDS,
                }
            },
        }
        for name, base, size, ms in (("dense", 71.25, 8_000_000, 140.5), ("pruned", 70.75, 4_000_000, 70.5))
    }  # fmt: skip
    report = {
        **models,
        "speedup": {
            "asked": None,
            "reached": 1.993,
            "interval": [1.971, 2.012],
            "against_hugging_face": 4.5678,
            "workload": "arrival-b8",
            "dtype": "fp32",
        },
        **{f"{score}_loss": 0.5 for score in scores},
        **{f"{score}_loss_interval": [-0.25, 1.75] for score in scores},
        "target": {"asked": {"macs": 0.5}, "reached": {"macs": 0.4987}},
        "shape": [{"num_heads": i, "ffn_width": 100 * i} for i in range(layers)],
        "hidden_size": 384,
        "dense_shape": {"num_heads": 12, "ffn_width": 1536, "hidden_size": 384},
        "evaluated_on": {
            "file": "eval.json",
            "questions": 3041,
            "threshold_chosen_on_these": False,
            "data_set": DATA[task],
        },
        "task": task,
        "recipe": "joint",
        "machine": {"processor": "A Processor (7)", "cores": 2, "accelerator": None},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "command": "pruned-trainer prune --macs 0.5",
        "plan": {"gate_steps": 40, "retrain_steps": 77, "gate_step_seconds": 1.5},
        "training": {"minutes": 42.125, "gates": gate_log(layers), "retrain": []},
    }
    return {**report, **changes}


def gate_log(layers: int, steps: int = 8) -> list[dict[str, float]]:
    """The log of the joint recipe: gates that close, and the summary that ends it."""
    log = []
    for step in range(1, steps + 1):
        left = 1 - 0.5 * step / steps
        counts = {f"open_heads/layer_{i}": 12 * left for i in range(layers)}
        counts |= {f"open_ffn/layer_{i}": 1536 * left for i in range(layers)}
        log.append({"loss": 1.0, "expected": left + 0.1, "wanted": left, "step": 5 * step, **counts})
    return [*log, {"train_runtime": 10.0, "step": 5 * steps}]


def a_sweep(task: str = "squad", folders: tuple[str, ...] = ("macs-0.7", "macs-0.5")) -> dict[str, Any]:
    """The sweep.json of a family whose models differ in speed."""
    report, points = a_report(task), []
    kept = [key for key in report if key in ("target", "shape") or "_loss" in key]
    for number, folder in enumerate(folders):
        speed = {**report["speedup"], "reached": 1.5 + number}
        point = {"folder": folder, "speedup": speed, **{key: report[key] for key in kept}}
        points.append({**point, **{k: v for k, v in report["pruned"].items() if k != "workloads"}})
    dense = {k: v for k, v in report["dense"].items() if k != "workloads"}
    return {"task": task, "dense": dense, "points": points, "command": "pruned-trainer sweep --macs 0.7 0.5"}


def put(folder: Path, value: Any, name: str = "report.json") -> Path:
    """The folder, made if need be, with the value in it as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder
