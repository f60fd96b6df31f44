"""Saved models timed in this runtime and in Hugging Face's, on the same batches; `pruned-ops bench`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from pruned_ops.measure.launch_bound import HALF, TWIN, LaunchBound, half_of, tiny_twin
from pruned_ops.measure.timing import Runner, Timing, Workload, interleave, machine, versions
from pruned_ops.models.inputs import most_tokens, padding_id
from pruned_ops.models.int8_checkpoints import dequantised
from pruned_ops.models.stock import model_shape
from pruned_ops.ops.registry import backends_of
from pruned_ops.runtime.optimize import optimize
from pruned_ops.runtime.packed_encoder import packed_encoders

OURS, THEIRS = "pruned_ops", "Hugging Face"


@dataclass(frozen=True)
class Row:
    """One model in one runtime.

    p50_ms, p90_ms: a batch's milliseconds, over all batches of all rounds. macs: a batch's
    multiply-accumulates. speedup: Hugging Face's time of the same model over this one. backends: op -> the
    backends that ran it, in our runtime.
    """

    model: str
    runtime: str
    dtype: str
    p50_ms: float
    p90_ms: float
    sequences_per_s: float
    macs: float
    speedup: float
    backends: Mapping[str, str]


@dataclass(frozen=True)
class Benchmark:
    """The rows, two for each model. against_dense: our time of the dense model over our time of the pruned
    one, where both were measured; against_their_dense: Hugging Face's time of it. stored_int8: the models
    whose weights are stored in int8."""

    title: str
    rows: tuple[Row, ...]
    against_dense: float | None
    against_their_dense: float | None
    launch_bound: LaunchBound
    stored_int8: tuple[str, ...] = ()

    @property
    def sentences(self) -> list[str]:
        """What the times mean, in words."""
        sentences = [
            f"the weights of the {name} are stored in int8; Hugging Face's runtime has them in fp32"
            for name in (name if name == "model" else f"{name} model" for name in self.stored_int8)
        ]
        if self.against_dense is not None:
            macs = {row.model: row.macs for row in self.rows}
            sentences.append(
                f"the pruned model is {self.against_dense:.2f} times as fast as the dense one, both in our "
                f"runtime, with {macs['pruned'] / max(1, macs['dense']):.3f} of its multiply-accumulates"
            )
        return [*sentences, self.launch_bound.sentence]


def compare(
    models: Mapping[str, Any], workload: Workload, rounds: int, dtype: str = "fp32", fixed: bool = False
) -> Benchmark:
    """Time saved models, each in both runtimes, and test whether the first one is launch-bound.

    models: "pruned" and "dense", or one model under any name. dtype: "fp32", "bfloat16" or "int8", of
    our runtime's linears. A model that was loaded from int8 weights runs in int8; Hugging Face's runtime,
    which has no kernels for them, gets them in fp32. fixed: whether every batch is padded to the longest
    sequence of all.
    Errors: ValueError for models that cannot take the same inputs; `optimize`'s.
    """
    inputs = _inputs(list(models.values()), workload, fixed)
    kind = None if dtype == "fp32" else dtype
    optimised = {name: optimize(copy.deepcopy(model), dtype=kind) for name, model in models.items()}
    kinds = {name: packed_encoders(model)[0].linear_dtype for name, model in optimised.items()}
    original_models, models = models, {name: dequantised(model) for name, model in models.items()}
    stored = tuple(name for name, model in models.items() if model is not original_models[name])
    first = next(iter(models))
    runners: dict[str, Runner] = {}
    for name, model in models.items():
        runners[f"{OURS} {name}"] = _runner(optimised[name])
        runners[f"{THEIRS} {name}"] = _runner(model)
    runners[HALF] = lambda batch: optimised[first](**half_of(batch))
    runners[TWIN] = _runner(optimize(tiny_twin(models[first]), dtype=kinds[first]))
    backends = {name: backends_of(partial(model, **inputs[0])) for name, model in optimised.items()}
    timings = interleave(runners, workload, inputs, rounds, warmup=2)
    rows = []
    for name, model in models.items():
        shape = model_shape(model)
        macs = sum(shape.macs(batch) for batch in workload.batches) / len(workload.batches)
        ours, theirs = timings[f"{OURS} {name}"], timings[f"{THEIRS} {name}"]
        rows += [
            _row(name, OURS, kinds[name] or "fp32", ours, theirs, macs, backends[name]),
            _row(name, THEIRS, "fp32", theirs, theirs, macs, {}),
        ]
    whole = timings[f"{OURS} {first}"]
    against, against_theirs = (
        whole.speedup_over(timings[f"{runtime} dense"]) if "dense" in models else None
        for runtime in (OURS, THEIRS)
    )
    bound = LaunchBound.of(models[first], workload, whole, timings[HALF], timings[TWIN])
    return Benchmark(_title(workload, inputs, fixed), tuple(rows), against, against_theirs, bound, stored)


def _inputs(models: Sequence[Any], workload: Workload, fixed: bool) -> list[dict[str, Tensor]]:
    """Padded inputs that every model takes."""
    configs = [model.config for model in models]
    longest = max(map(max, workload.batches))
    tables = [most for most in map(most_tokens, configs) if most is not None]
    if tables and longest > min(tables):
        raise ValueError(
            f"the sequences have {longest} tokens; the model's position table allows {min(tables)}"
        )
    padding = {padding_id(config) for config in configs}
    if len(padding) > 1:
        raise ValueError("the two models pad with different ids, so they do not take the same inputs")
    vocabulary = min(config.vocab_size for config in configs)
    return workload.inputs(vocabulary, padding.pop(), models[0].device, longest if fixed else None)


def _runner(model: Any) -> Runner:
    return lambda batch: model(**batch)


def _row(
    model: str,
    runtime: str,
    dtype: str,
    timing: Timing,
    theirs: Timing,
    macs: float,
    backends: Mapping[str, str],
) -> Row:
    return Row(
        model,
        runtime,
        dtype,
        p50_ms=timing.call_ms(50),
        p90_ms=timing.call_ms(90),
        sequences_per_s=timing.sequences_per_s,
        macs=macs,
        speedup=timing.speedup_over(theirs),
        backends=backends,
    )


def _title(workload: Workload, inputs: Sequence[Mapping[str, Tensor]], fixed: bool) -> str:
    """What was measured, and where."""
    padded = sum(batch["input_ids"].numel() for batch in inputs)
    host = machine(inputs[0]["input_ids"].device)
    on_gpu = inputs[0]["input_ids"].device.type == "cuda"
    return (
        f"{workload.name}: {len(workload.batches)} batches, {workload.tokens:,} tokens, {padded:,} with "
        f"padding to {'the longest of all' if fixed else 'the longest of a batch'}; "
        f"{host['accelerator' if on_gpu else 'processor']}, threads: {host['threads']}, "
        f"torch {versions()['torch']}"
    )
