"""Times the study's models. Their shapes alone matter, so any machine can time what another one trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from transformers import PreTrainedModel

from harness import Row
from pruned_ops import LayerShape
from pruned_ops.measure.timing import Workload
from pruned_trainer.jobs.evaluation import time_models
from pruned_trainer.jobs.job import TIMED_BATCHES
from pruned_trainer.pruning.compact import compact
from pruned_trainer.pruning.decision import Decision, Kept, LayerDecision
from study.records import Study
from study.rows import half


def shaped(dense: PreTrainedModel, row: Row) -> PreTrainedModel:
    """A model of a row's shape, made of the first heads and units, because any of them take as long."""
    shapes = [LayerShape(*map(int, layer.split("/"))) for layer in row["layers"].split()]
    if len(shapes) != dense.config.num_hidden_layers:
        dense = half(dense)
    layers = [LayerDecision(_first(shape.num_heads), _first(shape.ffn_width)) for shape in shapes]
    hidden = _first(row["hidden_size"]) if row["hidden_size"] != dense.config.hidden_size else None
    return compact(dense, Decision(tuple(layers), 1, {}, {}, hidden))


def _first(number: int) -> Kept:
    return Kept(tuple(range(number)), (1.0,) * number)


def timings(study: Study, rows: Sequence[Row], batch_size: int) -> list[Row]:
    """A row for each row's model beside the dense one, all in turn, on real lengths in arrival order."""
    job = study.job
    lengths = job.validation.arrival_lengths()
    workload = Workload.arrival_order(lengths, min(batch_size, len(lengths)), TIMED_BATCHES)
    models = {"dense": copy.deepcopy(job.dense)}
    once = {(row["row"], row["seed"]): row for row in rows}  # retrained in several ways, of one shape
    rows = [row for row in once.values() if row["row"] != "control"]
    models |= {f"{row['row']}-seed{row['seed']}": shaped(job.dense, row) for row in rows}
    measured, _ = time_models(models, workload)
    timed = []
    for row in rows:
        timing = measured[f"{row['row']}-seed{row['seed']}"]
        speedup, cut = timing.speedup_over(measured["dense"]), row.get("macs_cut")
        timed.append(
            {
                "row": row["row"],
                "seed": row["seed"],
                "workload": workload.name,
                "ms_dense": round(measured["dense"].ms(50), 3),
                "ms": round(timing.ms(50), 3),
                "speedup": round(speedup, 3),
                "macs_cut": round(cut, 3) if cut else None,
                "arrives": round(speedup / cut, 3) if cut else None,
                "rounds": len(timing.seconds),
            }
        )
    return timed
